"""Mamba (Gu & Dao 2023, arXiv:2312.00752): selective state spaces.

In each layer, of the stream x (fp32):  x += W_out y, where from u = norm(x)
  x', z = W_in u;  x' = silu(conv(x'));  Delta_r, B, C = W_x x';  Delta = softplus(W_dt Delta_r + b_dt)
  h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x'_t;   y_t = (C_t h_t + D x'_t) silu(z_t)       for each of E = 2 D channels.
A = -exp(A_log), A_log[e, n] = log n (S4D-real); D = 1; softplus(b_dt) log-uniform in [0.001, 0.1]; W_dt ~ U(+-R^-1/2); the
table ~ N(0, 0.02); other matrices as torch.nn.Linear's default, W_out divided by sqrt(L).
Read: state-spaces/mamba e9594ce, whose names of parameters these are. What differs is said in docs/mamba.md.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.kernels.selective_scan import selective_scan
from jaxvram.layers.linear import Linear, fan_in_uniform
from jaxvram.layers.norms import RMSNorm
from jaxvram.layers.recurrent_lm import RecurrentLM, check_fields
from jaxvram.layers.state_space import CausalConv, step_bias

SIZES = {"130m": (24, 768), "370m": (48, 1024), "790m": (48, 1536), "1.4b": (48, 2048), "2.8b": (64, 2560)}  # L, D


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    vocab_size: int = 50277  # V; 0: as many as the data has
    vocab_multiple: int = 8  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 2048  # T of a training example; sampling and evaluation know no bound
    n_layer: int = 24  # L
    n_embd: int = 768  # D
    d_state: int = 16  # N, numbers that a channel remembers
    d_conv: int = 4  # W, width of the convolution
    expand: int = 2  # E = expand D channels
    dt_rank: int = 0  # R; 0: D / 16, rounded up
    tie_head: bool = True  # head = table
    reset_token: int = -1  # token that begins a document: nothing is remembered from before it; -1: none
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of matrices and norms; A_log, D and the step sizes' bias are fp32 always
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: scan and loss

    def __post_init__(self):
        check_fields(self)
        sizes = (self.block_size, self.n_layer, self.n_embd, self.d_state, self.expand, self.vocab_multiple)
        if min(sizes) < 1 or self.d_conv < 2 or min(self.vocab_size, self.dt_rank) < 0:
            raise UserError("model: every size must be at least 1, d_conv at least 2")

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def d_inner(self) -> int:
        return self.expand * self.n_embd

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.n_embd / 16)


class MambaState(flax.struct.PyTreeNode):
    """What a layer remembers: (W - 1) E sizeof(dtype) + 4 E N bytes a sequence, however long it was."""

    tail_BxVxE: jax.Array  # last W - 1 inputs of the convolution
    h_BxExN: jax.Array  # fp32


class MambaMixer(nn.Module):
    """u -> W_out y, and the state after the last token."""

    cfg: MambaConfig

    @nn.compact
    def __call__(self, u_BxTxD, state: MambaState | None, resets_BxT):
        cfg = self.cfg
        E, N, R = cfg.d_inner, cfg.d_state, cfg.rank
        dense = functools.partial(Linear, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        uniform = fan_in_uniform()
        x_BxTxE, z_BxTxE = jnp.split(dense(2 * E, kernel_init=uniform, name="in_proj")(u_BxTxD), 2, axis=-1)
        conv = CausalConv(cfg.d_conv, cfg.param_dtype, cfg.kernels, name="conv1d")
        x_BxTxE, tail = conv(x_BxTxE, state.tail_BxVxE if state else None, resets_BxT)
        dt_B_C = dense(R + 2 * N, kernel_init=uniform, name="x_proj")(x_BxTxE)
        dt_BxTxR, B_BxTxN, C_BxTxN = jnp.split(dt_B_C, (R, R + N), axis=-1)
        dt_BxTxE = dense(E, kernel_init=fan_in_uniform(), name="dt_proj")(dt_BxTxR)  # +-R^-1/2
        dt_bias_E = self.param("dt_bias", step_bias(), (E,))
        A_log_ExN = self.param("A_log", lambda _: jnp.log(jnp.tile(jnp.arange(1.0, N + 1), (E, 1))))
        D_E = self.param("D", nn.initializers.ones, (E,))
        y_BxTxE, h_BxExN = selective_scan(
            x_BxTxE, dt_BxTxE, -jnp.exp(A_log_ExN), B_BxTxN, C_BxTxN, D_E, z_BxTxE, dt_bias_E=dt_bias_E,
            h_BxExN=state.h_BxExN if state else None, resets_BxT=resets_BxT, implementation=cfg.kernels,
        )  # fmt: skip
        out_init = fan_in_uniform(cfg.n_layer**-0.5)
        out_BxTxD = dense(cfg.n_embd, kernel_init=out_init, name="out_proj")(y_BxTxE)
        return out_BxTxD, MambaState(tail, h_BxExN) if state else None


class Block(nn.Module):
    """x += mixer(norm(x)); the stream x stays in fp32."""

    cfg: MambaConfig

    @nn.compact
    def __call__(self, x_BxTxD, state, resets_BxT, deterministic: bool = True):
        cfg = self.cfg
        u_BxTxD = RMSNorm(dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="norm")(x_BxTxD)
        y_BxTxD, state = MambaMixer(cfg, name="mixer")(u_BxTxD, state, resets_BxT)
        return x_BxTxD + y_BxTxD.astype(jnp.float32), state


class Mamba(RecurrentLM):
    """A language model of Mamba layers."""

    block = Block

    def empty_state(self, batch: int) -> MambaState:
        cfg = self.cfg
        tail = jnp.zeros((batch, cfg.d_conv - 1, cfg.d_inner), cfg.dtype)
        return MambaState(tail, jnp.zeros((batch, cfg.d_inner, cfg.d_state), jnp.float32))
