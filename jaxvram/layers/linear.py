"""Matrix products with parameters."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp


class Linear(nn.Module):
    """y = x W [+ b] over the last axis, in `dtype`."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x_xD):
        kernel_DxF = self.param("kernel", self.kernel_init, (x_xD.shape[-1], self.features), self.param_dtype)
        y_xF = product(x_xD.astype(self.dtype), kernel_DxF.astype(self.dtype))
        if self.use_bias:
            y_xF += self.param("bias", self.bias_init, (self.features,), self.param_dtype).astype(self.dtype)
        return y_xF


class SplitLinear(nn.Module):
    """The columns of x W in parts, one kernel for all, no bias.

    As one product the parts would be copied out of it, and lie in memory twice for as long as any of them is needed.
    """

    parts: tuple[int, ...]  # how many columns each has
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_xD):
        shape = x_xD.shape[-1], sum(self.parts)
        kernel_DxF = self.param("kernel", self.kernel_init, shape, self.param_dtype).astype(self.dtype)
        ends = list(itertools.accumulate(self.parts))[:-1]
        return [product(x_xD.astype(self.dtype), part_DxP) for part_DxP in jnp.split(kernel_DxF, ends, axis=1)]


def fan_in_uniform(scale: float = 1.0):
    """U(-b, b), b = scale / sqrt(fan in): torch.nn.Linear's default, for kernels (in, out)."""
    return nn.initializers.variance_scaling(scale**2 / 3, "fan_in", "uniform")


def product(x_xD, w_DxF):
    """x W over the last axis of x; every other is flattened first.

    The gradient of W is then one product of two matrices; over (B, T, D), XLA:CPU writes both out transposed.
    """
    return _product(x_xD.reshape(-1, x_xD.shape[-1]), w_DxF).reshape(*x_xD.shape[:-1], -1)


@jax.custom_vjp
def _product(x_NxD, w_DxF):
    return x_NxD @ w_DxF


def _forward(x, w):
    """Keeps x for the gradient of W and W for that of x, each only where that gradient is asked for."""
    return x.value @ w.value, (x.value if w.perturbed else None, w.value if x.perturbed else None)


def _backward(residuals, g_NxF):
    """The gradient of W first, after which x can go, then that of x: XLA would wait with the former until the layer ends."""
    x_NxD, w_DxF = residuals
    if isinstance(g_NxF, jax.custom_derivatives.SymbolicZero):
        return None, None
    dw_DxF = None if x_NxD is None else x_NxD.T @ g_NxF
    if w_DxF is None:
        return None, dw_DxF
    if dw_DxF is not None:
        dw_DxF, g_NxF = jax.lax.optimization_barrier((dw_DxF, g_NxF))
    return g_NxF @ w_DxF.T, dw_DxF


_product.defvjp(_forward, _backward, symbolic_zeros=True)
