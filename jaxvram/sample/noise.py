"""Noise: x_t = alpha_t x_0 + sigma_t eps, what a network predicts of it, and what one step back looks like.

linear, scaled_linear, cosine: alpha^2 = abar_t = prod_{s <= t} (1 - beta_s), sigma^2 = 1 - abar_t, whole t in [0, T)
  (Ho et al. 2020, arXiv:2006.11239; Rombach et al. 2022; Nichol & Dhariwal 2021, arXiv:2102.09672);
flow: alpha = 1 - t / T, sigma = t / T, any t in [0, T] (rectified flow: Liu et al. 2022, arXiv:2209.03003).
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from jaxvram.errors import UserError, nearest

SCHEDULES = ("linear", "scaled_linear", "cosine", "flow")
PREDICTIONS = ("epsilon", "v", "x0", "velocity")


@dataclasses.dataclass(frozen=True)
class Noise:
    """A schedule and a prediction.

    Raises:
      UserError: names that are unknown, or do not go together.
    """

    schedule: str = "linear"
    prediction: str = "epsilon"
    T: int = 1000
    zero_terminal_snr: bool = False

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"task.schedule={self.schedule!r} is unknown{nearest(self.schedule, SCHEDULES)}")
        if self.prediction not in PREDICTIONS:
            raise UserError(f"task.prediction={self.prediction!r} is unknown{nearest(self.prediction, PREDICTIONS)}")
        if self.T < 2:
            raise UserError(f"task.timesteps={self.T} must be at least 2")
        if self.is_flow != (self.prediction == "velocity"):
            raise UserError("task.schedule=flow and task.prediction=velocity go together; one is set without the other")
        if self.zero_terminal_snr and (self.is_flow or self.prediction == "epsilon"):
            raise UserError(
                "task.zero_terminal_snr=True leaves nothing but noise at the last step, from which epsilon says nothing of "
                "the image (and a flow has it anyway): set task.prediction=v or x0"
            )

    @property
    def is_flow(self) -> bool:
        return self.schedule == "flow"

    @functools.cached_property
    def alpha_bar_T(self) -> np.ndarray:
        """abar of every timestep, float64."""
        alpha_bar_T = np.cumprod(1 - betas(self.schedule, self.T))
        return rescale_to_zero_snr(alpha_bar_T) if self.zero_terminal_snr else alpha_bar_T

    def alpha_sigma(self, t_B):
        """(alpha, sigma) of timesteps, fp32, in the shape of t."""
        if self.is_flow:
            sigma_B = t_B.astype(jnp.float32) / self.T
            return 1 - sigma_B, sigma_B
        of_t = lambda table_T: jnp.asarray(table_T, jnp.float32)[t_B]
        return of_t(np.sqrt(self.alpha_bar_T)), of_t(np.sqrt(1 - self.alpha_bar_T))

    def snr(self, t_B):
        """alpha^2 / sigma^2."""
        alpha_B, sigma_B = self.alpha_sigma(t_B)
        return jnp.square(alpha_B / jnp.maximum(sigma_B, 1e-12))

    def add(self, x0_BxHxWxC, eps_BxHxWxC, t_B):
        """x_t."""
        alpha_B, sigma_B = map(over_image, self.alpha_sigma(t_B))
        return alpha_B * x0_BxHxWxC + sigma_B * eps_BxHxWxC

    def target(self, x0_BxHxWxC, eps_BxHxWxC, t_B):
        """What the network is to say: eps;  v = alpha eps - sigma x_0;  x_0;  or the velocity eps - x_0."""
        if self.prediction == "v":
            alpha_B, sigma_B = map(over_image, self.alpha_sigma(t_B))
            return alpha_B * eps_BxHxWxC - sigma_B * x0_BxHxWxC
        return {"epsilon": eps_BxHxWxC, "x0": x0_BxHxWxC, "velocity": eps_BxHxWxC - x0_BxHxWxC}[self.prediction]

    def x0_and_eps(self, x_t, said, alpha, sigma):
        """Both, of x_t and what the network said; alpha and sigma broadcast against x_t."""
        if self.prediction == "epsilon":
            return (x_t - sigma * said) / alpha, said
        if self.prediction == "v":  # alpha^2 + sigma^2 = 1
            return alpha * x_t - sigma * said, sigma * x_t + alpha * said
        if self.prediction == "x0":
            return said, self.eps_of(x_t, said, alpha, sigma)
        return x_t - sigma * said, x_t + alpha * said  # alpha + sigma = 1

    @staticmethod
    def eps_of(x_t, x0, alpha, sigma):
        """The noise in x_t if the image is x0."""
        return (x_t - alpha * x0) / jnp.maximum(sigma, 1e-12)

    @functools.cached_property
    def posterior(self) -> "Posterior":
        """q(x_{t-1} | x_t, x_0) of neighbouring timesteps."""
        return Posterior.between(self.alpha_bar_T, np.append(1.0, self.alpha_bar_T[:-1]))


@dataclasses.dataclass(frozen=True)
class Posterior:
    """q(x_s | x_t, x_0) = N(of_x0 x_0 + of_x x_t, variance) for pairs s < t of timesteps, float64 arrays.

    The reverse step's variance lies between `variance` and `beta`; a learned one is interpolated between their logarithms.
    """

    of_x0: np.ndarray
    of_x: np.ndarray
    variance: np.ndarray
    beta: np.ndarray  # of the step from s to t

    @classmethod
    def between(cls, alpha_bar_N, alpha_bar_before_N) -> "Posterior":
        beta_N = 1 - alpha_bar_N / alpha_bar_before_N
        rest_N, rest_before_N = 1 - alpha_bar_N, 1 - alpha_bar_before_N
        return cls(
            of_x0=np.sqrt(alpha_bar_before_N) * beta_N / rest_N,
            of_x=np.sqrt(1 - beta_N) * rest_before_N / rest_N,
            variance=beta_N * rest_before_N / rest_N,
            beta=beta_N,
        )

    @property
    def log_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of `variance` and of `beta`; of the first step, whose variance is 0, the second step's is taken."""
        first = int(np.argmin(self.variance))
        variance_N = self.variance.copy()
        if variance_N[first] <= 0 and variance_N.size > 1:
            variance_N[first] = np.sort(variance_N)[1]
        return np.log(np.maximum(variance_N, 1e-20)), np.log(self.beta)


def betas(schedule: str, T: int) -> np.ndarray:
    """(T,) float64. Where the papers' constants are for 1000 steps, other numbers keep the same noise at the end."""
    if schedule == "linear":
        return np.minimum(np.linspace(1e-4, 0.02, T) * (1000 / T), 0.999)
    if schedule == "scaled_linear":  # latent diffusion's "linear": linear in the root
        return np.minimum(np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2 * (1000 / T), 0.999)
    if schedule == "cosine":
        alpha_bar = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        i_T = np.arange(T)
        return np.minimum(1 - alpha_bar((i_T + 1) / T) / alpha_bar(i_T / T), 0.999)
    raise ValueError(f"{schedule} has no betas")


def rescale_to_zero_snr(alpha_bar_T: np.ndarray) -> np.ndarray:
    """sqrt(abar) shifted and scaled, so that the last is 0 and the first as it was (Lin et al. 2023, arXiv:2305.08891)."""
    root_T = np.sqrt(alpha_bar_T)
    return ((root_T - root_T[-1]) * root_T[0] / (root_T[0] - root_T[-1])) ** 2


def over_image(x_B):
    """(B, 1, 1, 1), to multiply images with."""
    return x_B[:, None, None, None]
