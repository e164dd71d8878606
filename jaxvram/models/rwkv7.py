"""RWKV-7, Goose (Peng et al. 2025, arXiv:2503.14456): a delta rule with decay, rate and removal key of each token's own.

Of the stream x:  x += att(ln1 x), x += ffn(ln2 x); the first layer's stream is ln0 of the table. In att, of u = ln1 x and
each of six mixtures u_* = u + (shift(u) - u) x_*, of which shift(u) is the token before:
  r = R u_r;  k = K u_k;  v = V u_v;  w = w0 + tanh(u_w w1) w2;  a = s(a0 + u_a a1 a2);  g = s(u_g g1) g2, s the sigmoid
  v += (v_first - v) s(v0 + u_v v1 v2) but in the first layer, whose v is v_first
  kappa = k k_k, of length 1 in each head;  k = k (1 + (a - 1) k_a);  d = exp(-e^-0.5 s(w)), between 0.545 and 1
  S_t = S_{t-1} (diag(d_t) - kappa_t^T (a_t kappa_t)) + v_t^T k_t;  y_t = S_t r_t         for each of H heads of N = 64
  att = O (g (groupnorm(y) + (sum_n r k r_k) v));   ffn = V' relu(K' (u + (shift(u) - u) x_k))^2
Read: BlinkDL/RWKV-LM, RWKV-v7/train_temp, 118e451, whose names of parameters these are; docs/rwkv.md says what differs.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.kernels.wkv7 import wkv7
from jaxvram.layers.linear import Linear, product
from jaxvram.layers.norms import LayerNorm, layer_norm
from jaxvram.layers.recurrent_lm import check_fields
from jaxvram.layers.rwkv import HEAD_EPSILON, RWKVLM, RWKVState, check_sizes, orthogonal, ratios
from jaxvram.layers.stack import Stack, policy_of
from jaxvram.layers.token_shift import token_shift

# L, D, ranks of w, a, v, g: the published checkpoints
SIZES = {
    "0.1b": (12, 768, (64, 64, 32, 128)),
    "0.4b": (24, 1024, (64, 64, 32, 128)),
    "1.5b": (24, 2048, (96, 96, 64, 256)),
    "2.9b": (32, 2560, (96, 96, 64, 320)),
}
RANK_OF_ROOT = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}  # today's training code: a rank is so many times sqrt(D)
MIXTURES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


@dataclasses.dataclass(frozen=True)
class RWKV7Config:
    vocab_size: int = 65536  # V; 0: as many as the data has
    vocab_multiple: int = 1  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 512  # T of a training example; sampling and evaluation know no bound
    n_layer: int = 12  # L
    n_embd: int = 768  # D
    head_dim: int = 64  # N
    d_ffn: int = 0  # width of the channel mixing; 0: 4 D
    d_decay: int = 0  # rank of w1 w2; 0: as today's training code suggests, 2.5 sqrt(D) to the next 32
    d_rate: int = 0  # of a1 a2; 0: likewise
    d_value: int = 0  # of v1 v2; 0: 1.7 sqrt(D), likewise
    d_gate: int = 0  # of g1 g2; 0: 5 sqrt(D), likewise
    reset_token: int = -1  # token that begins a document: nothing is remembered from before it; -1: none
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of the stream and of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of matrices, tables and norms; vectors and small matrices of att are fp32 always
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: recurrence and loss

    tie_head: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_sizes(self, self.d_decay, self.d_rate, self.d_value, self.d_gate)
        if self.n_layer < 2:
            raise UserError("model.n_layer=1: RWKV-7 has at least 2 layers, the first one is unlike the others")

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def heads(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def hidden(self) -> int:
        return self.d_ffn or 4 * self.n_embd

    def rank(self, name: str) -> int:
        """Of the pair of small matrices w, a, v or g."""
        given = {"w": self.d_decay, "a": self.d_rate, "v": self.d_value, "g": self.d_gate}[name]
        return given or max(32, round(RANK_OF_ROOT[name] * self.n_embd**0.5 / 32) * 32)


def _ratios(cfg: RWKV7Config, layer):
    """Those of layers/rwkv.py, and channels to the end, about 0."""
    return *ratios(cfg, layer), jnp.arange(cfg.n_embd, dtype=jnp.float32) / max(cfg.n_embd - 1, 1) - 0.5


def _vectors(cfg: RWKV7Config, layer) -> dict:
    """The vectors that att starts from, by name."""
    depth, left, channel_D, linear_D = _ratios(cfg, layer)
    N = cfg.head_dim
    z_D = (jnp.arange(cfg.n_embd) % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
    zigzag_D = z_D * jnp.abs(z_D)
    decay_D = -6 + 6 * (linear_D + 0.5) ** (1 + depth**0.3)
    vectors = {f"x_{name}": 1 - channel_D ** (power * left) for name, power in MIXTURES.items()}
    return vectors | {
        "w0": decay_D + 0.5 + 2.5 * zigzag_D,
        "a0": -0.19 + 0.3 * zigzag_D + 0.4 * linear_D,
        "v0": 0.73 - 0.4 * linear_D,
        "k_k": 0.71 - 0.1 * linear_D,
        "k_a": jnp.full_like(linear_D, 1.02),
    }


class TimeMix(nn.Module):
    """u -> att, the state after the last token, and v. The first layer has no `v_first`."""

    cfg: RWKV7Config
    layer: Any = 0

    @nn.compact
    def __call__(self, u_BxTxD, state: RWKVState | None, v_first_BxTxD, resets_BxT):
        cfg, (B, T, D) = self.cfg, u_BxTxD.shape
        heads = (B, T, cfg.heads, cfg.head_dim)
        fp32 = lambda x: x.astype(jnp.float32)
        vector = lambda name: self.param(name, lambda key: _vectors(cfg, self.layer)[name])
        dense = functools.partial(Linear, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        delta_BxTxD, last_BxD = token_shift(u_BxTxD, state.att_BxD if state else None, resets_BxT)
        mixed = {name: (u_BxTxD + delta_BxTxD * vector(f"x_{name}")).astype(cfg.dtype) for name in MIXTURES}
        r_BxTxD = dense(D, kernel_init=orthogonal(1.0), name="receptance")(mixed["r"])
        k_BxTxD = dense(D, kernel_init=orthogonal(0.1), name="key")(mixed["k"])
        v_BxTxD = dense(D, kernel_init=orthogonal(1.0), name="value")(mixed["v"])
        w_BxTxD = vector("w0") + fp32(self._pair("w", mixed["w"], jnp.tanh))
        log_decay_BxTxD = -jnp.exp(-0.5) * jax.nn.sigmoid(w_BxTxD)
        a_BxTxD = jax.nn.sigmoid(vector("a0") + fp32(self._pair("a", mixed["a"]))).astype(cfg.dtype)
        g_BxTxD = self._pair("g", mixed["g"], jax.nn.sigmoid)
        if v_first_BxTxD is not None:
            share_BxTxD = jax.nn.sigmoid(vector("v0") + fp32(self._pair("v", mixed["v"])))
            v_BxTxD = (v_BxTxD + (v_first_BxTxD - v_BxTxD) * share_BxTxD).astype(cfg.dtype)
        kappa_BxTxHxN = _unit((k_BxTxD * vector("k_k")).reshape(heads)).astype(cfg.dtype)
        k_BxTxD = (k_BxTxD * (1 + (a_BxTxD - 1) * vector("k_a"))).astype(cfg.dtype)
        r, log_decay, k, v, a = (x.reshape(heads) for x in (r_BxTxD, log_decay_BxTxD, k_BxTxD, v_BxTxD, a_BxTxD))
        s_BxHxNxN = state.s_BxHxNxN if state else None
        y_BxTxHxN, s_BxHxNxN = wkv7(
            r, log_decay, k, v, kappa_BxTxHxN, a, s_BxHxNxN=s_BxHxNxN, resets_BxT=resets_BxT, implementation=cfg.kernels
        )
        out_BxTxD = self._read(y_BxTxHxN, r, k, v).reshape(B, T, D) * g_BxTxD
        out_BxTxD = dense(D, kernel_init=nn.initializers.zeros, name="output")(out_BxTxD)
        return out_BxTxD, (last_BxD, s_BxHxNxN), v_BxTxD

    def _pair(self, name: str, x_BxTxD, between=lambda x: x):
        """between(x w1) w2 for name = w."""
        cfg, D = self.cfg, x_BxTxD.shape[-1]
        down_DxR = self.param(f"{name}1", nn.initializers.zeros, (D, cfg.rank(name)), jnp.float32)
        up_RxD = self.param(f"{name}2", orthogonal(0.1), (cfg.rank(name), D), jnp.float32)
        h_BxTxR = between(product(x_BxTxD, down_DxR.astype(cfg.dtype)))
        return product(h_BxTxR, up_RxD.astype(cfg.dtype))

    def _read(self, y_BxTxHxN, r_BxTxHxN, k_BxTxHxN, v_BxTxHxN):
        """groupnorm(y) + (sum_n r k r_k) v."""
        cfg = self.cfg
        scale = lambda key, shape: jnp.broadcast_to(((1 + self.layer) / cfg.n_layer) ** 0.7, shape).astype(cfg.param_dtype)
        shape = cfg.heads, cfg.head_dim
        scale_D = self.param("ln_x_scale", scale, (cfg.n_embd,))
        bias_D = self.param("ln_x_bias", nn.initializers.zeros, (cfg.n_embd,), cfg.param_dtype)
        r_k_HxN = self.param("r_k", nn.initializers.constant(-0.04), shape, jnp.float32)
        y_BxTxHxN = layer_norm(y_BxTxHxN, scale_D.reshape(shape), bias_D.reshape(shape), HEAD_EPSILON, cfg.dtype)
        bonus_BxTxHx1 = (r_BxTxHxN.astype(jnp.float32) * k_BxTxHxN * r_k_HxN).sum(-1, keepdims=True)
        return (y_BxTxHxN + bonus_BxTxHx1 * v_BxTxHxN).astype(cfg.dtype)


def _unit(x_BxTxHxN):
    """x / max(|x|, 1e-12) of each head, in fp32; its gradient at 0 is finite."""
    x_BxTxHxN = x_BxTxHxN.astype(jnp.float32)
    return x_BxTxHxN * jax.lax.rsqrt(jnp.maximum(jnp.square(x_BxTxHxN).sum(-1, keepdims=True), 1e-24))


class ChannelMix(nn.Module):
    """u -> ffn, and the last token."""

    cfg: RWKV7Config
    layer: Any = 0

    @nn.compact
    def __call__(self, u_BxTxD, last_BxD, resets_BxT):
        cfg = self.cfg
        dense = functools.partial(Linear, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        _, left, channel_D, _ = _ratios(cfg, self.layer)
        x_k_D = self.param("x_k", lambda key: 1 - channel_D ** (left**4))
        delta_BxTxD, last_BxD = token_shift(u_BxTxD, last_BxD, resets_BxT)
        h_BxTxF = dense(cfg.hidden, kernel_init=orthogonal(1.0), name="key")(u_BxTxD + delta_BxTxD * x_k_D)
        h_BxTxF = jnp.square(jax.nn.relu(h_BxTxF))
        return dense(cfg.n_embd, kernel_init=nn.initializers.zeros, name="value")(h_BxTxF), last_BxD


class Block(nn.Module):
    """x += att(ln1 x), x += ffn(ln2 x). The first layer, `v_first_BxTxD` None, returns its values as well."""

    cfg: RWKV7Config
    layer: Any = 0  # its place, which its starting weights depend on

    @nn.compact
    def __call__(self, x_BxTxD, state, v_first_BxTxD, resets_BxT, deterministic: bool = True):
        cfg = self.cfg
        norm = functools.partial(LayerNorm, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        att, ffn = TimeMix(cfg, self.layer, name="att"), ChannelMix(cfg, self.layer, name="ffn")
        y_BxTxD, (att_BxD, s_BxHxNxN), v_BxTxD = att(norm(name="ln1")(x_BxTxD), state, v_first_BxTxD, resets_BxT)
        x_BxTxD = x_BxTxD + y_BxTxD
        y_BxTxD, ffn_BxD = ffn(norm(name="ln2")(x_BxTxD), state.ffn_BxD if state else None, resets_BxT)
        state = RWKVState(att_BxD, s_BxHxNxN, ffn_BxD) if state else None
        return (x_BxTxD + y_BxTxD, state) if v_first_BxTxD is not None else (x_BxTxD + y_BxTxD, state, v_BxTxD)


class RWKV7(RWKVLM):
    """A language model of RWKV-7 layers. What it remembers is a pair: of the first layer, and of all others."""

    block = Block

    def setup(self):
        cfg = self.cfg
        super().setup()
        first = Block if cfg.remat == "none" else nn.checkpoint(Block, policy=policy_of(cfg.remat), static_argnums=(5,))
        self.first = first(cfg)

    def stack(self) -> Stack:
        cfg = self.cfg
        return Stack(Block, cfg, cfg.n_layer - 1, cfg.remat, cfg.unroll_layers, first=1)

    def run_layers(self, x_BxTxD, state, extras: tuple, deterministic: bool):
        first, rest = state or (None, None)
        x_BxTxD, first, v_first_BxTxD = self.first(x_BxTxD, first, None, *extras, deterministic)
        x_BxTxD, rest = self.layers(x_BxTxD, rest, v_first_BxTxD, *extras, deterministic=deterministic)
        return x_BxTxD, (first, rest) if state else None

    def initial_state(self, batch: int, tokens: int | None = None):
        """What the first layer and all others (leading axis L - 1) remember before the first token."""
        one_layer = self.empty_state(batch)
        rest = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.cfg.n_layer - 1, *a.shape)), one_layer)
        return one_layer, rest
