"""The critic of an autoencoder: PatchGAN (Isola et al. 2017, arXiv:1611.07004), which says of each patch how real it is."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.layers.conv import Conv
from jaxvram.layers.group_norm import GroupNorm

WIDEST = 8  # times the first layer's channels
GROUPS = 32  # at the most, of 4 channels or more
SLOPE = 0.2  # of what is below 0


class Discriminator(nn.Module):
    """`layers` convolutions of 4 x 4 that halve the side, one that does not, and one to a number a patch.

    Norms are by groups and not by batches, so that an image is judged by itself: microbatches add up to one batch, and
    there is nothing to remember between steps.
    """

    width: int = 64
    layers: int = 3
    dtype: str = "bfloat16"
    param_dtype: str = "float32"

    @property
    def least_side(self) -> int:
        """Pixels of the smallest image for which a patch is left."""
        return 3 * 2**self.layers

    @nn.compact
    def __call__(self, x_BxHxWxC):
        """(B, h, w, 1) in fp32: above 0 for what looks real."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(Conv, size=4, padding=(1, 1), kernel_init=nn.initializers.normal(0.02), **dtypes)
        x = x_BxHxWxC
        for i in range(self.layers + 1):
            features = self.width * min(2**i, WIDEST)
            x = conv(features, stride=2 if i < self.layers else 1, name=f"conv_{i}")(x)
            if i:
                x = GroupNorm(math.gcd(max(1, features // 4), GROUPS), **dtypes, name=f"norm_{i}")(x)
            x = jax.nn.leaky_relu(x, SLOPE)
        return conv(1, name="out")(x).astype(jnp.float32)
