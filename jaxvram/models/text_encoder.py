"""Encoders of captions: a small transformer trained with a denoiser, CLIP's (Radford et al. 2021, arXiv:2103.00020), T5's.

The first two are one transformer: x_0 = token[ids] + position;  x += attn(norm(x));  x += mlp(norm(x));  norm(x_L).
CLIP's is causal with x sigmoid(1.702 x) in its MLPs; what Stable Diffusion reads is the hidden states of all positions.
The small one sees a whole caption at once, and learns with the denoiser, as latent diffusion's (arXiv:2112.10752) did.
It may know runs of bytes as well (Pagnoni et al. 2024, arXiv:2412.09871): x_0 += sum_n table_n[hash(n last ids)].

T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202), its encoder alone:
  x_0 = token[ids];  x += attn(rms(x));  x += (gelu(rms(x) W_g) * (rms(x) W_u)) W_o;  rms(x_L);  no bias anywhere.
Scores are q . k + b[head, bucket(s - t)], without 1 / sqrt(K); one table b serves all layers.
Written from the papers, the numbers compared with transformers 5.24.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.errors import UserError, nearest
from jaxvram.kernels.backend import IMPLEMENTATIONS
from jaxvram.layers.attention import SelfAttention
from jaxvram.layers.embeddings import Embed
from jaxvram.layers.linear import Linear
from jaxvram.layers.mlp import ACTIVATIONS, GATED, MLP
from jaxvram.layers.norms import LayerNorm, RMSNorm
from jaxvram.layers.stack import REMAT, Stack

HASH_FACTOR = 2_654_435_761  # the odd number next to 2^32 / golden ratio


@dataclasses.dataclass(frozen=True)
class SmallTextConfig:
    """Of `SmallTextEncoder`; the defaults read bytes (data/text_encoders.py) of captions like "a small red circle"."""

    vocab_size: int = 259  # V
    length: int = 64  # S, longest caption in tokens, what marks its ends included
    n_layer: int = 4  # L
    n_head: int = 4  # H
    n_embd: int = 256  # E: of the features that a denoiser reads, too
    mlp_width: int = 0  # F; 0: 4 E
    causal: bool = False  # a token sees those before it only
    activation: str = "gelu"  # of the MLP: gelu | gelu_tanh | quick_gelu
    ngrams: tuple[int, ...] = ()  # lengths of the runs of tokens that have embeddings too: words, where tokens are bytes
    ngram_rows: int = 4096  # of each length's table; runs share a row by their hash
    remat: str = "none"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU
    dtype: str = "bfloat16"  # of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of parameters
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: attention

    def __post_init__(self):
        _check_choices(self, {"remat": REMAT, "kernels": IMPLEMENTATIONS, "activation": ACTIVATIONS})
        sizes = (self.vocab_size, self.length, self.n_layer, self.n_head, self.n_embd, self.ngram_rows)
        if min(sizes) < 1 or self.mlp_width < 0:
            raise UserError("text encoder: vocab_size, length, n_layer, n_head, n_embd, ngram_rows must be at least 1")
        if len(set(self.ngrams)) < len(self.ngrams) or any(type(n) is not int or n < 2 for n in self.ngrams):
            raise UserError(f"text encoder: ngrams={self.ngrams} must be different whole numbers of at least 2")
        if self.n_embd % self.n_head:
            raise UserError(f"text encoder: n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(SmallTextConfig):
    """The defaults are ViT-L/14's, which Stable Diffusion 1 reads: 123,060,480 parameters."""

    vocab_size: int = 49408
    length: int = 77
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    causal: bool = True
    activation: str = "quick_gelu"


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The defaults are v1.1 XXL's encoder, which PixArt reads: 4,762,310,656 parameters."""

    vocab_size: int = 32128  # V
    n_layer: int = 24  # L
    n_head: int = 64  # H
    head_dim: int = 64  # K; H K need not be E
    n_embd: int = 4096  # E
    mlp_width: int = 10240  # F
    activation: str = "gelu_tanh"  # of the gate; what T5 calls gated-gelu | swish | gelu
    buckets: int = 32  # of distances between two tokens, half of them to either side
    max_distance: int = 128  # beyond it, all are in one bucket
    epsilon: float = 1e-6  # of norms
    remat: str = "none"
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"

    def __post_init__(self):
        _check_choices(self, {"remat": REMAT, "activation": GATED})
        sizes = (self.vocab_size, self.n_layer, self.n_head, self.head_dim, self.n_embd, self.mlp_width)
        if min(sizes) < 1 or self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise UserError("text encoder: every size must be at least 1, and buckets a multiple of 4")


def _check_choices(cfg, valid_of: dict):
    valid_of |= dict.fromkeys(("dtype", "param_dtype"), ("bfloat16", "float32"))
    for field, valid in valid_of.items():
        if (value := getattr(cfg, field)) not in valid:
            raise UserError(f"text encoder: {field}={value!r} is unknown{nearest(value, valid)}")


def _dense(cfg, **options):
    return functools.partial(Linear, dtype=cfg.dtype, param_dtype=cfg.param_dtype, **options)


class Block(nn.Module):
    """x += attn(ln_1(x)); x += mlp(ln_2(x)), keys behind each caption's end unseen."""

    cfg: SmallTextConfig

    @nn.compact
    def __call__(self, x_BxSxE, state, length_B, deterministic: bool = True):
        cfg = self.cfg
        inits = {
            "kernel_init": nn.initializers.normal(0.02),
            "proj_init": nn.initializers.normal(0.02 / (2 * cfg.n_layer) ** 0.5),
        }
        norm = functools.partial(LayerNorm, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        attn = SelfAttention(cfg.n_head, _dense(cfg), **inits, causal=cfg.causal, kernels=cfg.kernels, name="attn")
        mlp = MLP(cfg.mlp_width or 4 * cfg.n_embd, cfg.activation, _dense(cfg), **inits, name="mlp")
        x_BxSxE += attn(norm(name="ln_1")(x_BxSxE), key_lengths_B=length_B)[0]
        x_BxSxE += mlp(norm(name="ln_2")(x_BxSxE))
        return x_BxSxE, state


class SmallTextEncoder(nn.Module):
    """Captions as token ids to features of each token."""

    cfg: SmallTextConfig

    @nn.compact
    def __call__(self, tokens_BxS, length_B=None, deterministic: bool = True):
        """context_BxSxE in the compute dtype; what stands behind a caption's end means nothing.

        Args:
          tokens_BxS: int32, S at most cfg.length.
          length_B: int32, how many tokens of each count; None: all of them, padding too.
        """
        cfg, S = self.cfg, tokens_BxS.shape[1]
        if S > cfg.length:
            raise ValueError(f"captions of {S} tokens for a text encoder of {cfg.length}")
        dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        table = functools.partial(Embed, features=cfg.n_embd, embedding_init=nn.initializers.normal(0.02), **dtypes)
        x_BxSxE = table(cfg.vocab_size, name="token")(tokens_BxS)
        x_BxSxE += table(cfg.length, name="position")(jnp.arange(S))
        for n in cfg.ngrams:
            x_BxSxE += table(cfg.ngram_rows, name=f"ngram_{n}")(ngram_hash(tokens_BxS, n, cfg.ngram_rows))
        stack = Stack(Block, cfg, cfg.n_layer, cfg.remat, cfg.unroll_layers, name="blocks")
        x_BxSxE, _ = stack(x_BxSxE, None, length_B, deterministic=deterministic)
        return LayerNorm(**dtypes, name="norm")(x_BxSxE)


def ngram_hash(tokens_BxS, n: int, rows: int):
    """int32 (B, S) in [0, rows): of each token and the n - 1 before it, sum_j (token_{s-j} + 1) a^j mod 2^32, mod `rows`.

    In between, the high bits are folded into the low ones: else 2^k rows would see no more than k bits of each token.
    """
    B, S = tokens_BxS.shape
    ids_BxS = jnp.pad(tokens_BxS.astype(jnp.uint32) + 1, ((0, 0), (n - 1, 0)))  # nought: before the beginning
    hash_BxS = jnp.zeros((B, S), jnp.uint32)
    for j in range(n):
        hash_BxS = hash_BxS * jnp.uint32(HASH_FACTOR) + ids_BxS[:, j : j + S]
    mixed_BxS = (hash_BxS ^ (hash_BxS >> 15)) * jnp.uint32(HASH_FACTOR)
    return ((mixed_BxS ^ (mixed_BxS >> 16)) % jnp.uint32(rows)).astype(jnp.int32)


class CLIPText(SmallTextEncoder):
    """CLIP's: the same with a CLIPTextConfig. Stable Diffusion gives it no lengths, and reads all 77 positions."""


def bucket(distance, buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket of `distance` = key - query: exact for near ones, then by its logarithm; half for either side."""
    half, distance = buckets // 2, np.asarray(distance)
    near, away = half // 2, np.abs(distance)
    # in fp32, as T5 was trained: where the logarithm is whole, a wider type could round the other way
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(near))
    steps = (ratio / np.float32(math.log(max_distance / near)) * np.float32(half - near)).astype(np.int32)
    return np.where(away < near, away, np.minimum(near + steps, half - 1)) + half * (distance > 0)


class T5Attention(nn.Module):
    """Plain XLA: scores take a bias each, which kernels/attention.py has no place for, and nothing here asks for one.

    The encoder only ever runs without gradients on some 120 tokens: (B, H, S, S) scores of XXL take 3.5 MiB a caption.
    """

    cfg: T5Config

    @nn.compact
    def __call__(self, x_BxSxE, bias_HxSxS, length_B):
        cfg, (B, S, E) = self.cfg, x_BxSxE.shape
        H, K = cfg.n_head, cfg.head_dim
        qkv_BxSx3HK = _dense(cfg, use_bias=False)(3 * H * K, name="qkv")(x_BxSxE)
        q, k, v = (a.reshape(B, S, H, K) for a in jnp.split(qkv_BxSx3HK, 3, axis=-1))
        scores_BxHxSxS = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) + bias_HxSxS
        if length_B is not None:
            seen_BxS = jnp.arange(S) < length_B[:, None]
            scores_BxHxSxS = jnp.where(seen_BxS[:, None, None], scores_BxHxSxS, -1e30)
        p_BxHxSxS = jax.nn.softmax(scores_BxHxSxS, axis=-1).astype(v.dtype)
        o_BxSxHK = jnp.einsum("bhts,bshk->bthk", p_BxHxSxS, v).reshape(B, S, H * K)
        return _dense(cfg, use_bias=False)(E, name="proj")(o_BxSxHK)


class T5Block(nn.Module):
    """x += attn(rms(x)); x += mlp(rms(x)). x stays in fp32: T5's grows to thousands, where bf16 counts in eights."""

    cfg: T5Config

    @nn.compact
    def __call__(self, x_BxSxE, state, bias_HxSxS, length_B, deterministic: bool = True):
        cfg = self.cfg
        norm = functools.partial(RMSNorm, cfg.epsilon, cfg.dtype, cfg.param_dtype)
        dense = _dense(cfg, use_bias=False)
        x_BxSxE += T5Attention(cfg, name="attn")(norm(name="attn_norm")(x_BxSxE), bias_HxSxS, length_B).astype(jnp.float32)
        u_BxSxE = norm(name="mlp_norm")(x_BxSxE)
        gate_BxSxF, up_BxSxF = dense(cfg.mlp_width, name="gate")(u_BxSxE), dense(cfg.mlp_width, name="up")(u_BxSxE)
        y_BxSxE = dense(cfg.n_embd, name="down")(GATED[cfg.activation](gate_BxSxF, up_BxSxF))
        return x_BxSxE + y_BxSxE.astype(jnp.float32), state


class T5Encoder(nn.Module):
    """Captions as token ids to features of each token; `start`, `finish` and T5Block are its parts, layer by layer."""

    cfg: T5Config

    def setup(self):
        cfg = self.cfg
        normal = nn.initializers.normal(0.02)
        self.token = Embed(cfg.vocab_size, cfg.n_embd, normal, jnp.float32, cfg.param_dtype)
        self.relative = Embed(cfg.buckets, cfg.n_head, normal, jnp.float32, cfg.param_dtype)
        self.blocks = Stack(T5Block, cfg, cfg.n_layer, cfg.remat)
        self.norm = RMSNorm(cfg.epsilon, jnp.float32, cfg.param_dtype)

    def __call__(self, tokens_BxS, length_B=None):
        """context_BxSxE in fp32. Arguments as SmallTextEncoder has them; S is free."""
        x_BxSxE, bias_HxSxS = self.start(tokens_BxS)
        x_BxSxE, _ = self.blocks(x_BxSxE, None, bias_HxSxS, length_B)
        return self.finish(x_BxSxE)

    def start(self, tokens_BxS):
        """What the first layer reads (B, S, E), and what all add to their scores (H, S, S), both fp32."""
        place_S = np.arange(tokens_BxS.shape[1])
        bucket_SxS = bucket(place_S[None] - place_S[:, None], self.cfg.buckets, self.cfg.max_distance)
        return self.token(tokens_BxS), self.relative(bucket_SxS).transpose(2, 0, 1)

    def finish(self, x_BxSxE):
        return self.norm(x_BxSxE)
