"""Every sampler step for step against diffusers' schedulers; what is exact of Gaussian data; one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.experimental import io_callback
from their_schedulers import scheduler

from jaxvram.errors import UserError
from jaxvram.sample import diffusion
from jaxvram.sample.diffusion import DiffusionSampleConfig, invert, sample, timesteps
from jaxvram.sample.noise import Noise

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # DPM-Solver in diffusers hands a tensor to NumPy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
TOLERANCE = 1e-5  # of the largest element of each image on the way
SHAPE = (2, 4, 4, 3)
RANDOM = np.random.RandomState(0)
MATRIX_CxC, PLACE_CxC = RANDOM.normal(0, 0.5, (2, 3, 3))
BIAS_C, SLOPE_C = RANDOM.normal(0, 0.5, (2, 3))
KEY = jax.random.key(5)
START = RANDOM.normal(0, 1, SHAPE).astype(np.float32)
SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "v", "x0")


def network(xp, x, share):
    """A smooth denoiser, the same in JAX and PyTorch: (prediction, variance's place in [-1, 1]); share: t / T."""
    mix = lambda matrix: x @ xp.asarray(matrix, dtype=x.dtype)
    of_t = xp.asarray(BIAS_C, dtype=x.dtype) + share * xp.asarray(SLOPE_C, dtype=x.dtype)
    return xp.tanh(mix(MATRIX_CxC) + of_t), xp.sin(mix(PLACE_CxC) + of_t)


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
    assert max(ddim(fresh(), 10, eta) for eta in (0.0, 0.5, 1.0)) < TOLERANCE
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


# Data of which every number is normal with this mean and standard deviation: the best denoiser is known.
MEAN, STD = 0.3, 0.5


def best_denoiser(noise, fraction_T=None):
    """E[x_0 | x_t] and all that follows from it; `fraction_T`: the variance's place between its bounds."""

    def denoise(x, t_B):
        t = t_B[0] if noise.is_flow else t_B[0].astype(jnp.int32)
        alpha, sigma = noise.alpha_sigma(t)
        variance, apart = (alpha * STD) ** 2 + sigma**2, x - alpha * MEAN
        x0, eps = MEAN + alpha * STD**2 / variance * apart, sigma / variance * apart
        said = {"epsilon": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[noise.prediction]
        return said, None if fraction_T is None else jnp.broadcast_to(jnp.asarray(fraction_T)[t], x.shape)

    return denoise


def errors_of_the_map(noise, sampler, steps):
    """(of the slope, relative; of the offset): without added noise a sampler of such data is x -> offset + slope x.

    The exact flow takes N(alpha mean, alpha^2 std^2 + sigma^2) of the last timestep to N(mean, std^2).
    """
    run = quick.jit(lambda x: sample(best_denoiser(noise), noise, x, KEY, DiffusionSampleConfig(sampler, steps)))
    at_0, at_1 = np.asarray(run(np.float32([0, 1]).reshape(2, 1, 1, 1)), np.float64).ravel()
    abar = 0.0 if noise.is_flow else noise.alpha_bar_T[-1]
    slope = STD / np.sqrt(abar * STD**2 + 1 - abar)
    return (at_1 - at_0) / slope - 1, at_0 - (MEAN - slope * np.sqrt(abar) * MEAN)


@pytest.mark.parametrize(
    ("schedule", "prediction", "sampler", "order"),
    [
        ("linear", "epsilon", "ddim", 1), ("cosine", "v", "ddim", 1), ("linear", "x0", "dpm++", 2),
        ("cosine", "v", "dpm++", 2), ("flow", "velocity", "euler", 1), ("flow", "velocity", "heun", 2),
    ],
)  # fmt: skip
def test_samples_of_a_normal_distribution_converge(schedule, prediction, sampler, order):
    """Mean and standard deviation are the data's; twice the steps, half the error; of second order a quarter or better."""
    noise = Noise(schedule, prediction)
    (coarse, _), (fine, of_mean) = (errors_of_the_map(noise, sampler, steps) for steps in (20, 40))
    assert abs(of_mean) < 1e-4
    if order == 1:
        assert 0.45 < fine / coarse < 0.55 and 0.03 < abs(fine) < 0.08
    else:  # some 1 / 40^2, where dpm++ begins in steps of very unequal size in log(alpha / sigma)
        assert abs(fine / coarse) < 0.31 and abs(fine) < 0.004


def test_ancestral_samples_have_mean_and_standard_deviation_of_the_data():
    """All of 250 steps; within 4 standard errors of 4096 numbers, and 5 % that fixed variances are off from the right."""
    noise = Noise("linear", "epsilon", T=250)
    for fixed_variance in ("small", "large"):
        cfg = DiffusionSampleConfig("ddpm", 250, fixed_variance=fixed_variance)
        x = np.random.RandomState(1).normal(0, 1, (4, 16, 16, 4)).astype(np.float32)
        images = np.asarray(quick.jit(lambda x, cfg=cfg: sample(best_denoiser(noise), noise, x, KEY, cfg))(x))
        assert abs(images.mean() - MEAN) < 4 * STD / 64 and abs(images.std() / STD - 1) < 4 / np.sqrt(2 * 4096) + 0.05


def test_with_the_right_variance_few_ancestral_steps_are_exact():
    """q(x_s | x_t) of normal data is normal, its variance between the bounds: told where, 5 steps do what 1000 do.

    But for the last, which adds no noise: it leaves the standard deviation of E[x_0 | x at timestep 0].
    """
    noise, steps = Noise("linear", "v"), 5
    t_N = timesteps(noise.T, steps)
    abar_N = noise.alpha_bar_T[t_N]
    marginal_N = abar_N * STD**2 + 1 - abar_N
    ratio_M = abar_N[:-1] / abar_N[1:]  # x_t = sqrt(ratio) x_s + noise of variance 1 - ratio
    variance_M = marginal_N[1:] - ratio_M * marginal_N[1:] ** 2 / marginal_N[:-1]
    small_M = (1 - abar_N[1:]) * (1 - ratio_M) / (1 - abar_N[:-1])
    fraction_T = np.zeros(noise.T, np.float32)
    fraction_T[t_N[:-1]] = np.log(variance_M / small_M) / np.log((1 - ratio_M) / small_M)
    assert (0.01 < fraction_T[t_N[:-1]]).all() and (fraction_T < 0.99).all()

    start = np.random.RandomState(2).normal(np.sqrt(abar_N[0]) * MEAN, np.sqrt(marginal_N[0]), (4, 64, 64, 4))
    cfg = DiffusionSampleConfig("ddpm", steps)
    sampled = quick.jit(lambda fraction_T, x: sample(best_denoiser(noise, fraction_T), noise, x, KEY, cfg))
    run = lambda fraction_T: np.asarray(sampled(fraction_T, start.astype(np.float32)))
    images = run(fraction_T)
    errors = 4 / np.sqrt(images.size)  # four standard errors, in units of the standard deviation
    assert abs(images.mean() - MEAN) < errors * STD
    expected = STD**2 * np.sqrt(abar_N[-1] / marginal_N[-1])
    assert abs(images.std() / expected - 1) < errors / np.sqrt(2)
    assert abs(run(0 * fraction_T).std() / expected - 1) > 0.02  # the lower bound is not it


def test_ddim_with_eta_1_is_ddpm():
    """Song et al. 2020, 4.1: the same numbers, as both take the same draws."""
    noise = Noise("cosine", "v")
    images = [sampled(noise, sampler=sampler, steps=9, eta=eta)[1][-1] for sampler, eta in (("ddpm", 0), ("ddim", 1))]
    assert quick.relative_error(*images) < TOLERANCE


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_makes_the_image_again_from_its_inversion(prediction):
    """For a smooth denoiser, within C / steps."""
    noise = Noise("linear", prediction)
    image = np.clip(MEAN + STD * START, -1, 1)
    denoise = best_denoiser(noise)

    def off(steps):
        cfg = DiffusionSampleConfig("ddim", steps)
        there_and_back = lambda x: sample(denoise, noise, invert(denoise, noise, x, steps), KEY, cfg)
        return quick.relative_error(quick.jit(there_and_back)(image), image)

    coarse, fine = off(20), off(80)
    assert fine < 0.4 * coarse and fine < 0.1


def test_inverted_noise_looks_like_noise():
    """Of images of normal data, with its own mean 0 and standard deviation 1, where the images' are 0.3 and 0.5."""
    noise = Noise("linear", "v")
    image = np.random.RandomState(3).normal(MEAN, STD, (2, 16, 16, 3)).astype(np.float32)
    found = np.asarray(quick.jit(lambda x: invert(best_denoiser(noise), noise, x, 100))(image))
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=0.1)


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
