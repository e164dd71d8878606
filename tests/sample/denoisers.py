"""Denoisers to sample from: a small network that PyTorch has too, and the best there is for normal data."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (2, 4, 4, 3)
RANDOM = np.random.RandomState(0)
MATRIX_CxC, PLACE_CxC = RANDOM.normal(0, 0.5, (2, 3, 3))
BIAS_C, SLOPE_C = RANDOM.normal(0, 0.5, (2, 3))
KEY = jax.random.key(5)
START = RANDOM.normal(0, 1, SHAPE).astype(np.float32)
PREDICTIONS = ("epsilon", "v", "x0")

# Data of which every number is normal with this mean and standard deviation: the best denoiser is known.
MEAN, STD = 0.3, 0.5


def network(xp, x, share):
    """A smooth denoiser, the same in JAX and PyTorch: (prediction, variance's place in [-1, 1]); share: t / T."""
    mix = lambda matrix: x @ xp.asarray(matrix, dtype=x.dtype)
    of_t = xp.asarray(BIAS_C, dtype=x.dtype) + share * xp.asarray(SLOPE_C, dtype=x.dtype)
    return xp.tanh(mix(MATRIX_CxC) + of_t), xp.sin(mix(PLACE_CxC) + of_t)


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
