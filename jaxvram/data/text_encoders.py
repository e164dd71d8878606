"""Captions to the features that a denoiser reads, by a text encoder that is not trained with it.

An encoder is alone on the card, and only while it encodes. CLIP's and small ones lie there whole. Of a T5, which may be
larger than the card (XXL: 8.9 GiB in bf16) and than the memory, one layer is read from the files at a time: the hidden
states of a chunk of captions wait in the host's memory, and all pass through it while the next is read. So no more than
two layers are ever on the card, and each is read once a chunk.
"""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.convert import text_encoder as convert
from jaxvram.data.caption_tokenizers import ByteTokens, CLIPTokens, T5Tokens
from jaxvram.errors import UserError
from jaxvram.models.text_encoder import CLIPTextConfig, T5Block, T5Config, T5Encoder

__all__ = ["ByteTokens", "TextEncoder", "load_text_encoder", "programs"]

T5_LENGTH = 120  # tokens, as PixArt-alpha was trained; T5 itself has no limit
BATCH = 32  # captions a call of a program
CHUNK_BYTES = 2 * 1024**3  # of hidden states that wait on the host: 1,092 captions of T5-XXL


def load_text_encoder(folder, length: int | None = None) -> "TextEncoder":
    """The text encoder in `folder`, none of its weights read yet but a sample that tells it from another.

    Args:
      folder: CLIP's or T5's in Hugging Face's layout, a pipeline's folder with text_encoder/ and tokenizer/ in it, or a
        small one that --mode=export wrote.
      length: S, tokens of a caption; None: what the encoder was made for (CLIP 77, T5 120). T5 alone can read more.
    Raises:
      UserError: no text encoder, one that is not known, no tokenizer, or a length that it cannot read.
    """
    return TextEncoder(convert.find(folder), length)


class TextEncoder:
    """`identity`, `length` S, `width` E and `encode`."""

    def __init__(self, found: convert.TextFolder, length: int | None = None):
        self._found, self._cfg = found, found.cfg
        self.length, self.width = length_of(found, length), found.cfg.n_embd
        self._tokens = _tokenizer(found, self.length)
        self.identity = {"name": found.name, "fingerprint": self._fingerprint()}

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(float16 (N, S, E), int32 (N,) how many tokens of each caption count); nought behind them.

        Raises:
          UserError: a caption is too long (before any weight is read), or features that float16 cannot hold.
        """
        tokens_NxS, length_N = self._tokens.encode(captions)
        out_NxSxE = np.zeros((len(captions), self.length, self.width), np.float16)
        if not captions:
            return out_NxSxE, length_N
        weights = convert.TextWeights(self._found)
        run = _layer_by_layer if isinstance(self._cfg, T5Config) else _whole
        for start, context_BxSxE in run(weights, self._cfg, tokens_NxS, length_N):
            rows = slice(start, start + len(context_BxSxE))
            counts_BxSx1 = (np.arange(self.length) < length_N[rows, None])[..., None]
            context_BxSxE = np.where(counts_BxSx1, context_BxSxE, 0)
            if not np.abs(context_BxSxE).max() <= np.finfo(np.float16).max:  # nor NaN
                raise UserError(f"the {self._found.name} in {self._found.path} gave features that float16 cannot hold")
            out_NxSxE[rows] = context_BxSxE
        return out_NxSxE, length_N

    def check(self, captions: list[str]) -> None:
        """Raises the UserError that `encode` would for one that is too long."""
        self._tokens.encode(captions)

    def _fingerprint(self) -> str:
        """Of its sizes, its tokenizer and some rows of every tensor: reading all of T5-XXL would take half a minute."""
        digest = hashlib.sha256(repr((self._cfg, self._tokens.identity)).encode())
        for name, shape, rows in convert.TextWeights(self._found).sampled():
            digest.update(f"{name} {shape} {rows.dtype}".encode() + np.ascontiguousarray(rows).tobytes())
        return digest.hexdigest()[:12]


def length_of(found: convert.TextFolder, length: int | None = None) -> int:
    """S: the length asked for, or the usual one. UserError: the encoder has no positions for so many tokens."""
    limit = None if isinstance(found.cfg, T5Config) else found.cfg.length
    length = length or limit or T5_LENGTH
    if length < 2 or (limit and length > limit):
        raise UserError(f"context_length={length}: the {found.name} in {found.path} reads 2 to {limit or 'any'} tokens")
    return length


def _tokenizer(found: convert.TextFolder, length: int):
    cfg = found.cfg
    if isinstance(cfg, T5Config):
        return T5Tokens(found.tokenizer, length, cfg.vocab_size)
    if isinstance(cfg, CLIPTextConfig):
        return CLIPTokens(found.tokenizer, length, cfg.vocab_size)
    if cfg.vocab_size != ByteTokens.vocab_size:
        raise UserError(f"{found.path}: a small text encoder of {cfg.vocab_size} tokens; bytes have {ByteTokens.vocab_size}")
    return ByteTokens(length)


def _batches(count: int):
    """(first row, rows) of batches of one size: the last repeats its first row, for one compiled program."""
    for start in range(0, count, BATCH):
        rows = np.arange(start, start + BATCH)
        yield start, np.where(rows < count, rows, start)


@functools.cache
def _forward(cfg):
    module = convert.MODULE_OF[type(cfg)](cfg)
    return jax.jit(lambda params, tokens, length: module.apply({"params": params}, tokens, length).astype(jnp.float32))


def _whole(weights: convert.TextWeights, cfg, tokens_NxS, length_N):
    """(first row, fp32 features) of one batch after the other, all weights on the device until the last."""
    params = jax.device_put(weights.whole())
    for start, rows in _batches(len(tokens_NxS)):
        yield start, np.asarray(_forward(cfg)(params, tokens_NxS[rows], length_N[rows]))[: len(tokens_NxS) - start]


@functools.cache
def _parts(cfg: T5Config):
    """(start, layer, finish) of a T5, compiled; the hidden states' memory is handed on."""
    module, block = T5Encoder(cfg), T5Block(cfg)
    start = lambda params, tokens: module.apply({"params": params}, tokens, method="start")
    layer = lambda params, x, bias, length: block.apply({"params": params}, x, None, bias, length)[0]
    finish = lambda params, x: module.apply({"params": params}, x, method="finish")
    return jax.jit(start), jax.jit(layer, donate_argnums=1), jax.jit(finish, donate_argnums=1)


def _layer_by_layer(weights: convert.TextWeights, cfg: T5Config, tokens_NxS, length_N):
    """As `_whole`, with two layers on the device at the most."""
    N, S = tokens_NxS.shape
    chunk = max(1, CHUNK_BYTES // (BATCH * S * cfg.n_embd * 4)) * BATCH
    for first in range(0, N, chunk):
        here = slice(first, first + chunk)
        for start, context_BxSxE in _chunk_by_layer(weights, cfg, tokens_NxS[here], length_N[here]):
            yield first + start, context_BxSxE


def _chunk_by_layer(weights: convert.TextWeights, cfg: T5Config, tokens_NxS, length_N):
    start_of, layer_of, finish_of = _parts(cfg)
    batches, states = list(_batches(len(tokens_NxS))), []
    outer = jax.device_put(weights.outer())
    for _, rows in batches:
        x_BxSxE, bias_HxSxS = start_of(outer, tokens_NxS[rows])
        states.append(np.asarray(x_BxSxE))
    outer = {"norm": outer["norm"]}  # the table of tokens can go
    read = lambda index: jax.device_put(weights.layer(index)) if index < cfg.n_layer else None
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for index in range(cfg.n_layer):
            params = ahead.result()
            ahead = reader.submit(read, index + 1)
            for number, (_, rows) in enumerate(batches):
                states[number] = np.asarray(layer_of(params, states[number], bias_HxSxS, length_N[rows]))
            del params
    for (start, _), x_BxSxE in zip(batches, states, strict=True):
        yield start, np.asarray(finish_of(outer, x_BxSxE))[: len(tokens_NxS) - start]


def programs(found: convert.TextFolder, length: int | None = None) -> dict[str, tuple]:
    """What encoding runs: name -> (function, shapes of its arguments, which of them are donated), from config.json alone.

    The one of a T5's layer carries a second layer's weights along: those that are read meanwhile.
    """
    cfg, S = found.cfg, length_of(found, length)
    tokens, lengths = jax.ShapeDtypeStruct((BATCH, S), jnp.int32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    module = convert.MODULE_OF[type(cfg)](cfg)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"])
    if not isinstance(cfg, T5Config):
        return {"captions": (_forward(cfg).__wrapped__, (shapes, tokens, lengths), ())}
    start, layer, _ = (part.__wrapped__ for part in _parts(cfg))
    outer = {name: x for name, x in shapes.items() if name != "blocks"}
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["blocks"])
    x, bias = jax.eval_shape(start, outer, tokens)
    with_the_next = lambda params, next_params, x, bias, length: (layer(params, x, bias, length), next_params)
    return {
        "tokens": (start, (outer, tokens), ()),
        "layer": (with_the_next, (one, one, x, bias, lengths), (1, 2)),
    }
