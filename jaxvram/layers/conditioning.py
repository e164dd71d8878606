"""What a denoiser is told beside the image: how noisy it is, of which class, or what a text says."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.layers.embeddings import Embed
from jaxvram.layers.linear import Linear
from jaxvram.layers.mlp import ACTIVATIONS

FREQUENCIES = 256  # numbers that stand for a timestep, whatever the model's width


def timestep_features(t_B, features: int = FREQUENCIES):
    """[cos, sin] of t 10000^(-k / (features / 2)), (B, features) in fp32; t need not be whole."""
    half = features // 2
    omega_F = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
    angle_BxF = t_B.astype(jnp.float32)[:, None] * omega_F
    return jnp.concatenate([jnp.cos(angle_BxF), jnp.sin(angle_BxF)], axis=-1)


class TimestepEmbed(nn.Module):
    """Linear - SiLU - Linear of the features above; weights N(0, 0.02)."""

    width: int  # D
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t_B):
        return _two_matrices(self, timestep_features(t_B), jax.nn.silu)


def _two_matrices(of: nn.Module, x, activation):
    """fc2(activation(fc1(x))), parameters of the module `of`, as wide as it is; weights N(0, 0.02)."""
    init, dtypes = nn.initializers.normal(0.02), {"dtype": of.dtype, "param_dtype": of.param_dtype}
    dense = lambda name: Linear(of.width, kernel_init=init, **dtypes, name=name)
    return dense("fc2")(activation(dense("fc1")(x.astype(of.dtype))))


class LabelEmbed(nn.Module):
    """A row a class, N(0, 0.02), and one more, the last, for "no class": what guidance is measured from."""

    num_classes: int
    width: int  # D
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, labels_B):
        init = nn.initializers.normal(0.02)
        return Embed(self.num_classes + 1, self.width, init, self.dtype, self.param_dtype, name="table")(labels_B)


class CaptionEmbed(nn.Module):
    """Linear - GELU (tanh) - Linear: a text encoder's features to the width of the model; weights N(0, 0.02)."""

    width: int  # D
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, context_BxSxE):
        return _two_matrices(self, context_BxSxE, ACTIVATIONS["gelu_tanh"])
