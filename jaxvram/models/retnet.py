"""RetNet (Sun et al. 2023, arXiv:2307.08621): retention, a recurrence with one fixed decay a head.

In each layer, of the stream x (fp32):  x += W_o (silu(W_g u) * norm(o)), u = norm(x);  x += W_2 (act(W_1 u) * W_gate u).
For each of H heads, of K = D / H keys and P = E / H values:
  q = rot_n W_q u,  k = rot_n W_k u / sqrt(K), v = W_v u;  o_n = sum over m <= n of gamma^(n - m) (q_n . k_m) v_m / sqrt(S_n)
  gamma = 1 - 2^(-5 - h);  S_n = sum over m <= n of gamma^(n - m);  norm: RMS over the head's P values, without a scale.
rot_n turns channels 2i and 2i + 1 by n 10000^(-i / (K/2 - 1)). Of torchscale's forms this is the recurrent one; the others
divide a row by one more number, of which norm(o) feels nothing but eps (docs/retnet.md).
W_q, W_k, W_v, W_g: Xavier uniform of gain 2^-2.5, W_o of 1/2; W_1, W_2, W_gate as torch.nn.Linear's default; table and head
N(0, 1/D), the table's rows times sqrt(D). Read: microsoft/torchscale 4d1e0e8, whose names of parameters these are.

Between the projections the backward pass keeps q, k, v, W_g u and o: 4 K / P + 6 bytes a token and value channel in bf16
(4 a token and head for S, 16 K a position, once for all sequences and heads, to turn by), 8.4 at K = 256, P = 432; under
remat='full' the stream alone, 4 bytes a token and channel of D.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.errors import UserError, nearest
from jaxvram.kernels.retention import log_gammas, retention
from jaxvram.layers import rope
from jaxvram.layers.linear import Linear, fan_in_uniform
from jaxvram.layers.mlp import GATED, from_input_alone
from jaxvram.layers.norms import RMSNorm
from jaxvram.layers.recurrent_lm import RecurrentLM, check_fields


def _size(L: int, D: int, H: int, E: int) -> dict:
    return {"n_layer": L, "n_embd": D, "n_head": H, "d_value": E, "n_inner": E}


SIZES = {  # torchscale's examples/fairseq/models/retnet.py; keys of 256, values of 432 or 428
    "base": _size(6, 512, 2, 864),
    "medium": _size(16, 1024, 4, 1728),
    "xl": _size(24, 2048, 8, 3456),
    "3b": _size(32, 2560, 10, 4280),
    "7b": _size(32, 4096, 16, 6912),
    "13b": _size(40, 5120, 20, 8560),
    "65b": _size(64, 8192, 32, 13824),
}


@dataclasses.dataclass(frozen=True)
class RetNetConfig:
    vocab_size: int = 50257  # V; 0: as many as the data has
    vocab_multiple: int = 1  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 2048  # T of a training example; sampling and evaluation know no bound
    n_layer: int = 6  # L
    n_embd: int = 512  # D
    n_head: int = 2  # H
    d_value: int = 864  # E, values of all heads
    n_inner: int = 864  # F, width of the feed-forward layer
    activation: str = "swish"  # of the feed-forward layer: swish | gelu
    scale_embedding: bool = True  # rows of the table times sqrt(D)
    norm_eps: float = 1e-6  # of every norm
    tie_head: bool = False  # head = table
    reset_token: int = -1  # token that begins a document: nothing is remembered from before it; -1: none
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of parameters
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: retention and loss

    def __post_init__(self):
        check_fields(self)
        if self.activation not in GATED:
            raise UserError(f"model.activation={self.activation!r} is unknown{nearest(self.activation, GATED)}")
        sizes = (self.block_size, self.n_layer, self.n_embd, self.n_head, self.d_value, self.n_inner, self.vocab_multiple)
        if min(sizes) < 1 or self.vocab_size < 0 or self.norm_eps <= 0:
            raise UserError("model: every size must be at least 1, norm_eps positive")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"model.n_head={self.n_head} does not cut n_embd={self.n_embd} into pairs of channels")
        if self.d_value % self.n_head:
            raise UserError(f"model.n_head={self.n_head} does not divide d_value={self.d_value}")

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def key_size(self) -> int:
        """K"""
        return self.n_embd // self.n_head

    @property
    def value_size(self) -> int:
        """P"""
        return self.d_value // self.n_head

    @property
    def rope_frequencies(self) -> np.ndarray:
        return (10000.0 ** -np.linspace(0, 1, self.key_size // 2)).astype(np.float32)  # both ends, unlike elsewhere


class RetNetState(flax.struct.PyTreeNode):
    """What a layer remembers: 4 E K + 4 bytes a sequence, and 4 of all, however long it was."""

    h_BxHxPxK: jax.Array  # fp32
    read_B: jax.Array  # int32, tokens of the document at hand
    position: jax.Array  # int32, tokens read; wraps round


class Places(flax.struct.PyTreeNode):
    """Where the tokens stand: what every layer reads of it."""

    rotation: tuple[jax.Array, jax.Array]  # of queries: cos and sin, (T, K/2)
    scaled_rotation: tuple[jax.Array, jax.Array]  # of keys, divided by sqrt(K)
    sums_BxTxH: jax.Array  # S
    resets_BxT: jax.Array | None
    read_B: jax.Array  # behind the last token
    position: jax.Array


def places(cfg: RetNetConfig, tokens_BxT, state: RetNetState | None, resets_BxT) -> Places:
    """`state`: of one layer, before the tokens; None: nothing was read."""
    B, T = tokens_BxT.shape
    position = state.position if state else jnp.int32(0)
    read_B = state.read_B if state else jnp.zeros(B, jnp.int32)
    index_T = jnp.arange(T)
    read_BxT = read_B[:, None] + index_T + 1
    if resets_BxT is not None:
        start_BxT = jax.lax.cummax(jnp.where(resets_BxT, index_T, -1), axis=1)
        read_BxT = jnp.where(start_BxT < 0, read_BxT, index_T - start_BxT + 1)
    log_gamma_H = log_gammas(cfg.n_head).astype(np.float64)
    sums_BxTxH = jnp.expm1(read_BxT[..., None] * np.float32(log_gamma_H)) / np.float32(np.expm1(log_gamma_H))
    rotation = rope.endless_rotation(position, T, cfg.rope_frequencies)
    scaled_rotation = tuple(cfg.key_size**-0.5 * x for x in rotation)
    return Places(rotation, scaled_rotation, sums_BxTxH, resets_BxT, read_BxT[:, -1], position + T)


@from_input_alone
def _gated_norm(o_BxTxHxP, g_BxTxHxP, eps_BxTxHx1):
    """silu(g) norm(o), of an o before its division by sqrt(S): with eps S instead of eps the norm is the same."""
    rstd_BxTxHx1 = jax.lax.rsqrt(jnp.square(o_BxTxHxP).mean(-1, keepdims=True) + eps_BxTxHx1)
    return jax.nn.silu(g_BxTxHxP) * (o_BxTxHxP * rstd_BxTxHx1)


def retain(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, g_BxTxHxP, places: Places, cfg: RetNetConfig, h_BxHxPxK=None):
    """silu(g) norm(o) of q and k that are not turned yet, and the state after the last token, if there was one before."""
    q_BxTxHxK = rope.rotate(q_BxTxHxK, *places.rotation, "interleaved")
    k_BxTxHxK = rope.rotate(k_BxTxHxK, *places.scaled_rotation, "interleaved")
    o_BxTxHxP, h_BxHxPxK = retention(
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gammas(cfg.n_head), h_BxHxPxK=h_BxHxPxK, resets_BxT=places.resets_BxT,
        implementation=cfg.kernels,
    )  # fmt: skip
    return _gated_norm(o_BxTxHxP, g_BxTxHxP, cfg.norm_eps * places.sums_BxTxH[..., None]), h_BxHxPxK


def _xavier(gain: float):
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


class Retention(nn.Module):
    """u -> W_o (silu(W_g u) * norm(o)), and the state after the last token."""

    cfg: RetNetConfig

    @nn.compact
    def __call__(self, u_BxTxD, state: RetNetState | None, places: Places):
        cfg, (B, T, D) = self.cfg, u_BxTxD.shape
        dense = functools.partial(Linear, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        into = functools.partial(dense, kernel_init=_xavier(2**-2.5))
        features = {"q_proj": D, "k_proj": D, "v_proj": cfg.d_value, "g_proj": cfg.d_value}
        qkvg = [into(F, name=name)(u_BxTxD).reshape(B, T, cfg.n_head, -1) for name, F in features.items()]
        y_BxTxHxP, h_BxHxPxK = retain(*qkvg, places, cfg, state.h_BxHxPxK if state else None)
        out_BxTxD = dense(D, kernel_init=_xavier(0.5), name="out_proj")(y_BxTxHxP.reshape(B, T, -1))
        return out_BxTxD, RetNetState(h_BxHxPxK, places.read_B, places.position) if state else None


class GLU(nn.Module):
    """W_2 (act(W_1 u) * W_gate u)."""

    cfg: RetNetConfig

    @nn.compact
    def __call__(self, u_BxTxD):
        cfg = self.cfg
        dense = functools.partial(Linear, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        dense = functools.partial(dense, kernel_init=fan_in_uniform())
        a_BxTxF, gate_BxTxF = (dense(cfg.n_inner, name=name)(u_BxTxD) for name in ("fc1", "gate"))
        return dense(cfg.n_embd, name="fc2")(GATED[cfg.activation](a_BxTxF, gate_BxTxF))


class Block(nn.Module):
    """x += retention(norm(x)); x += ffn(norm(x)); the stream x stays in fp32."""

    cfg: RetNetConfig

    @nn.compact
    def __call__(self, x_BxTxD, state: RetNetState | None, places: Places, deterministic: bool = True):
        cfg = self.cfg
        norm = functools.partial(RMSNorm, cfg.norm_eps, cfg.dtype, cfg.param_dtype)
        u_BxTxD = norm(name="retention_layer_norm")(x_BxTxD)
        y_BxTxD, state = Retention(cfg, name="retention")(u_BxTxD, state, places)
        x_BxTxD += y_BxTxD.astype(jnp.float32)
        y_BxTxD = GLU(cfg, name="ffn")(norm(name="final_layer_norm")(x_BxTxD))
        return x_BxTxD + y_BxTxD.astype(jnp.float32), state


class RetNet(RecurrentLM):
    """A language model of retention layers."""

    block = Block
    table_std = property(lambda self: self.cfg.n_embd**-0.5)
    norm_eps = property(lambda self: self.cfg.norm_eps)

    def embed(self, tokens_BxT):
        x_BxTxD = self.embedding(tokens_BxT)
        return self.cfg.n_embd**0.5 * x_BxTxD if self.cfg.scale_embedding else x_BxTxD

    def extras(self, tokens_BxT, state, resets_BxT) -> tuple:
        return (places(self.cfg, tokens_BxT, jax.tree.map(lambda x: x[0], state), resets_BxT),)

    def empty_state(self, batch: int) -> RetNetState:
        h_BxHxPxK = jnp.zeros((batch, self.cfg.n_head, self.cfg.value_size, self.cfg.key_size), jnp.float32)
        return RetNetState(h_BxHxPxK, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32))
