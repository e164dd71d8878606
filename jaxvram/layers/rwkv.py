"""What RWKV's generations share: the frame, a layer's state, the norm of heads, channel mixing and starting ratios."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.layers.embeddings import Embed, Head, padded_rows
from jaxvram.layers.linear import Linear
from jaxvram.layers.norms import LayerNorm, layer_norm
from jaxvram.layers.recurrent_lm import RecurrentLM
from jaxvram.layers.stack import Stack
from jaxvram.layers.token_shift import mixture, token_shift

orthogonal = nn.initializers.orthogonal
HEAD_EPSILON = 64e-5  # of the norm of what a head reads


class RWKVState(flax.struct.PyTreeNode):
    """What a layer of RWKV-5, 6 or 7 remembers: 2 D sizeof(dtype) + 4 D N bytes a sequence, however long it was."""

    att_BxD: jax.Array  # the last token as att read it
    s_BxHxNxN: jax.Array  # fp32, values x keys
    ffn_BxD: jax.Array  # the last token as ffn read it


class RWKVBlock(nn.Module):
    """x += att(ln1 x), x += ffn(ln2 x), of a generation's own time mixing and channel mixing."""

    cfg: Any
    layer: Any = 0  # its place, which its starting weights depend on
    time_mix: ClassVar[type[nn.Module]]  # (z, state, resets) -> (att, (the last token, the recurrence's state))
    channel_mix: ClassVar[type[nn.Module]]  # (z, the token before the first, resets) -> (ffn, the last token)

    @nn.compact
    def __call__(self, x_BxTxD, state, resets_BxT, deterministic: bool = True):
        norm = functools.partial(LayerNorm, dtype=self.cfg.dtype, param_dtype=self.cfg.param_dtype)
        att, ffn = self.time_mix(self.cfg, self.layer, name="att"), self.channel_mix(self.cfg, self.layer, name="ffn")
        y_BxTxD, (att_BxD, s) = att(norm(name="ln1")(x_BxTxD), state, resets_BxT)
        x_BxTxD = x_BxTxD + y_BxTxD
        y_BxTxD, ffn_BxD = ffn(norm(name="ln2")(x_BxTxD), state.ffn_BxD if state else None, resets_BxT)
        return x_BxTxD + y_BxTxD, type(state)(att_BxD, s, ffn_BxD) if state else None


class RWKVLM(RecurrentLM):
    """ln0 behind the table, layers that start from weights of their place, LayerNorm before a head of its own."""

    table_range = 1e-4  # a fresh table is uniform within +- this

    def setup(self):
        cfg = self.cfg
        dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        table = padded_rows(cfg.vocab_size, lambda *args: jax.random.uniform(*args, -self.table_range, self.table_range))
        self.embedding = Embed(cfg.table_rows, cfg.n_embd, table, jnp.float32, cfg.param_dtype)
        self.ln0, self.norm_f = LayerNorm(**dtypes), LayerNorm(**dtypes)
        self.layers = self.stack()
        gain = 0.5 * max(1.0, cfg.vocab_size / cfg.n_embd) ** 0.5
        self.lm_head = Head(cfg.vocab_size, cfg.table_rows, cfg.n_embd, cfg.param_dtype, init=orthogonal(gain))

    def stack(self) -> Stack:
        cfg = self.cfg
        return Stack(self.block, cfg, cfg.n_layer, cfg.remat, cfg.unroll_layers, first=0)

    def embed(self, tokens_BxT):
        """The stream before the first layer, in the compute dtype."""
        return self.ln0(self.embedding(tokens_BxT))

    def empty_state(self, batch: int) -> RWKVState:
        cfg = self.cfg
        last_BxD, N = jnp.zeros((batch, cfg.n_embd), cfg.dtype), cfg.head_dim
        return RWKVState(last_BxD, jnp.zeros((batch, cfg.heads, N, N), jnp.float32), last_BxD)


def check_sizes(cfg, *may_be_zero: int) -> None:
    """Raises a UserError unless a configuration's sizes make a model."""
    sizes = (cfg.block_size, cfg.n_layer, cfg.n_embd, cfg.head_dim, cfg.vocab_multiple)
    if min(sizes) < 1 or min(cfg.d_ffn, cfg.vocab_size, *may_be_zero) < 0:
        raise UserError("model: every size must be at least 1, and none of d_* negative")
    if cfg.n_embd % cfg.head_dim:
        raise UserError(f"model.head_dim={cfg.head_dim} does not divide n_embd={cfg.n_embd}")


def ratios(cfg, layer):
    """(how deep, 0 to 1; what is left, 1 to almost 0; channels, 0 to 1 without the end)."""
    channel_D = jnp.arange(cfg.n_embd, dtype=jnp.float32) / cfg.n_embd
    return layer / max(cfg.n_layer - 1, 1), 1.0 - layer / cfg.n_layer, channel_D


class HeadNorm(nn.Module):
    """Each head's numbers less their mean, of variance 1, times a scale that starts larger the deeper the layer."""

    cfg: Any
    layer: Any = 0

    @nn.compact
    def __call__(self, y_BxTxHxN):
        cfg, shape = self.cfg, y_BxTxHxN.shape[-2:]
        start = lambda key, shape, dtype: jnp.broadcast_to(((1 + self.layer) / cfg.n_layer) ** 0.7, shape).astype(dtype)
        scale_D = self.param("scale", start, (cfg.n_embd,), cfg.param_dtype)
        bias_D = self.param("bias", nn.initializers.zeros, (cfg.n_embd,), cfg.param_dtype)
        return layer_norm(y_BxTxHxN, scale_D.reshape(shape), bias_D.reshape(shape), HEAD_EPSILON, cfg.dtype)


class ChannelMix(nn.Module):
    """z -> ffn = s(R z_r) (V relu(K z_k)^2), s the sigmoid, and the last token: RWKV-4, 5 and 6.

    z_k and z_r are mixtures of z with the token before. RWKV-4 and 5 have the share of the token itself as a parameter,
    time_mix_*; RWKV-6 that of the token before, time_maa_*.
    """

    cfg: Any
    layer: Any = 0
    maa: bool = False
    power: int = 1  # of what is left of the depth, by which shares start
    gain = 1.0  # of a fresh K

    @nn.compact
    def __call__(self, z_BxTxD, last_BxD, resets_BxT):
        cfg, D = self.cfg, z_BxTxD.shape[-1]
        dense = functools.partial(Linear, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        delta_BxTxD, last_BxD = token_shift(z_BxTxD, last_BxD, resets_BxT)
        mixed = lambda name: mixture(z_BxTxD, delta_BxTxD, self._share(name))
        h_BxTxF = jnp.square(jax.nn.relu(dense(cfg.hidden, kernel_init=orthogonal(self.gain), name="key")(mixed("k"))))
        y_BxTxD = dense(D, kernel_init=nn.initializers.zeros, name="value")(h_BxTxF)
        r_BxTxD = dense(D, kernel_init=nn.initializers.zeros, name="receptance")(mixed("r"))
        return jax.nn.sigmoid(r_BxTxD) * y_BxTxD, last_BxD

    def _share(self, name: str):
        """Of the token before, a channel."""
        _, left, channel_D = ratios(self.cfg, self.layer)
        start_D = channel_D ** (left**self.power)
        if self.maa:
            return self.param(f"time_maa_{name}", lambda key: 1 - start_D)
        return 1 - self.param(f"time_mix_{name}", lambda key: start_D)
