"""Normalisation, in fp32 whatever the compute dtype."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * scale [+ bias] over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD):
        D = x_BxTxD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (D,), self.param_dtype)
        bias_D = self.param("bias", nn.initializers.zeros, (D,), self.param_dtype) if self.use_bias else None
        return layer_norm(x_BxTxD, scale_D, bias_D, self.epsilon, self.dtype)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD):
        scale_D = self.param("scale", nn.initializers.ones, (x_BxTxD.shape[-1],), self.param_dtype)
        return rms_norm(x_BxTxD, scale_D, self.epsilon, self.dtype)


class ModulatedLayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * (1 + scale) + shift, each sample with its own (Peebles & Xie 2023, 3.2, adaLN)."""

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, x_BxTxD, shift_BxD, scale_BxD):
        one_more_BxD = 1 + scale_BxD.astype(jnp.float32)
        return layer_norm(x_BxTxD, one_more_BxD[:, None], shift_BxD[:, None], self.epsilon, self.dtype)


def layer_norm(x_BxTxD, scale_D, bias_D, epsilon, dtype):
    """The function of the modules above; scale and bias broadcast against x, bias may be None."""
    return _norm(x_BxTxD, scale_D, bias_D, epsilon, dtype, True)


def rms_norm(x_BxTxD, scale_D, epsilon, dtype):
    """The same without a mean to take off, and without a bias."""
    return _norm(x_BxTxD, scale_D, None, epsilon, dtype, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x_BxTxD, scale_D, bias_D, epsilon, dtype, centred):
    """The variance is the mean of squared deviations, as in PyTorch: E[x^2] - E[x]^2 loses digits in fp32.

    Backward keeps x as it came and two fp32 numbers a token; JAX's own would keep x - mean in fp32, and takes a tenth
    longer on a CPU.
    """
    return _forward(x_BxTxD, scale_D, bias_D, epsilon, dtype, centred)[0]


def _forward(x_BxTxD, scale_D, bias_D, epsilon, dtype, centred):
    x32_BxTxD = x_BxTxD.astype(jnp.float32)
    mean_BxTx1 = x32_BxTxD.mean(-1, keepdims=True) if centred else jnp.zeros((), jnp.float32)
    variance_BxTx1 = jnp.square(x32_BxTxD - mean_BxTx1).mean(-1, keepdims=True)
    rstd_BxTx1 = jax.lax.rsqrt(variance_BxTx1 + epsilon)
    y_BxTxD = (x32_BxTxD - mean_BxTx1) * rstd_BxTx1 * scale_D
    if bias_D is not None:
        y_BxTxD += bias_D
    return y_BxTxD.astype(dtype), (x_BxTxD, scale_D, bias_D, mean_BxTx1, rstd_BxTx1)


def _backward(epsilon, dtype, centred, residuals, g_BxTxD):
    """With n = (x - mean) rstd and h = g scale: dx = rstd (h - mean(h) - n mean(h n)), dscale = sum g n, dbias = sum g.

    Where the mean was not taken off, mean(h) is not either.
    """
    x_BxTxD, scale_D, bias_D, mean_BxTx1, rstd_BxTx1 = residuals
    g_BxTxD = g_BxTxD.astype(jnp.float32)
    n_BxTxD = (x_BxTxD.astype(jnp.float32) - mean_BxTx1) * rstd_BxTx1
    h_BxTxD = g_BxTxD * scale_D
    along_n_BxTx1 = (h_BxTxD * n_BxTxD).mean(-1, keepdims=True)
    across_BxTxD = h_BxTxD - h_BxTxD.mean(-1, keepdims=True) if centred else h_BxTxD
    dx_BxTxD = rstd_BxTx1 * (across_BxTxD - n_BxTxD * along_n_BxTx1)
    dscale_D = _sum_to(g_BxTxD * n_BxTxD, scale_D)
    dbias_D = None if bias_D is None else _sum_to(g_BxTxD, bias_D)
    return dx_BxTxD.astype(x_BxTxD.dtype), dscale_D, dbias_D


def _sum_to(g, of):
    """g added up over the axes along which `of` was repeated."""
    shape = (1,) * (g.ndim - of.ndim) + of.shape
    repeated = tuple(i for i, (n, m) in enumerate(zip(shape, g.shape, strict=True)) if n == 1 and m > 1)
    return g.sum(repeated, keepdims=True).reshape(of.shape).astype(of.dtype)


_norm.defvjp(_forward, _backward)
