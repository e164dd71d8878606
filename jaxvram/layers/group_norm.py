"""Normalisation over groups of channels of an image, in fp32 whatever the compute dtype."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class GroupNorm(nn.Module):
    """n = (x - mean) / sqrt(var + eps) over height, width and a group's channels; y = n scale + bias, then SiLU if asked.

    Wu & He 2018, arXiv:1803.08494. With SiLU it is what stands before every convolution of a U-Net and its autoencoder.
    """

    groups: int = 32
    epsilon: float = 1e-5
    silu: bool = False
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC):
        C = x_BxHxWxC.shape[-1]
        if C % self.groups:
            raise ValueError(f"GroupNorm: {C} channels do not divide into {self.groups} groups")
        scale_C = self.param("scale", nn.initializers.ones, (C,), self.param_dtype)
        bias_C = self.param("bias", nn.initializers.zeros, (C,), self.param_dtype)
        return group_norm(x_BxHxWxC, scale_C, bias_C, self.groups, self.epsilon, self.silu, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(x_BxHxWxC, scale_C, bias_C, groups: int, epsilon: float, silu: bool, dtype):
    """The function of the module above.

    Sums run over height and width first, a channel at a time, and only then over a group's channels: channels lie side by
    side in memory. Backward keeps x as it came and two fp32 numbers a group.
    """
    return _forward(x_BxHxWxC, scale_C, bias_C, groups, epsilon, silu, dtype)[0]


def _forward(x_BxHxWxC, scale_C, bias_C, groups, epsilon, silu, dtype):
    """The variance is the mean of squared deviations: E[x^2] - E[x]^2 loses digits in fp32."""
    x32 = x_BxHxWxC.astype(jnp.float32)
    mean_BxC = _over_group(x32.mean((1, 2)), groups)
    variance_BxC = _over_group(jnp.square(x32 - mean_BxC[:, None, None]).mean((1, 2)), groups)
    rstd_BxC = jax.lax.rsqrt(variance_BxC + epsilon)
    factor_BxC = rstd_BxC * scale_C
    y = (x32 - mean_BxC[:, None, None]) * factor_BxC[:, None, None] + bias_C.astype(jnp.float32)
    y = jax.nn.silu(y) if silu else y
    step = x_BxHxWxC.shape[-1] // groups
    return y.astype(dtype), (x_BxHxWxC, scale_C, bias_C, mean_BxC[:, ::step], rstd_BxC[:, ::step])


def _backward(groups, epsilon, silu, dtype, residuals, g_BxHxWxC):
    """With h = g scale: dx = rstd (h - mean(h) - n mean(h n)), means over a group; dscale = sum g n, dbias = sum g.

    SiLU's own factor goes into g first. On a GPU n and g are computed once for the sums and once for dx, from other operands
    as far as the compiler can see: it would keep them in between, in fp32. A CPU has the memory and not the time.
    """
    x, scale_C, bias_C, mean_BxG, rstd_BxG = residuals
    H, W, C = x.shape[1:]
    mean_BxC, rstd_BxC = (jnp.repeat(a, C // groups, axis=-1) for a in (mean_BxG, rstd_BxG))

    def n_and_g(x, g):
        n = (x.astype(jnp.float32) - mean_BxC[:, None, None]) * rstd_BxC[:, None, None]
        g = g.astype(jnp.float32)
        if not silu:
            return n, g
        y = n * scale_C + bias_C
        gate = jax.nn.sigmoid(y)
        return n, g * gate * (1 + y * (1 - gate))

    n, g = n_and_g(x, g_BxHxWxC)
    dbias_BxC, dscale_BxC = g.sum((1, 2)), (g * n).sum((1, 2))
    level_BxC = _over_group(dbias_BxC * scale_C, groups) / (H * W)
    along_BxC = _over_group(dscale_BxC * scale_C, groups) / (H * W)
    barrier = lambda *arrays: jax.lax.optimization_barrier(arrays)
    x, g, level_BxC, along_BxC = jax.lax.platform_dependent(
        x, g_BxHxWxC, level_BxC, along_BxC, cuda=barrier, default=lambda *arrays: arrays
    )
    n, g = n_and_g(x, g)
    dx = rstd_BxC[:, None, None] * (g * scale_C - level_BxC[:, None, None] - n * along_BxC[:, None, None])
    return dx.astype(x.dtype), dscale_BxC.sum(0).astype(scale_C.dtype), dbias_BxC.sum(0).astype(bias_C.dtype)


def _over_group(a_BxC, groups: int):
    """Each channel's number replaced by the mean of its group's."""
    B, C = a_BxC.shape
    return jnp.repeat(a_BxC.reshape(B, groups, C // groups).mean(-1), C // groups, axis=-1)


group_norm.defvjp(_forward, _backward)
