"""RWKV-5, Eagle (Peng et al. 2024, arXiv:2404.05892): each head keeps a matrix of keys to values that decays key by key.

Of the stream x:  x += att(ln1 x), x += ffn(ln2 x); the first layer's stream is ln0 of the table. In att, of z = ln1 x and
each of four mixtures z_* = z m_* + shift(z) (1 - m_*), of which shift(z) is the token before and m_* = time_mix_*:
  r = R z_r;  k = K z_k;  v = V z_v;  g = silu(G z_g);  d = exp(-exp(time_decay)), between 0 and 1, the same for all tokens
  y_t = S_{t-1} r_t + (sum_n r_t u k_t) v_t;  S_t = S_{t-1} diag(d) + v_t^T k_t            for each of H heads of N = 64
  att = O (g groupnorm(y));  ffn = s(R' z_r) V' relu(K' z_k)^2, s the sigmoid

  version  gate g  d and u        u                width of ffn
  5.0      no      one a head     exp(time_first)  4 D
  5.1      yes     one a head     time_faaaa       3.5 D, to a multiple of 32 below
  5.2      yes     one a channel  time_faaaa       likewise
Read: BlinkDL/RWKV-LM, RWKV-v5/src/model.py, 033ce84 (5.2), and copies of its earlier form (5.0, 5.1), whose names of
parameters these are; rwkv 0.8.32, which runs all three; the width in 5.0 is that of BBuf/RWKV-World-HF-Tokenizer.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.kernels.wkv6 import wkv6
from jaxvram.layers.linear import Linear
from jaxvram.layers.recurrent_lm import check_fields
from jaxvram.layers.rwkv import RWKVLM, ChannelMix, HeadNorm, RWKVBlock, RWKVState, check_sizes, orthogonal, ratios
from jaxvram.layers.token_shift import mixture, token_shift

VERSIONS = ("5.0", "5.1", "5.2")
# version, L, D: the published RWKV-5 World
SIZES = {
    "0.1b": ("5.0", 12, 768),
    "0.4b": ("5.2", 24, 1024),
    "1.5b": ("5.2", 24, 2048),
    "3b": ("5.2", 32, 2560),
    "7b": ("5.2", 32, 4096),
}


@dataclasses.dataclass(frozen=True)
class RWKV5Config:
    version: str = "5.2"  # 5.0 | 5.1 | 5.2
    vocab_size: int = 65536  # V; 0: as many as the data has
    vocab_multiple: int = 1  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 512  # T of a training example; sampling and evaluation know no bound
    n_layer: int = 24  # L
    n_embd: int = 1024  # D
    head_dim: int = 64  # N
    d_ffn: int = 0  # width of the channel mixing; 0: as the version has it
    reset_token: int = -1  # token that begins a document: nothing is remembered from before it; -1: none
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of the stream and of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of matrices, tables and norms; vectors of att and ffn are fp32 always
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: recurrence and loss

    tie_head: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_sizes(self)
        if self.version not in VERSIONS:
            raise UserError(f"model.version={self.version!r} is none of {', '.join(VERSIONS)}")

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def heads(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def hidden(self) -> int:
        return self.d_ffn or (4 * self.n_embd if self.version == "5.0" else 7 * self.n_embd // 2 // 32 * 32)

    @property
    def mixtures(self) -> str:
        return "rkv" if self.version == "5.0" else "rkvg"

    @property
    def decay_shape(self) -> tuple[int, ...]:
        """Of time_decay and of the bonus."""
        return (self.heads, self.head_dim) if self.version == "5.2" else (self.heads,)

    @property
    def bonus(self) -> str:
        return "time_first" if self.version == "5.0" else "time_faaaa"


def _vectors(cfg: RWKV5Config, layer) -> dict:
    """The vectors that att starts from, by name."""
    depth, left, channel_D = ratios(cfg, layer)
    n = jnp.arange(cfg.n_embd if cfg.version == "5.2" else cfg.heads)
    to_end = n / jnp.maximum(n[-1], 1)
    zigzag = 0.1 * ((n + 1) % 3 - 1) if cfg.version == "5.2" else 0
    bonus = jnp.full(n.shape, -3.0) if cfg.version == "5.0" else depth * (1 - to_end) + zigzag
    return {
        "time_mix_r": channel_D ** (0.5 * left),
        "time_mix_k": channel_D**left,
        "time_mix_v": channel_D**left + 0.3 * depth,
        "time_mix_g": channel_D ** (0.5 * left),
        "time_decay": (-6 + 5 * to_end ** (0.7 + 1.3 * depth)).reshape(cfg.decay_shape),
        cfg.bonus: bonus.reshape(cfg.decay_shape),
    }


class TimeMix(nn.Module):
    """z -> att, and what is remembered after the last token."""

    cfg: RWKV5Config
    layer: Any = 0

    @nn.compact
    def __call__(self, z_BxTxD, state: RWKVState | None, resets_BxT):
        cfg, (B, T, D) = self.cfg, z_BxTxD.shape
        vector = lambda name: self.param(name, lambda key: _vectors(cfg, self.layer)[name])
        of_all_keys = lambda x: jnp.broadcast_to(x.reshape(cfg.heads, -1), (cfg.heads, cfg.head_dim))
        dense = functools.partial(Linear, D, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        delta_BxTxD, last_BxD = token_shift(z_BxTxD, state.att_BxD if state else None, resets_BxT)
        mixed = {name: mixture(z_BxTxD, delta_BxTxD, 1 - vector(f"time_mix_{name}")) for name in cfg.mixtures}
        r_BxTxD = dense(kernel_init=orthogonal(1.0), name="receptance")(mixed["r"])
        k_BxTxD = dense(kernel_init=orthogonal(0.1), name="key")(mixed["k"])
        v_BxTxD = dense(kernel_init=orthogonal(1.0), name="value")(mixed["v"])
        log_decay_HxN = of_all_keys(-jnp.exp(vector("time_decay")))
        bonus = vector(cfg.bonus)
        u_HxN = of_all_keys(jnp.exp(bonus) if cfg.bonus == "time_first" else bonus)
        r, k, v = (x.reshape(B, T, cfg.heads, cfg.head_dim) for x in (r_BxTxD, k_BxTxD, v_BxTxD))
        s_BxHxNxN = state.s_BxHxNxN if state else None
        y_BxTxHxN, s_BxHxNxN = wkv6(
            r, log_decay_HxN, k, v, u_HxN, s_BxHxNxN=s_BxHxNxN, resets_BxT=resets_BxT, implementation=cfg.kernels
        )
        y_BxTxD = HeadNorm(cfg, self.layer, name="ln_x")(y_BxTxHxN).reshape(B, T, D)
        if "g" in mixed:
            y_BxTxD *= jax.nn.silu(dense(kernel_init=orthogonal(0.1), name="gate")(mixed["g"]))
        return dense(kernel_init=nn.initializers.zeros, name="output")(y_BxTxD), (last_BxD, s_BxHxNxN)


class Block(RWKVBlock):
    time_mix, channel_mix = TimeMix, ChannelMix


class RWKV5(RWKVLM):
    """A language model of RWKV-5 layers."""

    block = Block
