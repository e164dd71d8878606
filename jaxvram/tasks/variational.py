"""The variational bound of a diffusion model whose variance is learned (Nichol & Dhariwal 2021, arXiv:2102.09672, 3.1).

L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, L_0 = -log p(x_0 | x_1), bits a dimension. The mean of p is
not differentiated here: the plain loss teaches it, this one the variance alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.sample.noise import Noise, over_image

LEVELS = 255  # steps of a pixel over [-1, 1]; the published code uses them for latents too


def bound_in_bits(noise: Noise, x0, x_t, t_B, x0_foreseen, fraction):
    """(B,) bits a dimension of timestep t.

    Args:
      noise: a schedule of whole timesteps.
      x0, x_t: (B, H, W, C).
      x0_foreseen: x_0 as the network has it.
      fraction: where log variance stands between its bounds, (B, H, W, C); 0: the lower.
    """
    posterior = noise.posterior
    low_T, high_T = posterior.log_bounds
    of_t = lambda table_T: over_image(jnp.asarray(table_T, jnp.float32)[t_B])
    log_variance = fraction * of_t(high_T) + (1 - fraction) * of_t(low_T)
    mean_of = lambda x0: of_t(posterior.of_x0) * x0 + of_t(posterior.of_x) * x_t
    mean = jax.lax.stop_gradient(mean_of(x0_foreseen))
    kl = normal_kl(mean_of(x0), of_t(low_T), mean, log_variance)
    nats = jnp.where(over_image(t_B) == 0, -discretised_log_likelihood(x0, mean, 0.5 * log_variance), kl)
    return nats.mean((1, 2, 3)) / np.log(2)


def normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N_1 || N_2) in nats, element by element."""
    ratio = jnp.exp(log_variance_1 - log_variance_2)
    apart = jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 - 1 + ratio + apart)


def discretised_log_likelihood(x, mean, log_std):
    """log of the probability that a Gaussian gives to the pixel value of x, one of 256 in [-1, 1] (Ho et al. 2020, 3.3)."""
    inverse_std = jnp.exp(-log_std)
    cdf_at = lambda edge: _normal_cdf((x - mean + edge) * inverse_std)
    above, below = cdf_at(1 / LEVELS), cdf_at(-1 / LEVELS)
    log = lambda p: jnp.log(jnp.maximum(p, 1e-12))
    return jnp.where(x < -0.999, log(above), jnp.where(x > 0.999, log(1 - below), log(above - below)))


def _normal_cdf(x):
    """The tanh form (Page 1977) that the published bounds were computed with."""
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
