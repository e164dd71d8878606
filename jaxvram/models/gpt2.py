"""GPT-2 (Radford et al. 2019), as nanoGPT, minGPT and llm.c have it; where they differ, a field says so.

x_0 = wte[token] + wpe[position];  x += attn(ln_1(x));  x += mlp(ln_2(x));  logits = ln_f(x_L) . head^T.
Every matrix and table ~ N(0, 0.02); the two that write to the residual stream, c_proj, ~ N(0, 0.02 / sqrt(2 L)).
Read: nanoGPT 3adf61e, minGPT 37baab7, llm.c f1e2ace. Parameter names are OpenAI's.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp

from jaxvram.errors import UserError, nearest
from jaxvram.kernels.backend import IMPLEMENTATIONS
from jaxvram.layers.attention import KVCache, SelfAttention
from jaxvram.layers.embeddings import Embed, Head, padded_normal
from jaxvram.layers.linear import Linear
from jaxvram.layers.mlp import ACTIVATIONS, MLP
from jaxvram.layers.norms import LayerNorm
from jaxvram.layers.stack import REMAT, Stack


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    vocab_size: int = 50257  # V; 0: as many as the data has
    vocab_multiple: int = 1  # rows of the table are rounded up to this; padding is zero, never scored, never sampled
    block_size: int = 1024  # T, longest context
    n_layer: int = 12  # L
    n_head: int = 12  # H
    n_embd: int = 768  # D
    dropout: float = 0.0  # of embeddings, probabilities, and both branches
    bias: bool = True  # in matrices and norms; nanoGPT trains without
    activation: str = "gelu_tanh"  # gelu_tanh: OpenAI, minGPT, llm.c | gelu: nanoGPT (erf)
    tie_head: bool = True  # head = wte; minGPT unties them
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of parameters
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: attention and loss

    def __post_init__(self):
        for field, valid in (("activation", ACTIVATIONS), ("remat", REMAT), ("kernels", IMPLEMENTATIONS)):
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, valid)}")
        for field in ("dtype", "param_dtype"):
            if (value := getattr(self, field)) not in ("bfloat16", "float32"):
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, ('bfloat16', 'float32'))}")
        if min(self.block_size, self.n_layer, self.n_head, self.n_embd, self.vocab_multiple) < 1 or self.vocab_size < 0:
            raise UserError("model: block_size, n_layer, n_head, n_embd and vocab_multiple must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"model.n_embd={self.n_embd} is not a multiple of model.n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} is not in [0, 1)")

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def _dense(cfg: GPT2Config):
    return functools.partial(Linear, use_bias=cfg.bias, dtype=cfg.dtype, param_dtype=cfg.param_dtype)


class Block(nn.Module):
    """x += attn(ln_1(x)); x += mlp(ln_2(x))."""

    cfg: GPT2Config

    @nn.compact
    def __call__(self, x_BxTxD, cache: KVCache | None, deterministic: bool = True):
        cfg = self.cfg
        normal = nn.initializers.normal(0.02)
        inits = {"kernel_init": normal, "proj_init": nn.initializers.normal(0.02 / (2 * cfg.n_layer) ** 0.5)}
        norm = functools.partial(LayerNorm, use_bias=cfg.bias, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        attn = SelfAttention(cfg.n_head, _dense(cfg), **inits, dropout=cfg.dropout, kernels=cfg.kernels, name="attn")
        mlp = MLP(4 * cfg.n_embd, cfg.activation, _dense(cfg), **inits, dropout=cfg.dropout, name="mlp")
        y_BxTxD, cache = attn(norm(name="ln_1")(x_BxTxD), cache, deterministic)
        x_BxTxD += y_BxTxD
        x_BxTxD += mlp(norm(name="ln_2")(x_BxTxD), deterministic)
        return x_BxTxD, cache


class GPT2(nn.Module):
    """Tokens to hidden states; the head is a method of its own, so that a loss need not make (B, T, V) logits."""

    cfg: GPT2Config

    def setup(self):
        cfg = self.cfg
        dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        self.wte = Embed(cfg.table_rows, cfg.n_embd, padded_normal(cfg.vocab_size), **dtypes)
        self.wpe = Embed(cfg.block_size, cfg.n_embd, nn.initializers.normal(0.02), **dtypes)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = Stack(Block, cfg, cfg.n_layer, cfg.remat, cfg.unroll_layers)
        self.ln_f = LayerNorm(use_bias=cfg.bias, **dtypes)
        if not cfg.tie_head:
            self.lm_head = Head(cfg.vocab_size, cfg.table_rows, cfg.n_embd, cfg.param_dtype)

    def __call__(self, tokens_BxT, state: KVCache | None = None, deterministic: bool = True):
        """Hidden states (B, T, D) in the compute dtype, and the cache of all layers (leading axis L) for what follows.

        Args:
          tokens_BxT: int32, T <= block_size; they follow those that `state` has seen.
          state: None (training), or `initial_state` or what an earlier call returned.
        """
        T = tokens_BxT.shape[1]
        if T > self.cfg.block_size:
            raise ValueError(f"{T} tokens exceed block_size={self.cfg.block_size}")
        first = 0 if state is None else state.length[0]
        x_BxTxD = self.wte(tokens_BxT) + self.wpe(first + jnp.arange(T))
        x_BxTxD, state = self.h(
            self.drop(x_BxTxD, deterministic=deterministic), state, deterministic=deterministic
        )
        if not self.cfg.tie_head:
            self.lm_head.rows_VxD()  # else `init`, which only runs this method, would not make it
        return self.ln_f(x_BxTxD), state

    @property
    def context(self) -> int:
        """Tokens that it can read back to."""
        return self.cfg.block_size

    def head_VxD(self):
        return self.wte.embedding if self.cfg.tie_head else self.lm_head.rows_VxD()

    def initial_state(self, batch: int, tokens: int | None = None) -> KVCache:
        """An empty cache for so many tokens (T; None: block_size), all layers: 2 L T D sizeof(dtype) bytes a sequence."""
        cfg, tokens = self.cfg, tokens or self.cfg.block_size
        return KVCache.of_layers(cfg.n_layer, batch, tokens, cfg.n_head, cfg.n_embd // cfg.n_head, dtype=cfg.dtype)
