"""Normalisation, in fp32 whatever the compute dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * scale [+ bias] over the last axis (Ba et al. 2016, arXiv:1607.06450).

    Two passes: the variance is the mean of squared deviations, as in PyTorch; E[x^2] - E[x]^2 loses digits in fp32.
    """

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_xD):
        D = x_xD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (D,), self.param_dtype)
        x32_xD = x_xD.astype(jnp.float32)
        centred_xD = x32_xD - x32_xD.mean(-1, keepdims=True)
        variance_x1 = jnp.square(centred_xD).mean(-1, keepdims=True)
        y_xD = centred_xD * jax.lax.rsqrt(variance_x1 + self.epsilon) * scale_D
        if self.use_bias:
            y_xD += self.param("bias", nn.initializers.zeros, (D,), self.param_dtype)
        return y_xD.astype(self.dtype)
