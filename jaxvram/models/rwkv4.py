"""RWKV-4, Dove (Peng et al. 2023, arXiv:2305.13048): a weighted average over the past for each channel, and no heads.

Of the stream x:  x += att(ln1 x), x += ffn(ln2 x); the first layer's stream is ln0 of the table. Each mixture of u = ln1 x
(or ln2 x) is u_* = u m_* + shift(u) (1 - m_*), of which shift(u) is the token before and m_* a weight, `time_mix_*`:
  r = R u_r;  k = K u_k;  v = V u_v;   att = O (s(r) wkv(k, v)), s the sigmoid
  wkv_t = (sum_{i<t} e^((t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (the same without v),  w = -e^time_decay, u = time_first
  ffn = s(R' u_r) V' relu(K' u_k)^2
Read: the notes on BlinkDL/RWKV-LM's RWKV-v4neo, whose names of parameters these are; docs/rwkv.md says what differs.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.kernels.wkv4 import empty_state, wkv4
from jaxvram.layers.linear import Linear
from jaxvram.layers.recurrent_lm import check_fields
from jaxvram.layers.rwkv import RWKVLM, ChannelMix, RWKVBlock, orthogonal, ratios
from jaxvram.layers.token_shift import mixture, token_shift

SIZES = {"169m": (12, 768), "430m": (24, 1024), "1.5b": (24, 2048), "3b": (32, 2560)}  # L, D: published, on the Pile


@dataclasses.dataclass(frozen=True)
class RWKV4Config:
    vocab_size: int = 50277  # V, of GPT-NeoX's tokenizer; 0: as many as the data has
    vocab_multiple: int = 1  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 1024  # T of a training example; sampling and evaluation know no bound
    n_layer: int = 12  # L
    n_embd: int = 768  # D
    d_ffn: int = 0  # width of the channel mixing; 0: 4 D
    table_range: float = 6e-4  # a fresh table is uniform within +- this; the authors take their learning rate
    reset_token: int = -1  # token that begins a document: nothing is remembered from before it; -1: none
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of the stream and of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of matrices, tables and norms; time_* are fp32 always
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: recurrence and loss

    tie_head: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        sizes = (self.block_size, self.n_layer, self.n_embd, self.vocab_multiple)
        if min(sizes) < 1 or min(self.d_ffn, self.vocab_size) < 0:
            raise UserError("model: every size must be at least 1, and neither d_ffn nor vocab_size negative")
        if self.table_range <= 0:
            raise UserError(f"model.table_range={self.table_range} must be more than 0")

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def hidden(self) -> int:
        return self.d_ffn or 4 * self.n_embd


class RWKV4State(flax.struct.PyTreeNode):
    """What a layer remembers: 2 D sizeof(dtype) + 12 D bytes a sequence, however long it was."""

    att_BxD: jax.Array  # the last token as att read it
    s_Bx3xD: jax.Array  # fp32, as kernels/wkv4.py has it
    ffn_BxD: jax.Array  # the last token as ffn read it


def _vectors(cfg: RWKV4Config, layer) -> dict:
    """The vectors that att starts from, by name."""
    depth, left, channel_D = ratios(cfg, layer)
    n_D = jnp.arange(cfg.n_embd, dtype=jnp.float32)
    return {
        "time_mix_k": channel_D**left,
        "time_mix_v": channel_D**left + 0.3 * depth,
        "time_mix_r": channel_D ** (0.5 * left),
        "time_decay": -5 + 8 * (n_D / max(cfg.n_embd - 1, 1)) ** (0.7 + 1.3 * depth),
        "time_first": jnp.log(0.3) + 0.5 * ((n_D + 1) % 3 - 1),
    }


zeros = nn.initializers.zeros


class TimeMix(nn.Module):
    """u -> att, and the last token and the recurrence's state behind it."""

    cfg: RWKV4Config
    layer: Any = 0

    @nn.compact
    def __call__(self, u_BxTxD, state: RWKV4State | None, resets_BxT):
        cfg, D = self.cfg, self.cfg.n_embd
        vector = lambda name: self.param(name, lambda key: _vectors(cfg, self.layer)[name])
        dense = functools.partial(Linear, D, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        delta_BxTxD, last_BxD = token_shift(u_BxTxD, state.att_BxD if state else None, resets_BxT)
        mixed = lambda name: mixture(u_BxTxD, delta_BxTxD, 1 - vector(f"time_mix_{name}"))
        r_BxTxD = jax.nn.sigmoid(dense(kernel_init=zeros, name="receptance")(mixed("r")))
        k_BxTxD = dense(kernel_init=zeros, name="key")(mixed("k"))
        v_BxTxD = dense(kernel_init=orthogonal(1.0), name="value")(mixed("v"))
        y_BxTxD, s_Bx3xD = wkv4(
            -jnp.exp(vector("time_decay")), vector("time_first"), k_BxTxD, v_BxTxD,
            s_Bx3xD=state.s_Bx3xD if state else None, resets_BxT=resets_BxT, implementation=cfg.kernels,
        )  # fmt: skip
        return dense(kernel_init=zeros, name="output")(r_BxTxD * y_BxTxD), (last_BxD, s_Bx3xD)


class WideChannelMix(ChannelMix):
    @property
    def gain(self) -> float:
        return max(1.0, self.cfg.hidden / self.cfg.n_embd) ** 0.5


class Block(RWKVBlock):
    time_mix, channel_mix = TimeMix, WideChannelMix


class RWKV4(RWKVLM):
    """A language model of RWKV-4 layers."""

    block = Block

    @property
    def table_range(self) -> float:
        return self.cfg.table_range

    def empty_state(self, batch: int) -> RWKV4State:
        cfg = self.cfg
        last_BxD = jnp.zeros((batch, cfg.n_embd), cfg.dtype)
        return RWKV4State(last_BxD, empty_state(batch, cfg.n_embd), last_BxD)
