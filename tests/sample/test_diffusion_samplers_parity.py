"""Every sampler step for step against diffusers' schedulers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from denoisers import KEY, PREDICTIONS, SHAPE, START, network
from jax.experimental import io_callback
from their_schedulers import scheduler

from jaxvram.sample import diffusion
from jaxvram.sample.diffusion import DiffusionSampleConfig, invert, sample, timesteps
from jaxvram.sample.noise import Noise

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # DPM-Solver in diffusers hands a tensor to NumPy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
TOLERANCE = 1e-5  # of the largest element of each image on the way
SCHEDULES = ("linear", "scaled_linear", "cosine")


def ours(run, noise, learned=False):
    """What `run(denoise, x)` shows `denoise` on the way: (timesteps, images), the result as the last image."""
    asked = []

    def denoise(x, t_B):
        io_callback(lambda x, t_B: asked.append((np.array(x), float(t_B[0]))), None, x, t_B, ordered=True)
        said, place = network(jnp, x, t_B[0] / noise.T)
        return said, (place + 1) / 2 if learned else None

    result = quick.jit(lambda x: run(denoise, x))(START)
    jax.effects_barrier()
    return [t for _, t in asked], [x for x, _ in asked] + [np.asarray(result)]


def theirs(scheduler, noise, step, learned=False, start=START):
    """The same of a loop over `scheduler.timesteps`; `step(i, said, t, x) -> x`, channels first."""
    import torch

    x, ts, images = torch.tensor(start).double().movedim(-1, 1), [], []
    for i, t in enumerate(scheduler.timesteps):
        images.append(x.movedim(1, -1).numpy())
        ts.append(float(t))
        both = [said.movedim(-1, 1) for said in network(torch, x.movedim(1, -1), float(t) / noise.T)]
        x = step(i, torch.cat(both, 1) if learned else both[0], t, x).double()
    return ts, [*images, x.movedim(1, -1).numpy()]


def worst(found, wanted):
    """The largest difference of any image on the way, of its largest element; the timesteps are the same."""
    (ts, images), (their_ts, their_images) = found, wanted
    np.testing.assert_allclose(ts, their_ts, rtol=1e-6)
    return np.max([quick.relative_error(a, b) for a, b in zip(images, their_images, strict=True)])  # NaN is the largest


@functools.cache
def drawn(steps):
    """The noise of each step, channels first."""
    import torch

    each = quick.jit(jax.vmap(lambda key: jax.random.normal(key, SHAPE)))(jax.random.split(KEY, steps))
    return [torch.tensor(np.asarray(x)).double().movedim(-1, 1) for x in each]


def sampled(noise, learned=False, **options):
    return ours(lambda denoise, x: sample(denoise, noise, x, KEY, DiffusionSampleConfig(**options)), noise, learned)


def ddpm(monkeypatch, noise, steps, variance="small", clip=False):
    learned = variance == "learned_range"
    fixed = {} if learned else {"fixed_variance": variance}
    found = sampled(noise, learned, sampler="ddpm", steps=steps, clip=clip, **fixed)
    name = variance if learned else f"fixed_{variance}"
    their = scheduler("DDPM", noise, variance_type=name, clip_sample=clip, timestep_spacing="linspace")
    their.set_timesteps(steps)
    noises = iter(drawn(steps))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(noises))
    return worst(found, theirs(their, noise, lambda i, said, t, x: their.step(said, t, x).prev_sample, learned))


def ddim(noise, steps, eta=0.0, clip=False):
    found = sampled(noise, sampler="ddim", steps=steps, eta=eta, clip=clip)
    their = scheduler("DDIM", noise, clip_sample=clip, timestep_spacing="linspace")
    their.set_timesteps(steps)
    their.num_inference_steps = steps - 1  # it goes from t to t - T // this, which should be the next timestep
    noises = drawn(steps)
    step = lambda i, said, t, x: their.step(
        said, t, x, eta, use_clipped_model_output=True, variance_noise=noises[i] if eta else None
    )
    return worst(found, theirs(their, noise, lambda *args: step(*args).prev_sample))


def ddim_inverse(noise, steps):
    found = ours(lambda denoise, x: invert(denoise, noise, x, steps), noise)
    # of x0 alone: what noise is in a clean image, at sigma = 0, such a network cannot say
    their = scheduler("DDIMInverse", noise, clip_sample=False, set_alpha_to_one=noise.prediction != "x0")
    if noise.prediction == "x0":
        their.initial_alpha_cumprod = their.alphas_cumprod[0]
    import torch

    their.num_inference_steps, their.timesteps = steps - 1, torch.tensor(timesteps(noise.T, steps)[::-1].copy())
    return worst(found, theirs(their, noise, lambda i, said, t, x: their.step(said, t, x).prev_sample))


def dpm(noise, steps, clip=False):
    if noise.zero_terminal_snr:
        noise.alpha_bar_T[-1] = 2**-24  # as theirs has it: with 0 it would divide by it
    found = sampled(noise, sampler="dpm++", steps=steps, clip=clip)
    given = {"thresholding": True, "sample_max_value": 1.0} if clip else {}  # a quantile of at most 1: a clip
    their = scheduler("DPMSolverMultistep", noise, timestep_spacing="linspace", **given)
    if noise.zero_terminal_snr:
        their.alphas_cumprod[-1] = noise.alpha_bar_T[-1]
    their.set_timesteps(steps)
    return worst(found, theirs(their, noise, lambda i, said, t, x: their.step(said, t, x).prev_sample))


def euler(T, steps):
    diffusers = pytest.importorskip("diffusers")
    noise = Noise("flow", "velocity", T)
    their = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T)
    their.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    found = sampled(noise, sampler="euler", steps=steps)
    return worst(found, theirs(their, noise, lambda i, said, t, x: their.step(said, t, x).prev_sample))


def heun(T, steps):
    diffusers = pytest.importorskip("diffusers")
    noise = Noise("flow", "velocity", T)
    their = diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=T)
    their.sigma_min = 1 / steps  # it takes no sigmas, but spreads them evenly from 1 down to this
    their.set_timesteps(steps)
    found = sampled(noise, sampler="heun", steps=steps)
    return worst(found, theirs(their, noise, lambda i, said, t, x: their.step(said, t, x).prev_sample))


EVERYWHERE = pytest.mark.parametrize(("schedule", "prediction"), [(s, p) for s in SCHEDULES for p in PREDICTIONS])


@EVERYWHERE
def test_ddpm(schedule, prediction, monkeypatch):
    assert ddpm(monkeypatch, Noise(schedule, prediction), 7) < TOLERANCE


@EVERYWHERE
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(schedule, prediction, eta):
    assert ddim(Noise(schedule, prediction), 10, eta) < TOLERANCE


@EVERYWHERE
def test_ddim_inverse(schedule, prediction):
    assert ddim_inverse(Noise(schedule, prediction), 10) < TOLERANCE


@EVERYWHERE
def test_dpm(schedule, prediction):
    assert dpm(Noise(schedule, prediction), 7) < TOLERANCE


@pytest.mark.parametrize("variance", ["large", "learned_range"])
@pytest.mark.parametrize("steps", [7, 30])
def test_variances_of_ddpm(variance, steps, monkeypatch):
    assert ddpm(monkeypatch, Noise("linear", "epsilon", T=30), steps, variance) < TOLERANCE


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_clipping(prediction, monkeypatch):
    """What it clips leaves [-1, 1], so the images are others."""
    noise = Noise("linear", prediction)
    assert ddpm(monkeypatch, noise, 7, clip=True) < TOLERANCE
    assert ddim(noise, 10, 0.5, clip=True) < TOLERANCE
    assert dpm(noise, 7, clip=True) < TOLERANCE
    images = [sampled(noise, sampler="ddim", steps=10, clip=clip)[1][-1] for clip in (False, True)]
    assert quick.relative_error(*images) > 0.01


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr(prediction, monkeypatch):
    """From a first timestep without any image; at eta = 1 a difference of nearly equal variances would be lost in fp32."""
    fresh = functools.partial(Noise, "scaled_linear", prediction, zero_terminal_snr=True)
    assert ddpm(monkeypatch, fresh(), 7) < TOLERANCE
    assert all(ddim(fresh(), 10, eta) < TOLERANCE for eta in (0.0, 0.5, 1.0))
    assert ddim_inverse(fresh(), 10) < TOLERANCE
    assert dpm(fresh(), 7) < TOLERANCE
    # theirs has 2^-24 for abar = 0 in dpm++; from 0 itself the first step in log(alpha / sigma) is infinite, which takes
    # the second step's correction away
    result, with_theirs = sampled(fresh(), sampler="dpm++", steps=7)[1][-1], fresh()
    with_theirs.alpha_bar_T[-1] = 2**-24
    assert quick.relative_error(result, sampled(with_theirs, sampler="dpm++", steps=7)[1][-1]) < 0.01


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_few_and_many_steps_of_dpm(steps):
    assert dpm(Noise("linear", "v"), steps) < TOLERANCE


@pytest.mark.parametrize("T", [1000, 37])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_flows(T, steps):
    assert euler(T, steps) < TOLERANCE
    assert heun(T, steps) < TOLERANCE


def test_timesteps_are_diffusers():
    """All of them, also where a half is rounded; a single step begins at the end."""
    for T in (1000, 97):
        noise = Noise("linear", T=T)
        their, solver = (scheduler(kind, noise, timestep_spacing="linspace") for kind in ("DDPM", "DPMSolverMultistep"))
        for steps in range(2, T + 1):
            their.set_timesteps(steps)
            np.testing.assert_array_equal(timesteps(T, steps), their.timesteps)
        for steps in (1, 2, 5, T // 2, T - 1):
            solver.set_timesteps(steps)
            np.testing.assert_array_equal(diffusion.step_table(noise, "dpm++", steps)["t"], solver.timesteps)
    assert timesteps(1000, 1).tolist() == [999]


def test_ddim_with_eta_1_is_ddpm():
    """Song et al. 2020, 4.1: the same numbers, as both take the same draws."""
    noise = Noise("cosine", "v")
    images = [sampled(noise, sampler=sampler, steps=9, eta=eta)[1][-1] for sampler, eta in (("ddpm", 0), ("ddim", 1))]
    assert quick.relative_error(*images) < TOLERANCE
