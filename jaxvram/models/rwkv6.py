"""RWKV-6, Finch (Peng et al. 2024, arXiv:2404.05892): RWKV-5 with a decay and mixtures that each token makes for itself.

Of the stream x:  x += att(ln1 x), x += ffn(ln2 x); the first layer's stream is ln0 of the table. In att, of z = ln1 x and
the token before, shift(z), five mixtures z_* = z + (shift(z) - z) (time_maa_* + m_*), of which, w1 and w2 being time_maa_w*,
  [m_w, m_k, m_v, m_r, m_g] = tanh(z_x w1) w2, for each of the five its own w2, and z_x = z + (shift(z) - z) time_maa_x;
  r = R z_r;  k = K z_k;  v = V z_v;  g = silu(G z_g)
  d = exp(-exp(time_decay + tanh(z_w time_decay_w1) time_decay_w2)), between 0 and 1
  y_t = S_{t-1} r_t + (sum_n r_t u k_t) v_t;  S_t = S_{t-1} diag(d_t) + v_t^T k_t, u = time_faaaa, for each of H heads of 64
  att = O (g groupnorm(y));  ffn = s(R' z_r) V' relu(K' z_k)^2, s the sigmoid, of mixtures by time_maa_* alone
Read: BlinkDL/RWKV-LM, RWKV-v5/src/model.py, 033ce84, whose names of parameters these are; time_maa of ffn starts as in later
copies of it (the third power). docs/rwkv.md says what differs.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.kernels.wkv6 import wkv6
from jaxvram.layers.linear import Linear, product
from jaxvram.layers.recurrent_lm import check_fields
from jaxvram.layers.rwkv import RWKVLM, ChannelMix, HeadNorm, RWKVBlock, RWKVState, check_sizes, orthogonal, ratios
from jaxvram.layers.token_shift import mixture, token_shift

# L, D: the published RWKV-6 World, and two small ones that the authors have of other generations
SIZES = {
    "0.1b": (12, 768),
    "0.4b": (24, 1024),
    "1.6b": (24, 2048),
    "3b": (32, 2560),
    "7b": (32, 4096),
}
MIXTURES = "wkvrg"  # in the order in which w1 and w2 have them


@dataclasses.dataclass(frozen=True)
class RWKV6Config:
    vocab_size: int = 65536  # V; 0: as many as the data has
    vocab_multiple: int = 1  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 512  # T of a training example; sampling and evaluation know no bound
    n_layer: int = 24  # L
    n_embd: int = 2048  # D
    head_dim: int = 64  # N
    d_ffn: int = 0  # width of the channel mixing; 0: 3.5 D, to a multiple of 32 below
    d_mix: int = 0  # rank of each mixture's part of w1 w2; 0: 32, and 64 from D = 4096
    d_decay: int = 0  # rank of time_decay_w1 time_decay_w2; 0: 64, and 128 from D = 4096
    reset_token: int = -1  # token that begins a document: nothing is remembered from before it; -1: none
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of the stream and of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of matrices, tables and norms; vectors and small matrices of att are fp32 always
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: recurrence and loss

    tie_head: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_sizes(self, self.d_mix, self.d_decay)

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def heads(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def hidden(self) -> int:
        return self.d_ffn or 7 * self.n_embd // 2 // 32 * 32

    @property
    def mix_rank(self) -> int:
        return self.d_mix or (64 if self.n_embd >= 4096 else 32)

    @property
    def decay_rank(self) -> int:
        return self.d_decay or (128 if self.n_embd >= 4096 else 64)


def _vectors(cfg: RWKV6Config, layer) -> dict:
    """The vectors that att starts from, by name."""
    depth, left, channel_D = ratios(cfg, layer)
    n_D = jnp.arange(cfg.n_embd)
    to_end_D = n_D / max(cfg.n_embd - 1, 1)
    vectors = {f"time_maa_{name}": 1 - channel_D**left for name in "xwk"}
    vectors |= {f"time_maa_{name}": 1 - channel_D ** (0.5 * left) for name in "rg"}
    return vectors | {
        "time_maa_v": 1 - (channel_D**left + 0.3 * depth),
        "time_decay": -6 + 5 * to_end_D ** (0.7 + 1.3 * depth),
        "time_faaaa": (depth * (1 - to_end_D) + 0.1 * ((n_D + 1) % 3 - 1)).reshape(cfg.heads, cfg.head_dim),
    }


def _about_zero(key, shape):
    return jax.random.uniform(key, shape, jnp.float32, -0.01, 0.01)


class TimeMix(nn.Module):
    """z -> att, and what is remembered after the last token."""

    cfg: RWKV6Config
    layer: Any = 0

    @nn.compact
    def __call__(self, z_BxTxD, state: RWKVState | None, resets_BxT):
        cfg, (B, T, D) = self.cfg, z_BxTxD.shape
        dense = functools.partial(Linear, D, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        delta_BxTxD, last_BxD = token_shift(z_BxTxD, state.att_BxD if state else None, resets_BxT)
        mixed = self._mixtures(z_BxTxD, delta_BxTxD)
        r_BxTxD = dense(kernel_init=orthogonal(1.0), name="receptance")(mixed["r"])
        k_BxTxD = dense(kernel_init=orthogonal(0.1), name="key")(mixed["k"])
        v_BxTxD = dense(kernel_init=orthogonal(1.0), name="value")(mixed["v"])
        heads = (x.reshape(B, T, cfg.heads, cfg.head_dim) for x in (r_BxTxD, self._log_decay(mixed["w"]), k_BxTxD, v_BxTxD))
        s_BxHxNxN = state.s_BxHxNxN if state else None
        y_BxTxHxN, s_BxHxNxN = wkv6(
            *heads, self._vector("time_faaaa"), s_BxHxNxN=s_BxHxNxN, resets_BxT=resets_BxT, implementation=cfg.kernels
        )
        y_BxTxD = HeadNorm(cfg, self.layer, name="ln_x")(y_BxTxHxN).reshape(B, T, D)
        y_BxTxD *= jax.nn.silu(dense(kernel_init=orthogonal(0.1), name="gate")(mixed["g"]))
        return dense(kernel_init=nn.initializers.zeros, name="output")(y_BxTxD), (last_BxD, s_BxHxNxN)

    def _vector(self, name: str):
        return self.param(name, lambda key: _vectors(self.cfg, self.layer)[name])

    def _mixtures(self, z_BxTxD, delta_BxTxD) -> dict:
        """By name."""
        cfg, D, R = self.cfg, z_BxTxD.shape[-1], self.cfg.mix_rank
        down_DxM = self.param("time_maa_w1", nn.initializers.zeros, (D, len(MIXTURES) * R), jnp.float32)
        up_5xRxD = self.param("time_maa_w2", _about_zero, (len(MIXTURES), R, D))
        first_BxTxD = mixture(z_BxTxD, delta_BxTxD, self._vector("time_maa_x"))
        h_BxTx5xR = jnp.tanh(product(first_BxTxD, down_DxM.astype(cfg.dtype))).reshape(*z_BxTxD.shape[:2], len(MIXTURES), R)
        m_5xBxTxD = jnp.einsum("btfr,frd->fbtd", h_BxTx5xR, up_5xRxD.astype(cfg.dtype))
        share = lambda i, name: self._vector(f"time_maa_{name}") + m_5xBxTxD[i].astype(jnp.float32)
        return {name: mixture(z_BxTxD, delta_BxTxD, share(i, name)) for i, name in enumerate(MIXTURES)}

    def _log_decay(self, z_w_BxTxD):
        cfg, D = self.cfg, z_w_BxTxD.shape[-1]
        down_DxR = self.param("time_decay_w1", nn.initializers.zeros, (D, cfg.decay_rank), jnp.float32)
        up_RxD = self.param("time_decay_w2", _about_zero, (cfg.decay_rank, D))
        h_BxTxR = jnp.tanh(product(z_w_BxTxD, down_DxR.astype(cfg.dtype)))
        own_BxTxD = product(h_BxTxR, up_RxD.astype(cfg.dtype)).astype(jnp.float32)
        return -jnp.exp(self._vector("time_decay") + own_BxTxD)


class MaaChannelMix(ChannelMix):
    maa: bool = True
    power: int = 3


class Block(RWKVBlock):
    time_mix, channel_mix = TimeMix, MaaChannelMix


class RWKV6(RWKVLM):
    """A language model of RWKV-6 layers."""

    block = Block
