"""Schedules and predictions against diffusers and against Gaussian conditioning by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from their_schedulers import scheduler

from jaxvram.errors import UserError
from jaxvram.sample.noise import SCHEDULES, Noise, Posterior, betas, rescale_to_zero_snr

DISCRETE = tuple(s for s in SCHEDULES if s != "flow")
PAIRS = [(s, p) for s in DISCRETE for p in ("epsilon", "v", "x0")] + [("flow", "velocity")]


def images(T, n=6):
    """(x0, eps, t) of n images, the first and the last timestep among them."""
    random = np.random.RandomState(0)
    x0, eps = (random.normal(0, 1, (n, 2, 3, 4)).astype(np.float32) for _ in range(2))
    return x0, eps, np.linspace(0, T - 1, n).astype(np.int32)


@pytest.mark.parametrize("T", [1000, 250])
@pytest.mark.parametrize("schedule", DISCRETE)
def test_schedules_are_diffusers(schedule, T):
    noise = Noise(schedule, "v", T)
    theirs = scheduler("DDPM", noise, in_fp64=False)
    np.testing.assert_allclose(betas(schedule, T), theirs.betas, rtol=1e-6)
    assert noise.alpha_bar_T.dtype == np.float64 and (np.diff(noise.alpha_bar_T) < 0).all()
    np.testing.assert_allclose(noise.alpha_bar_T[:-1], theirs.alphas_cumprod[:-1], rtol=1e-6)
    # where cosine's last beta is cut, fp32 has five digits left of 1 - 0.999
    np.testing.assert_allclose(noise.alpha_bar_T[-1], theirs.alphas_cumprod[-1], rtol=2e-5)


@pytest.mark.parametrize("schedule", DISCRETE)
def test_fewer_steps_end_in_the_same_noise(schedule):
    """Within a factor of 5 in abar, where without the rescaling linear with T = 250 would leave 0.08 of the image."""
    end = {T: Noise(schedule, "v", T).alpha_bar_T[-1] for T in (1000, 250)}
    assert end[250] < 5 * end[1000] + 1e-6


@pytest.mark.parametrize("schedule", DISCRETE)
def test_zero_terminal_snr_is_diffusers(schedule):
    noise = Noise(schedule, "v", zero_terminal_snr=True)
    theirs = scheduler("DDPM", noise).alphas_cumprod
    np.testing.assert_allclose(noise.alpha_bar_T, theirs, rtol=1e-6)
    np.testing.assert_allclose(noise.alpha_bar_T, scheduler("DDPM", noise, in_fp64=False).alphas_cumprod, atol=1e-6)
    assert noise.alpha_bar_T[-1] == 0 and noise.alpha_bar_T[0] == pytest.approx(1 - betas(schedule, 1000)[0], rel=1e-12)
    np.testing.assert_array_equal(rescale_to_zero_snr(Noise(schedule, "v").alpha_bar_T), noise.alpha_bar_T)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", DISCRETE)
def test_noisy_images_and_v_are_diffusers(schedule, zero_snr):
    torch = pytest.importorskip("torch")
    noise = Noise(schedule, "v", zero_terminal_snr=zero_snr)
    theirs = scheduler("DDPM", noise)
    x0, eps, t_B = images(1000)
    tensors = [torch.tensor(a) for a in (x0.astype(np.float64), eps.astype(np.float64), t_B.astype(np.int64))]
    np.testing.assert_allclose(noise.add(x0, eps, t_B), theirs.add_noise(*tensors), atol=1e-6)
    np.testing.assert_allclose(noise.target(x0, eps, t_B), theirs.get_velocity(*tensors), atol=1e-6)


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_a_perfect_prediction_gives_image_and_noise_back(schedule, prediction):
    noise = Noise(schedule, prediction)
    x0, eps, t_B = images(1000)
    t_B = t_B + 0.5 if noise.is_flow else t_B
    alpha, sigma = (a[:, None, None, None] for a in noise.alpha_sigma(t_B))
    assert alpha.dtype == jnp.float32 and sigma.dtype == jnp.float32
    got = noise.x0_and_eps(noise.add(x0, eps, t_B), noise.target(x0, eps, t_B), alpha, sigma)
    # fp32's rounding of x_t, times what the conversion divides by
    divisor = {"epsilon": alpha, "x0": sigma}.get(prediction, jnp.ones(()))
    for found, want in zip(got, (x0, eps), strict=True):
        assert (np.abs(found - want) <= 2e-6 / divisor).all()
    np.testing.assert_allclose(noise.eps_of(noise.add(x0, eps, t_B), x0, alpha, sigma) * sigma, eps * sigma, atol=2e-6)


def test_the_first_and_last_of_a_flow_are_image_and_noise():
    noise = Noise("flow", "velocity", T=40)
    x0, eps, _ = images(40, 2)
    np.testing.assert_allclose(noise.add(x0, eps, np.float32([0, 40])), np.stack([x0[0], eps[1]]))
    np.testing.assert_allclose(noise.target(x0, eps, np.float32([0, 40])), eps - x0)
    np.testing.assert_allclose(noise.snr(np.float32([10, 20, 40])), [9, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("schedule", DISCRETE)
def test_snr(schedule):
    t_B = np.array([0, 1, 500, 998, 999])
    noise = Noise(schedule, "v")
    abar_B = np.cumprod(1 - betas(schedule, 1000))[t_B]
    np.testing.assert_allclose(noise.snr(t_B), abar_B / (1 - abar_B), rtol=1e-5)
    assert Noise(schedule, "v", zero_terminal_snr=True).snr(t_B)[-1] == 0


def conditioned(abar_t, abar_s):
    """(of_x0, of_x, variance) of x_s given x_t and x_0: conditioning in the joint normal distribution of (x_s, x_t)."""
    gain = np.sqrt(abar_t / abar_s)  # x_t = gain x_s + noise
    mean_of_x0 = np.sqrt([abar_s, abar_t])
    covariance = np.array([[1 - abar_s, gain * (1 - abar_s)], [gain * (1 - abar_s), 1 - abar_t]])
    of_x = covariance[0, 1] / covariance[1, 1]
    return mean_of_x0[0] - of_x * mean_of_x0[1], of_x, covariance[0, 0] - of_x * covariance[1, 0]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", DISCRETE)
def test_posterior(schedule, zero_snr):
    """Of neighbours and of timesteps far apart; nothing is left open where x_s is the image itself."""
    noise = Noise(schedule, "v", zero_terminal_snr=zero_snr)
    abar_T = np.append(noise.alpha_bar_T, 1.0)  # abar of "before timestep 0" last: index -1
    neighbours = noise.posterior
    assert neighbours.variance[0] == 0 and neighbours.of_x0[0] == 1 and neighbours.of_x[0] == 0
    for t, s in ((0, -1), (1, 0), (2, 1), (500, 499), (999, 998), (999, 700), (300, 10), (7, -1)):
        between = Posterior.between(abar_T[[t]], abar_T[[s]])
        want = conditioned(abar_T[t], abar_T[s])
        got = [between.of_x0[0], between.of_x[0], between.variance[0]]
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-15)
        assert between.beta[0] == pytest.approx(1 - abar_T[t] / abar_T[s], rel=1e-12)
        if s == t - 1:
            np.testing.assert_array_equal([p[t] for p in (neighbours.of_x0, neighbours.of_x, neighbours.variance)], got)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", DISCRETE)
def test_bounds_of_the_variance(schedule, zero_snr):
    """Finite, the lower below the upper from the second step on; the first step borrows the second's lower bound."""
    posterior = Noise(schedule, "v", zero_terminal_snr=zero_snr).posterior
    low_T, high_T = posterior.log_bounds
    np.testing.assert_allclose(np.exp(low_T[1:]), posterior.variance[1:], rtol=1e-12)
    assert low_T[0] == low_T[1]
    np.testing.assert_allclose(np.exp(high_T), 1 - noise_ratio(schedule, zero_snr), rtol=1e-12)
    assert (low_T[1:] < high_T[1:]).all()


def noise_ratio(schedule, zero_snr):
    abar_T = Noise(schedule, "v", zero_terminal_snr=zero_snr).alpha_bar_T
    return abar_T / np.append(1, abar_T[:-1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"prediction": "eps"}, r"task.prediction='eps' is unknown.*valid: epsilon, v, velocity, x0"),
        ({"T": 1}, "task.timesteps=1 must be at least 2"),
        ({"schedule": "flow"}, "go together"),
        ({"prediction": "velocity"}, "go together"),
        ({"zero_terminal_snr": True}, "epsilon says nothing.*set task.prediction=v or x0"),
        ({"schedule": "flow", "prediction": "velocity", "zero_terminal_snr": True}, "zero_terminal_snr"),
    ],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        Noise(**fields)
