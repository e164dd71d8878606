"""What is exact of data that are normal: their samples' mean and deviation, the order of a sampler, noise found again."""

import numpy as np
import pytest
import quick
from denoisers import KEY, MEAN, PREDICTIONS, START, STD, best_denoiser

from jaxvram.sample.diffusion import DiffusionSampleConfig, invert, sample, timesteps
from jaxvram.sample.noise import Noise

pytestmark = pytest.mark.usefixtures("quick_compile")


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
