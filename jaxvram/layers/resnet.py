"""Residual blocks of convolutions, and steps between resolutions: what U-Nets and their autoencoders are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.layers.conv import Conv
from jaxvram.layers.group_norm import GroupNorm
from jaxvram.layers.linear import Linear, fan_in_uniform


class ResBlock(nn.Module):
    """h = conv1(silu(norm1(x))) + W silu(t);  y = skip(x) + conv2(dropout(silu(norm2(h)))), 3 x 3 convolutions.

    `skip` is a matrix over channels where their number changes. Without t_BxE there is no W. x may be several images, whose
    channels are then side by side: joined here, within the block, they are no third copy to keep for the backward pass.
    """

    features: int
    groups: int = 32
    epsilon: float = 1e-5
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32
    out_init: nn.initializers.Initializer = fan_in_uniform()  # of conv2; zeros: the block starts as the identity

    @nn.compact
    def __call__(self, x_BxHxWxC, t_BxE=None, deterministic: bool = True):
        if isinstance(x_BxHxWxC, tuple):
            x_BxHxWxC = jnp.concatenate(x_BxHxWxC, axis=-1)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = lambda name: Linear(self.features, kernel_init=fan_in_uniform(), **dtypes, name=name)
        norm = lambda name: GroupNorm(self.groups, self.epsilon, silu=True, **dtypes, name=name)
        h = Conv(self.features, **dtypes, name="conv1")(norm("norm1")(x_BxHxWxC))
        if t_BxE is not None:
            h += dense("t_proj")(jax.nn.silu(t_BxE))[:, None, None]
        h = nn.Dropout(self.dropout)(norm("norm2")(h), deterministic=deterministic)
        h = Conv(self.features, kernel_init=self.out_init, **dtypes, name="conv2")(h)
        skip = dense("skip") if x_BxHxWxC.shape[-1] != self.features else (lambda x: x.astype(self.dtype))
        return skip(x_BxHxWxC) + h


class Downsample(nn.Module):
    """Half the height and width: a 3 x 3 convolution at every other place.

    padding (1, 1): as U-Nets have it; (0, 1), a row below and a column on the right only: as latent diffusion's autoencoder.
    """

    features: int
    padding: tuple[int, int] = (1, 1)
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Conv(self.features, stride=2, padding=self.padding, **dtypes, name="conv")(x_BxHxWxC)


class Upsample(nn.Module):
    """Twice the height and width: every pixel four times, then a 3 x 3 convolution."""

    features: int
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC):
        x = jnp.repeat(jnp.repeat(x_BxHxWxC, 2, axis=1), 2, axis=2)
        return Conv(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(x)
