"""Samplers compile once, and refuse schedules and numbers of steps that are not for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from denoisers import KEY, START

from jaxvram.errors import UserError
from jaxvram.sample import diffusion
from jaxvram.sample.diffusion import DiffusionSampleConfig, invert, sample
from jaxvram.sample.noise import Noise

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_the_network_is_traced_as_often_for_many_steps_as_for_few(sampler):
    """And one compilation serves every key."""
    noise = Noise("flow", "velocity") if sampler in diffusion.FOR_FLOWS else Noise()
    traced = {}
    for steps in (3, 30):
        count = []

        def denoise(x, t_B, count=count):
            count.append(1)
            return jnp.tanh(x), None

        cfg = DiffusionSampleConfig(sampler, steps)
        run = quick.jit(lambda x, key, denoise=denoise, cfg=cfg: sample(denoise, noise, x, key, cfg))
        images = [np.asarray(run(START, jax.random.key(seed))) for seed in (0, 0, 1)]
        assert run._cache_size() == 1
        assert (images[0] == images[1]).all() and (images[0] != images[2]).any() == (sampler == "ddpm")
        traced[steps] = len(count)
    assert traced[3] == traced[30] <= 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "ddpmm"}, "sample.sampler='ddpmm' is unknown; did you mean 'ddpm'"),
        ({"guidance_channels": "first4"}, "did you mean 'first3'"),
        ({"fixed_variance": "medium"}, r"unknown.*valid: large, small"),
        ({"steps": 0}, "must be at least 1"),
        ({"num_samples": 0}, "must be at least 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"guidance": -1.0}, "not negative"),
        ({"eta": -0.1}, "not negative"),
        ({"seed": 2**32}, "sample.seed=4294967296 is not in"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        DiffusionSampleConfig(**fields)


@pytest.mark.parametrize(
    ("noise", "sampler", "steps", "message"),
    [
        (Noise("flow", "velocity"), "ddim", 10, "ddim is not for task.schedule=flow; valid: euler, heun"),
        (Noise("cosine"), "heun", 10, r"not for task.schedule=cosine; valid: ddpm, ddim, dpm\+\+"),
        (Noise(T=50), "ddpm", 51, "sample.steps=51 is too many: ddpm takes at most 50"),
        (Noise(T=50), "dpm++", 50, r"sample.steps=50 is too many: dpm\+\+ takes at most 49"),
    ],
)
def test_samplers_that_do_not_go_with_the_schedule(noise, sampler, steps, message):
    with pytest.raises(UserError, match=message):
        sample(None, noise, START, KEY, DiffusionSampleConfig(sampler, steps))


def test_inversion_is_ddims():
    with pytest.raises(UserError, match=r"not for task.schedule=flow"):
        invert(None, Noise("flow", "velocity"), START, 5)
    with pytest.raises(UserError, match="at most 50"):
        invert(None, Noise(T=50), START, 51)


def test_all_timesteps_are_few_enough():
    for sampler, steps in (("ddpm", 50), ("ddim", 50), ("dpm++", 49)):
        diffusion.check(Noise(T=50), DiffusionSampleConfig(sampler, steps))
    diffusion.check(Noise("flow", "velocity", 50), DiffusionSampleConfig("euler", 51))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler", "heun"])
@pytest.mark.parametrize("strength", [0.25, 0.7, 1.0])
def test_from_an_image_back_to_it(sampler, strength):
    """A network that knows the noise laid over an image finds the image, however much of it was laid."""
    random = np.random.RandomState(0)
    image, eps = random.normal(0, 1, (2, 3, 2, 2, 1)).astype(np.float32)
    noise = Noise("flow", "velocity") if sampler in ("euler", "heun") else Noise()
    cfg = DiffusionSampleConfig(sampler, 8, strength=strength)
    knows = eps - image if noise.is_flow else eps
    found = quick.jit(lambda: sample(lambda x, t_B: (knows + 0 * x, None), noise, eps, KEY, cfg, image))()
    np.testing.assert_allclose(found, image, atol=1e-4)


@pytest.mark.parametrize(("strength", "gone"), [(0.25, 2), (0.7, 6), (1.0, 8), (0.01, 1)])
def test_strength_is_the_share_of_steps_that_are_gone(strength, gone):
    """With a velocity of 1 everywhere, what is lost is the noise there was at the first step."""
    cfg, zero = DiffusionSampleConfig("euler", 8, strength=strength), np.zeros((1, 2, 2, 1), np.float32)
    found = quick.jit(lambda: sample(lambda x, t_B: (1 + 0 * x, None), Noise("flow", "velocity"), zero, KEY, cfg, zero))()
    np.testing.assert_allclose(found, -gone / 8, rtol=1e-5)
