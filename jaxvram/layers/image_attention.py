"""Attention among the places of an image, and from them to a text."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxvram.kernels.attention import attention
from jaxvram.layers.group_norm import GroupNorm
from jaxvram.layers.linear import Linear, fan_in_uniform
from jaxvram.layers.mlp import GATED
from jaxvram.layers.norms import LayerNorm


class Attention(nn.Module):
    """Every token of x looks at every token of a context, or of x itself; matrices for q, k, v and the result."""

    heads: int
    qkv_bias: bool = False
    q_init: nn.initializers.Initializer = fan_in_uniform()
    kv_init: nn.initializers.Initializer = fan_in_uniform()
    out_init: nn.initializers.Initializer = fan_in_uniform()
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    kernels: str = "auto"  # implementation of kernels/attention.py

    @nn.compact
    def __call__(self, x_BxTxD, context_BxSxE=None, length_B=None):
        """(B, T, D). length_B: how many tokens of each context count; the rest is padding. None: all."""
        B, T, D = x_BxTxD.shape
        source = x_BxTxD if context_BxSxE is None else context_BxSxE

        def dense(name, use_bias, init):
            return Linear(D, use_bias, self.dtype, self.param_dtype, kernel_init=init, name=name)

        def heads(name, init, a):
            return dense(name, self.qkv_bias, init)(a).reshape(*a.shape[:2], self.heads, D // self.heads)

        q = heads("c_q", self.q_init, x_BxTxD)
        k, v = heads("c_k", self.kv_init, source), heads("c_v", self.kv_init, source)
        y = attention(q, k, v, causal=False, key_lengths_B=length_B, implementation=self.kernels)
        return dense("c_proj", True, self.out_init)(y.reshape(B, T, D))


class ImageAttention(nn.Module):
    """x + attn(norm(x)), a GroupNorm, each place a token: pixel U-Nets (Ho et al. 2020) and the autoencoder's middle."""

    heads: int
    groups: int = 32
    epsilon: float = 1e-5
    out_init: nn.initializers.Initializer = fan_in_uniform()
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_BxHxWxC):
        B, H, W, C = x_BxHxWxC.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h_BxTxC = GroupNorm(self.groups, self.epsilon, **dtypes, name="norm")(x_BxHxWxC).reshape(B, H * W, C)
        attn = Attention(self.heads, True, out_init=self.out_init, **dtypes, kernels=self.kernels, name="attn")
        return x_BxHxWxC + attn(h_BxTxC).reshape(B, H, W, C)


class ImageTransformer(nn.Module):
    """A transformer block on the places of an image, with a text to look at (Rombach et al. 2022, arXiv:2112.10752, 3.3).

    h = W_in norm(x);  h += attn(ln(h));  h += cross_attn(ln(h), text);  h += mlp(ln(h));  x + W_out h;  a gated MLP of 4 C.
    """

    heads: int
    groups: int = 32
    out_init: nn.initializers.Initializer = fan_in_uniform()  # of W_out
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_BxHxWxC, context_BxSxE, length_B=None):
        B, H, W, C = x_BxHxWxC.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = lambda name, init: Linear(C, kernel_init=init, **dtypes, name=name)
        norm = lambda name: LayerNorm(**dtypes, name=name)
        attn = lambda name: Attention(self.heads, **dtypes, kernels=self.kernels, name=name)
        h = GroupNorm(self.groups, 1e-6, **dtypes, name="norm")(x_BxHxWxC).reshape(B, H * W, C)
        h = dense("proj_in", fan_in_uniform())(h)
        h += attn("attn")(norm("ln_1")(h))
        h += attn("cross_attn")(norm("ln_2")(h), context_BxSxE, length_B)
        h += GatedMLP(4 * C, **dtypes, name="mlp")(norm("ln_3")(h))
        return x_BxHxWxC + dense("proj_out", self.out_init)(h).reshape(B, H, W, C)


class GatedMLP(nn.Module):
    """y = W_proj ((W_fc x) gelu(W_gate x)), with biases: GEGLU (Shazeer 2020, arXiv:2002.05202)."""

    hidden: int
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD):
        def dense(features, name):
            init = fan_in_uniform()
            return Linear(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name)

        u = GATED["gelu"](dense(self.hidden, "c_gate")(x_BxTxD), dense(self.hidden, "c_fc")(x_BxTxD))
        return dense(x_BxTxD.shape[-1], "c_proj")(u)
