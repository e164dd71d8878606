"""Convolutions over images, channels last."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.layers.linear import fan_in_uniform

ZEROS = nn.initializers.zeros


class Conv(nn.Module):
    """y = conv(x, kernel) + bias in `dtype`, zeros round the border; a kernel of `size` x `size` x in x out.

    Kernels start as torch.nn.Conv2d's do, U(-b, b) with b = 1 / sqrt(fan in); biases at 0.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)  # rows above and below, columns left and right
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = fan_in_uniform()

    @nn.compact
    def __call__(self, x_BxHxWxC):
        shape = (self.size, self.size, x_BxHxWxC.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype).astype(self.dtype)
        bias_F = self.param("bias", ZEROS, (self.features,), self.param_dtype).astype(self.dtype)
        return convolve(x_BxHxWxC.astype(self.dtype), kernel, self.stride, self.padding) + bias_F


def convolve(x_BxHxWxC, kernel_NxNxCxF, stride: int = 1, padding: tuple[int, int] = (1, 1)):
    """The sum over the window; `padding` zeros before and after, along height and width alike."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x_BxHxWxC, kernel_NxNxCxF, (stride, stride), (padding, padding), dimension_numbers=layout
    )
