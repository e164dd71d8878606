"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): state space duality.

In each layer, of the stream x (fp32):  x += W_out norm(y silu(z)), where from u = norm(x)
  z, (x', B, C), Delta = W_in u;  x', B, C = silu(conv(x', B, C));  Delta = softplus(Delta + dt_bias), one a head
  h_t = exp(Delta_t A) h_{t-1} + Delta_t x'_t B_t^T  (P x N);   y_t = h_t C_t + D x'_t      for each of H = E / P heads;
head h reads B and C of group h G // H. A = -exp(A_log), -A ~ U(1, 16); D = 1; softplus(dt_bias) log-uniform in
[0.001, 0.1]; the table ~ N(0, 0.02); other matrices as torch.nn.Linear's default, W_out divided by sqrt(L).
Read: state-spaces/mamba e9594ce, whose names of parameters these are. What differs is said in docs/mamba.md.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.kernels.scalar_decay import scalar_decay
from jaxvram.layers.linear import Linear, SplitLinear, fan_in_uniform
from jaxvram.layers.norms import RMSNorm, rms_norm
from jaxvram.layers.recurrent_lm import RecurrentLM, check_fields
from jaxvram.layers.state_space import CausalConv, step_bias

SIZES = {"130m": (24, 768), "370m": (48, 1024), "780m": (48, 1536), "1.3b": (48, 2048), "2.7b": (64, 2560)}  # L, D


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    vocab_size: int = 50277  # V; 0: as many as the data has
    vocab_multiple: int = 16  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 2048  # T of a training example; sampling and evaluation know no bound
    n_layer: int = 24  # L
    n_embd: int = 768  # D
    d_state: int = 128  # N, numbers that a channel remembers
    d_conv: int = 4  # W, width of the convolution
    expand: int = 2  # E = expand D channels
    head_dim: int = 64  # P channels a head
    n_groups: int = 1  # G, of B and C, and of the norm before W_out
    tie_head: bool = True  # head = table
    reset_token: int = -1  # token that begins a document: nothing is remembered from before it; -1: none
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of matrices and norms; A_log, D and the step sizes' bias are fp32 always
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: scan and loss

    def __post_init__(self):
        check_fields(self)
        sizes = (self.block_size, self.n_layer, self.n_embd, self.d_state, self.expand, self.head_dim, self.n_groups)
        if min(*sizes, self.vocab_multiple) < 1 or self.d_conv < 2 or self.vocab_size < 0:
            raise UserError("model: every size must be at least 1, d_conv at least 2")
        if self.d_inner % self.head_dim:
            raise UserError(f"model.head_dim={self.head_dim} does not divide expand x n_embd, {self.d_inner}")
        if self.heads % self.n_groups:
            raise UserError(f"model.n_groups={self.n_groups} does not divide the {self.heads} heads")

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def d_inner(self) -> int:
        return self.expand * self.n_embd

    @property
    def heads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def d_conv_in(self) -> int:
        """Channels of the convolution: x', B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state


class Mamba2State(flax.struct.PyTreeNode):
    """What a layer remembers: (W - 1) (E + 2 G N) sizeof(dtype) + 4 E N bytes a sequence, however long it was."""

    tail_BxVxF: jax.Array  # last W - 1 inputs of the convolution
    h_BxHxPxN: jax.Array  # fp32


class Mamba2Mixer(nn.Module):
    """u -> W_out norm(y silu(z)), and the state after the last token."""

    cfg: Mamba2Config

    @nn.compact
    def __call__(self, u_BxTxD, state: Mamba2State | None, resets_BxT):
        cfg, (B, T, _) = self.cfg, u_BxTxD.shape
        E, N, G, H, F = cfg.d_inner, cfg.d_state, cfg.n_groups, cfg.heads, cfg.d_conv_in
        dense = functools.partial(Linear, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        in_proj = SplitLinear((E, F, H), fan_in_uniform(), cfg.dtype, cfg.param_dtype, name="in_proj")
        z_BxTxE, xBC_BxTxF, dt_BxTxH = in_proj(u_BxTxD)
        conv = CausalConv(cfg.d_conv, cfg.param_dtype, cfg.kernels, name="conv1d")
        xBC_BxTxF, tail = conv(xBC_BxTxF, state.tail_BxVxF if state else None, resets_BxT)
        x_BxTxE, B_BxTxGN, C_BxTxGN = jnp.split(xBC_BxTxF, (E, E + G * N), axis=-1)
        delta_BxTxH = jax.nn.softplus(dt_BxTxH.astype(jnp.float32) + self.param("dt_bias", step_bias(), (H,)))
        A_H = -jnp.exp(self.param("A_log", _log_uniform(1, 16), (H,)))
        D_H = self.param("D", nn.initializers.ones, (H,))
        x_BxTxHxP = x_BxTxE.reshape(B, T, H, cfg.head_dim)
        y_BxTxHxP, h_BxHxPxN = scalar_decay(
            C_BxTxGN.reshape(B, T, G, N), B_BxTxGN.reshape(B, T, G, N), x_BxTxHxP, delta_BxTxH * A_H, delta_BxTxH,
            h_BxHxPxN=state.h_BxHxPxN if state else None, resets_BxT=resets_BxT, implementation=cfg.kernels,
        )  # fmt: skip
        y_BxTxE = GatedNorm(G, cfg.dtype, cfg.param_dtype, name="norm")(y_BxTxHxP, x_BxTxHxP, D_H, z_BxTxE)
        out_init = fan_in_uniform(cfg.n_layer**-0.5)
        out_BxTxD = dense(cfg.n_embd, kernel_init=out_init, name="out_proj")(y_BxTxE)
        return out_BxTxD, Mamba2State(tail, h_BxHxPxN) if state else None


def _log_uniform(low: float, high: float):
    """Logarithms of what is uniform between `low` and `high`."""
    return lambda key, shape: jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high))


class GatedNorm(nn.Module):
    """norm((y + D x) silu(z)), RMS over each of G equal parts of the channels; fp32 inside, of which nothing is kept."""

    groups: int
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, y_BxTxHxP, x_BxTxHxP, D_H, z_BxTxE):
        E = z_BxTxE.shape[-1]
        scale_E = self.param("scale", nn.initializers.ones, (E,), self.param_dtype)

        return _gated_norm(y_BxTxHxP, x_BxTxHxP, D_H, z_BxTxE, scale_E, self.groups, self.dtype)


def _of_sum(sum_BxTxHxP, z_BxTxE, scale_E, groups: int, dtype):
    # Written down for the norm, which reads it twice; XLA would take the liberty to do so in fp32.
    y_BxTxE = sum_BxTxHxP.reshape(z_BxTxE.shape) * jax.nn.silu(z_BxTxE.astype(jnp.float32))
    y_BxTxE = jax.lax.optimization_barrier(y_BxTxE.astype(dtype))
    parts = y_BxTxE.reshape(*y_BxTxE.shape[:-1], groups, -1)
    return rms_norm(parts, scale_E.reshape(groups, -1), 1e-5, dtype).reshape(y_BxTxE.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gated_norm(y_BxTxHxP, x_BxTxHxP, D_H, z_BxTxE, scale_E, groups, dtype):
    return _of_sum(y_BxTxHxP + D_H[:, None] * x_BxTxHxP, z_BxTxE, scale_E, groups, dtype)  # D is fp32, so is the sum


def _gated_norm_forward(*args):
    return _gated_norm(*args), args[:5]


def _gated_norm_backward(groups, dtype, residuals, g_BxTxE):
    """The gradients of the sum and of z at one time, so that nothing else of the norm is held while the scan goes back."""
    # Tied to g, else XLA merges the sum with that of the forward pass and keeps it.
    *args, g_BxTxE = jax.lax.optimization_barrier((*residuals, g_BxTxE))
    y_BxTxHxP, x_BxTxHxP, D_H, z_BxTxE, scale_E = args
    sum_BxTxHxP = y_BxTxHxP + D_H[:, None] * x_BxTxHxP
    _, vjp = jax.vjp(lambda s, z, scale: _of_sum(s, z, scale, groups, dtype), sum_BxTxHxP, z_BxTxE, scale_E)
    dsum_BxTxHxP, dz_BxTxE, dscale_E = vjp(g_BxTxE)
    dy_BxTxHxP, dz_BxTxE, dscale_E = jax.lax.optimization_barrier((dsum_BxTxHxP.astype(y_BxTxHxP.dtype), dz_BxTxE, dscale_E))
    dx_BxTxHxP = (D_H[:, None] * dy_BxTxHxP).astype(x_BxTxHxP.dtype)
    dD_H = (dy_BxTxHxP * x_BxTxHxP.astype(jnp.float32)).sum((0, 1, 3))
    return dy_BxTxHxP, dx_BxTxHxP, dD_H, dz_BxTxE, dscale_E


_gated_norm.defvjp(_gated_norm_forward, _gated_norm_backward)


class Block(nn.Module):
    """x += mixer(norm(x)); the stream x stays in fp32."""

    cfg: Mamba2Config

    @nn.compact
    def __call__(self, x_BxTxD, state, resets_BxT, deterministic: bool = True):
        cfg = self.cfg
        u_BxTxD = RMSNorm(dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="norm")(x_BxTxD)
        y_BxTxD, state = Mamba2Mixer(cfg, name="mixer")(u_BxTxD, state, resets_BxT)
        return x_BxTxD + y_BxTxD.astype(jnp.float32), state


class Mamba2(RecurrentLM):
    """A language model of Mamba-2 layers."""

    block = Block

    def empty_state(self, batch: int) -> Mamba2State:
        cfg = self.cfg
        tail = jnp.zeros((batch, cfg.d_conv - 1, cfg.d_conv_in), cfg.dtype)
        return Mamba2State(tail, jnp.zeros((batch, cfg.heads, cfg.head_dim, cfg.d_state), jnp.float32))
