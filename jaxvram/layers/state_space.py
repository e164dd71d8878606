"""What Mamba-1 and Mamba-2 share: the convolution, and what step sizes start from."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.kernels.causal_conv import causal_conv


def step_bias(low: float = 1e-3, high: float = 0.1, floor: float = 1e-4):
    """softplus^-1 of step sizes that are uniform in their logarithm between `low` and `high`."""

    def init(key, shape, dtype=jnp.float32):
        delta = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(low), jnp.log(high)))
        delta = jnp.maximum(delta, floor)
        return delta + jnp.log(-jnp.expm1(-delta))

    return init


class CausalConv(nn.Module):
    """silu of a causal convolution of each channel (kernels/causal_conv.py)."""

    width: int
    param_dtype: str
    kernels: str = "auto"  # implementation of kernels/causal_conv.py

    @nn.compact
    def __call__(self, x_BxTxE, tail_BxVxE, resets_BxT):
        E, bound = x_BxTxE.shape[-1], self.width**-0.5  # torch.nn.Conv1d's default: its fan in is the width
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        kernel_WxE = self.param("kernel", uniform, (self.width, E), self.param_dtype)
        bias_E = self.param("bias", uniform, (E,), self.param_dtype)
        return causal_conv(x_BxTxE, kernel_WxE, bias_E, tail_BxVxE, resets_BxT, implementation=self.kernels)
