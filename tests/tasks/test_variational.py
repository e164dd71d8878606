"""The variational bound against fp64 by hand: distributions from Gaussian conditioning, their divergence by quadrature."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.sample.noise import Noise
from jaxvram.tasks.variational import bound_in_bits, discretised_log_likelihood, normal_kl

PIXELS = np.arange(256) / 127.5 - 1


def conditioned(alpha_bar_T, t, x0, x_t):
    """(mean, variance) of q(x_{t-1} | x_t, x_0): the product of what x_0 and what x_t say of x_{t-1}."""
    before = alpha_bar_T[t - 1]
    ratio = alpha_bar_T[t] / before
    of_x0, of_x = 1 / (1 - before), ratio / (1 - ratio)  # precisions
    mean = (of_x0 * math.sqrt(before) * x0 + of_x * x_t / math.sqrt(ratio)) / (of_x0 + of_x)
    return mean, 1 / (of_x0 + of_x)


def divergence(mean_1, variance_1, mean_2, variance_2):
    """KL of two normal distributions, the integral of p log(p / q) by Gauss-Hermite quadrature, exact for a parabola."""
    z_K, weight_K = np.polynomial.hermite_e.hermegauss(20)
    x_K = mean_1[..., None] + np.sqrt(variance_1) * z_K
    log_p = -0.5 * z_K**2 - 0.5 * np.log(variance_1)
    log_q = -0.5 * (x_K - mean_2[..., None]) ** 2 / variance_2[..., None] - 0.5 * np.log(variance_2)[..., None]
    return ((log_p - log_q) * weight_K).sum(-1) / weight_K.sum()


def pixel_probability(x0, mean, std):
    """What a normal distribution has between the midpoints to the pixel values on both sides; to infinity at the ends."""
    page = lambda z: 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    level = np.rint((x0 + 1) * 127.5)
    above = np.where(level == 255, 1, page((((level + 0.5) / 127.5 - 1) - mean) / std))
    below = np.where(level == 0, 0, page((((level - 0.5) / 127.5 - 1) - mean) / std))
    return above - below


def bits_by_hand(noise, x0, x_t, t, foreseen, fraction):
    x0, x_t, foreseen, fraction = (np.asarray(a, np.float64) for a in (x0, x_t, foreseen, fraction))
    abar = noise.alpha_bar_T
    high = 1 - abar[t] / (abar[t - 1] if t else 1)
    low = conditioned(abar, max(t, 1), 0, 0)[1]  # of timestep 0 the second step's, as its own is 0
    variance = np.exp(fraction * math.log(high) + (1 - fraction) * math.log(low))
    if t == 0:  # the mean is the foreseen image itself
        nats = -np.log(pixel_probability(x0, foreseen, np.sqrt(variance)))
    else:
        mean_1, variance_1 = conditioned(abar, t, x0, x_t)
        nats = divergence(mean_1, variance_1, conditioned(abar, t, foreseen, x_t)[0], variance)
    return nats.mean() / math.log(2)


def batch(noise, fraction, spread):
    """One image for each of four timesteps; what is foreseen is off by `spread` of what the step's noise would hide."""
    random, t_B = np.random.RandomState(0), np.int32([0, 1, noise.T // 2, noise.T - 1])
    shape = (len(t_B), 4, 4, 2)
    x0 = (random.randint(0, 256, shape) / 127.5 - 1).astype(np.float32)
    x0[:, 0] = np.resize([-1, 1], shape[2:])  # the ends of the scale are cases of their own
    x_t = np.asarray(noise.add(x0, random.normal(0, 1, shape).astype(np.float32), t_B))
    hidden_B = np.sqrt(noise.posterior.beta[t_B]) / noise.posterior.of_x0[t_B]
    foreseen = x0 + spread * hidden_B[:, None, None, None] * random.normal(0, 1, shape)
    fraction = random.uniform(0.2, 0.8, shape) if fraction == "between" else np.full(shape, fraction)
    return t_B, x0, x_t, foreseen.astype(np.float32), fraction.astype(np.float32)


@pytest.mark.parametrize("T", [8, 1000])  # of eight timesteps the middle one's bounds are apart too
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_bound(schedule, T):
    noise = Noise(schedule, "v", T)
    bound = quick.jit(lambda t_B, x0, x_t, *foreseen: bound_in_bits(noise, x0, x_t, t_B, *foreseen))
    for fraction in (0.0, 1.0, "between"):
        t_B, x0, x_t, foreseen, fractions = batch(noise, fraction, 1)
        got_B = bound(t_B, x0, x_t, foreseen, fractions)
        assert got_B.shape == (4,) and got_B.dtype == jnp.float32
        want_B = [bits_by_hand(noise, x0[i], x_t[i], t, foreseen[i], fractions[i]) for i, t in enumerate(t_B)]
        assert min(want_B) > 0.1
        np.testing.assert_allclose(got_B, want_B, rtol=1e-5)


def test_the_right_image_and_variance_cost_nothing():
    """But for the first timestep, where pixels are coded."""
    noise = Noise("cosine", "v")
    t_B, x0, x_t, _, _ = batch(noise, 0, 0)
    bits_B = np.asarray(bound_in_bits(noise, x0, x_t, t_B, x0, np.zeros_like(x0)))
    np.testing.assert_allclose(bits_B[1:], 0, atol=1e-6)
    assert bits_B[0] > 0


def test_the_mean_is_not_taught_and_the_variance_is():
    noise = Noise("cosine", "epsilon", T=8)
    t_B, x0, x_t, foreseen, fraction = batch(noise, 0.5, 1)
    total = lambda foreseen, fraction: bound_in_bits(noise, x0, x_t, t_B, foreseen, fraction).sum()
    of_mean, of_fraction = quick.jit(jax.grad(total, (0, 1)))(foreseen, fraction)
    assert not of_mean.any() and jnp.isfinite(of_fraction).all()
    assert (jnp.abs(of_fraction[:3]).max((1, 2, 3)) > 1e-3).all()  # of the last timestep both bounds are 0.999


def test_learnt_variance_goes_to_the_squared_error():
    """The bound is least where the variance is the posterior's and the squared error of the mean together."""
    noise, t_B = Noise("linear", "epsilon"), np.int32([3])
    low, high = (bound_T[3] for bound_T in noise.posterior.log_bounds)
    x0 = np.zeros((1, 1, 1, 1), np.float32)
    place_K = np.linspace(0, 1, 201, dtype=np.float32)
    bound = lambda foreseen, place: bound_in_bits(noise, x0, x0, t_B, foreseen + x0, place + x0)[0]
    best = quick.jit(lambda foreseen: jnp.asarray(place_K)[jnp.argmin(jax.vmap(bound, (None, 0))(foreseen, place_K))])
    for wanted in (0.0, 0.3, 0.7):
        error_of_mean = math.sqrt(math.exp(low + wanted * (high - low)) - math.exp(low))
        assert best(np.float32(error_of_mean / noise.posterior.of_x0[3])) == pytest.approx(wanted, abs=0.03)
    assert best(np.float32(10)) == 1


@pytest.mark.parametrize("std", [0.001, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-1.4, -0.301, 0.0, 1.0])
def test_the_pixels_probabilities_add_up_to_one(mean, std):
    log_p = discretised_log_likelihood(np.float32(PIXELS), mean, math.log(std))
    assert abs(float(jnp.exp(log_p).sum()) - 1) < 1e-5 and float(log_p.max()) <= 1e-6


def test_the_pixels_probabilities_are_nearly_the_exact_ones():
    """The tanh form of the normal distribution is off by less than 4e-4."""
    cdf = np.vectorize(lambda x, mean, std: 0.5 * (1 + math.erf((x - mean) / std / math.sqrt(2))))
    for mean, std in ((0.2, 0.05), (-1.0, 0.5), (0.95, 0.02)):
        edges = np.concatenate([[-np.inf], (PIXELS[:-1] + PIXELS[1:]) / 2, [np.inf]])
        want = np.diff(cdf(edges, mean, std))
        got = np.exp(discretised_log_likelihood(np.float32(PIXELS), mean, math.log(std)))
        np.testing.assert_allclose(got, want, atol=4e-4)
        assert np.abs(np.cumsum(got) - np.cumsum(want)).max() < 4e-4


def test_divergence_of_normal_distributions():
    kl = normal_kl(np.float64(0.3), math.log(0.5), -0.2, math.log(0.8))
    mean = lambda x: np.array([x])
    assert float(kl) == pytest.approx(divergence(mean(0.3), 0.5, mean(-0.2), mean(0.8))[0], rel=1e-6)
    assert float(normal_kl(1.0, 0.5, 1.0, 0.5)) == 0
