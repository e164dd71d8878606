"""Llama (Touvron et al. 2023, arXiv:2302.13971, 2307.09288; 3: arXiv:2407.21783); OpenLLaMA, TinyLlama, SmolLM2 are Llamas.

In each layer, of the stream x:  x += W_o attn(norm(x));  x += W_down (silu(W_gate u) * W_up u), u = norm(x).
attn: H heads of queries to G of keys and values (head h reads h G // H), q and k turned by their position (layers/rope.py).
norm(x) = x / sqrt(mean(x^2) + eps) * scale;  logits = norm(x_L) . head^T.  Every matrix and table ~ N(0, 0.02), also those
that write to the stream (EasyLM when OpenLLaMA was trained; transformers); scales 1, biases 0.
Read: transformers 5.23 modeling_llama, EasyLM fe5b2c3, litgpt 2685705. Parameter names are Hugging Face's, norms aside.
"""

import dataclasses
import functools

import flax.linen as nn

from jaxvram.errors import UserError, nearest
from jaxvram.kernels.attention import attention
from jaxvram.kernels.backend import IMPLEMENTATIONS
from jaxvram.layers import rope
from jaxvram.layers.attention import KVCache
from jaxvram.layers.embeddings import Embed, Head, padded_normal
from jaxvram.layers.linear import Linear
from jaxvram.layers.mlp import swiglu
from jaxvram.layers.norms import RMSNorm
from jaxvram.layers.stack import REMAT, Stack

DTYPES = ("bfloat16", "float32")


def _size(L: int, D: int, F: int, H: int, G: int, vocab_size: int = 32000, **more) -> dict:
    return {"n_layer": L, "n_embd": D, "n_inner": F, "n_head": H, "n_kv_head": G, "vocab_size": vocab_size, **more}


_LLAMA3 = {"vocab_size": 128256, "rope_theta": 500000.0}
_SMOLLM2 = {"vocab_size": 49152, "rope_theta": 100000.0, "tie_head": True}

SIZES = {  # what a checkpoint fixes; its context is up to 2048 (TinyLlama, OpenLLaMA), 4096 (2), 8192 (SmolLM2), 131072 (3)
    "tinyllama-1.1b": _size(22, 2048, 5632, 32, 4),
    "openllama-3b": _size(26, 3200, 8640, 32, 32, norm_eps=1e-6),
    "openllama-7b": _size(32, 4096, 11008, 32, 32, norm_eps=1e-6),
    "llama2-7b": _size(32, 4096, 11008, 32, 32),
    "llama2-13b": _size(40, 5120, 13824, 40, 40),
    "llama3.2-1b": _size(16, 2048, 8192, 32, 8, **_LLAMA3, rope_factor=32.0, tie_head=True),
    "llama3.2-3b": _size(28, 3072, 8192, 24, 8, **_LLAMA3, rope_factor=32.0, tie_head=True),
    "llama3.1-8b": _size(32, 4096, 14336, 32, 8, **_LLAMA3, rope_factor=8.0),
    "smollm2-135m": _size(30, 576, 1536, 9, 3, **_SMOLLM2),
    "smollm2-360m": _size(32, 960, 2560, 15, 5, **_SMOLLM2),
    "smollm2-1.7b": _size(24, 2048, 8192, 32, 32, **_SMOLLM2 | {"rope_theta": 130000.0}),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 32000  # V; 0: as many as the data has
    vocab_multiple: int = 1  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 2048  # T, longest context
    n_layer: int = 32  # L
    n_head: int = 32  # H, of queries
    n_kv_head: int = 32  # G, of keys and values; divides H
    n_embd: int = 4096  # D
    head_dim: int = 0  # K; 0: D / H
    n_inner: int = 11008  # F, width of the MLP
    rope_theta: float = 10000.0
    rope_layout: str = "half"  # half: Hugging Face's rows of q and k | interleaved: Meta's, EasyLM's
    rope_factor: float = 1.0  # slow frequencies are divided by this (Llama 3.1: 8, 3.2: 32); 1: none
    rope_low_freq_factor: float = 1.0  # turns within the original context up to which a frequency is slow
    rope_high_freq_factor: float = 4.0  # turns from which it stays as it is
    rope_original_context: int = 8192
    norm_eps: float = 1e-5  # OpenLLaMA: 1e-6
    tie_head: bool = False  # head = table
    attention_bias: bool = False  # in q, k, v and o
    mlp_bias: bool = False
    init_std: float = 0.02
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of parameters
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: attention and loss

    def __post_init__(self):
        of = {"rope_layout": rope.LAYOUTS, "remat": REMAT, "kernels": IMPLEMENTATIONS}
        of |= dict.fromkeys(("dtype", "param_dtype"), DTYPES)
        for field, valid in of.items():
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, valid)}")
        sizes = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "vocab_multiple")
        for field in (*sizes, "rope_original_context"):
            if (value := getattr(self, field)) < 1:
                raise UserError(f"model.{field}={value} must be at least 1")
        if min(self.vocab_size, self.head_dim) < 0:
            raise UserError("model: vocab_size and head_dim must not be negative")
        if self.n_head % self.n_kv_head:
            raise UserError(f"model.n_head={self.n_head} is not a multiple of model.n_kv_head={self.n_kv_head}")
        if not self.head_dim and self.n_embd % self.n_head:
            which = f"model.n_embd={self.n_embd} is not a multiple of model.n_head={self.n_head}"
            raise UserError(f"{which}; give a model.head_dim")
        if self.key_size % 2:
            raise UserError(f"model.head_dim={self.key_size} is odd; positions turn pairs of channels")
        if not self.rope_low_freq_factor < self.rope_high_freq_factor:
            raise UserError("model.rope_low_freq_factor must be less than model.rope_high_freq_factor")
        if min(self.rope_theta, self.norm_eps) <= 0 or self.rope_factor < 1 or self.init_std < 0:
            raise UserError("model: rope_theta and norm_eps must be positive, rope_factor at least 1, init_std at least 0")

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def key_size(self) -> int:
        """K, width of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def rope_frequencies(self):
        return rope.frequencies(
            self.key_size, self.rope_theta, self.rope_factor, self.rope_low_freq_factor, self.rope_high_freq_factor,
            self.rope_original_context,
        )  # fmt: skip


def _dense(cfg: LlamaConfig, features: int, use_bias: bool) -> Linear:
    normal = nn.initializers.normal(cfg.init_std)
    return Linear(features, use_bias=use_bias, dtype=cfg.dtype, param_dtype=cfg.param_dtype, kernel_init=normal)


class LlamaAttention(nn.Module):
    """W_o attn(u), and the cache with the keys and values of u."""

    cfg: LlamaConfig

    def setup(self):
        cfg = self.cfg
        dense = lambda features: _dense(cfg, features, cfg.attention_bias)
        self.q_proj = dense(cfg.n_head * cfg.key_size)
        self.k_proj = dense(cfg.n_kv_head * cfg.key_size)
        self.v_proj = dense(cfg.n_kv_head * cfg.key_size)
        self.o_proj = dense(cfg.n_embd)

    def __call__(self, u_BxTxD, cache: KVCache | None, rotation, segments_BxT):
        cfg = self.cfg
        B, T, _ = u_BxTxD.shape
        heads = lambda y_BxTxHK: y_BxTxHK.reshape(B, T, -1, cfg.key_size)
        q, k, v = heads(self.q_proj(u_BxTxD)), heads(self.k_proj(u_BxTxD)), heads(self.v_proj(u_BxTxD))
        q, k = (rope.rotate(x, *rotation, cfg.rope_layout) for x in (q, k))
        options = {"query_segments_BxT": segments_BxT, "key_segments_BxS": segments_BxT}
        if cache is not None:
            options, cache = {"offset": cache.length}, cache.append(k, v)
            k, v = cache.k_BxSxHxK, cache.v_BxSxHxK
        o_BxTxHxK = self.attend(q, k, v, **options)
        return self.o_proj(o_BxTxHxK.reshape(B, T, -1)), cache

    def attend(self, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, **options):
        """o_BxTxHxK of turned queries and keys; a method of its own, so that an adapter can add to it."""
        return attention(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, implementation=self.cfg.kernels, **options)


class LlamaMLP(nn.Module):
    """W_down (silu(W_gate u) * W_up u)."""

    cfg: LlamaConfig

    def setup(self):
        cfg = self.cfg
        self.gate_proj = _dense(cfg, cfg.n_inner, cfg.mlp_bias)
        self.up_proj = _dense(cfg, cfg.n_inner, cfg.mlp_bias)
        self.down_proj = _dense(cfg, cfg.n_embd, cfg.mlp_bias)

    def __call__(self, u_BxTxD):
        return self.down_proj(swiglu(self.gate_proj(u_BxTxD), self.up_proj(u_BxTxD)))


class Block(nn.Module):
    """x += attn(input_norm(x)); x += mlp(post_norm(x))."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD, cache: KVCache | None, rotation, segments_BxT, deterministic: bool = True):
        cfg = self.cfg
        norm = functools.partial(RMSNorm, cfg.norm_eps, cfg.dtype, cfg.param_dtype)
        u_BxTxD = norm(name="input_norm")(x_BxTxD)
        y_BxTxD, cache = LlamaAttention(cfg, name="attn")(u_BxTxD, cache, rotation, segments_BxT)
        x_BxTxD += y_BxTxD
        x_BxTxD += LlamaMLP(cfg, name="mlp")(norm(name="post_norm")(x_BxTxD))
        return x_BxTxD, cache


class Llama(nn.Module):
    """Tokens to hidden states; the head is a method of its own, so that a loss need not make (B, T, V) logits."""

    cfg: LlamaConfig
    block = Block  # no field: what a layer is

    def setup(self):
        cfg = self.cfg
        table_init = padded_normal(cfg.vocab_size, cfg.init_std)
        self.embed_tokens = Embed(cfg.table_rows, cfg.n_embd, table_init, cfg.dtype, cfg.param_dtype)
        self.layers = Stack(self.block, cfg, cfg.n_layer, cfg.remat, cfg.unroll_layers)
        self.norm = RMSNorm(cfg.norm_eps, cfg.dtype, cfg.param_dtype)
        if not cfg.tie_head:
            self.lm_head = Head(cfg.vocab_size, cfg.table_rows, cfg.n_embd, cfg.param_dtype, cfg.init_std)

    def __call__(self, tokens_BxT, state: KVCache | None = None, segments_BxT=None, deterministic: bool = True):
        """Hidden states (B, T, D) in the compute dtype, and the cache of all layers (leading axis L) for what follows.

        Args:
          tokens_BxT: int32, T <= block_size; they follow those that `state` has seen.
          state: None (training), or `initial_state` or what an earlier call returned.
          segments_BxT: int32; a token sees those of its own segment alone. Examples packed into a row need no more than
            that: positions count by their differences. Without a state only.
        """
        return self.hidden(tokens_BxT, state, deterministic, segments_BxT)

    def hidden(self, tokens_BxT, state, deterministic, segments_BxT, *more):
        """What __call__ returns; `more` is for the blocks of those that are Llamas with something on top."""
        T = tokens_BxT.shape[1]
        if T > self.cfg.block_size:
            raise ValueError(f"{T} tokens exceed block_size={self.cfg.block_size}")
        if state is not None and segments_BxT is not None:
            raise ValueError("segments_BxT: a cache does not know the segments of its keys; pack without a state")
        first = 0 if state is None else state.length[0]
        rotation = rope.rotation(first, T, self.cfg.rope_frequencies)
        x_BxTxD, state = self.layers(
            self.embed_tokens(tokens_BxT), state, rotation, segments_BxT, *more, deterministic=deterministic
        )
        if not self.cfg.tie_head:
            self.lm_head.rows_VxD()  # else `init`, which only runs this method, would not make it
        return self.norm(x_BxTxD), state

    @property
    def context(self) -> int:
        """Tokens that it can read back to."""
        return self.cfg.block_size

    def head_VxD(self):
        return self.embed_tokens.embedding if self.cfg.tie_head else self.lm_head.rows_VxD()

    def initial_state(self, batch: int, tokens: int | None = None) -> KVCache:
        """An empty cache for so many tokens (T; None: block_size), all layers: 2 L T G K sizeof(dtype) bytes a sequence."""
        cfg, tokens = self.cfg, tokens or self.cfg.block_size
        return KVCache.of_layers(cfg.n_layer, batch, tokens, cfg.n_kv_head, cfg.key_size, dtype=cfg.dtype)
