"""Text from a language model as it comes, for one sequence: a token a call, the model's state kept between answers."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.errors import UserError
from jaxvram.sample.text import SampleConfig, choose, decoder, decoder_params


class Stream:
    """What a model has read, and what it says next.

    Args:
      model: of the language model protocol, with `params` on the device.
      cfg: how tokens are drawn, and how many at the most an answer has.
      vocab_size: tokens from here on are never drawn.
    """

    def __init__(self, model, params, cfg: SampleConfig, vocab_size: int):
        self.context, self.cfg, self._draws = model.context, cfg, 0
        self.seen: list[int] = []  # what the state holds
        self._params = jax.jit(functools.partial(decoder_params, model))(params)
        model = decoder(model)
        self._empty = jax.jit(lambda params: model.apply({"params": params}, 1, method="initial_state"))
        self._state = None

        @functools.partial(jax.jit, donate_argnums=2)
        def read(params, tokens_1xP, state, key):
            hidden_1xPxD, state = model.apply({"params": params}, tokens_1xP, state)
            head_VxD = model.apply({"params": params}, method="head_VxD")
            logits_1xV = jnp.einsum("bd,vd->bv", hidden_1xPxD[:, -1], head_VxD, preferred_element_type=jnp.float32)
            return choose(key, logits_1xV[:, :vocab_size], cfg.temperature, cfg.top_k, cfg.top_p)[0], state

        self._read = read

    def answer(self, ids_P, end_ids=()) -> Iterator[int]:
        """Tokens that follow `ids_P`, until one of `end_ids` (not among them), cfg.max_new_tokens, or the context's end.

        Where `ids_P` begins with all that was read and said before, that is not read again.

        Raises:
          UserError: `ids_P` fills the model's context.
        """
        ids = [int(i) for i in ids_P]
        if self.context is not None and len(ids) >= self.context:
            raise UserError(f"the conversation has {len(ids)} tokens, and the model reads {self.context}; begin a new one")
        if self._state is None or self.seen != ids[: len(self.seen)] or len(ids) == len(self.seen):
            self.seen, self._state = [], self._empty(self._params)
        token = self._feed(ids[len(self.seen) :])
        for more in reversed(range(self.cfg.max_new_tokens)):
            if token in end_ids:
                return
            yield token
            if not more or (self.context is not None and len(self.seen) >= self.context):
                return
            token = self._feed([token])

    def _feed(self, ids: list[int]) -> int:
        """Reads tokens, in pieces whose lengths are powers of two, so that few programs are compiled; the next one."""
        at = 0
        while at < len(ids):
            length = 1 << ((len(ids) - at).bit_length() - 1)
            piece_1xP = np.asarray([ids[at : at + length]], np.int32)
            key = jax.random.fold_in(jax.random.key(self.cfg.seed), self._draws)
            token, self._state = self._read(self._params, piece_1xP, self._state, key)
            at += length
        self._draws += 1
        self.seen += ids
        return int(token)


def pieces_of_text(tokens: Iterator[int], decode) -> Iterator[str]:
    """The text of a growing list of ids, piece by piece; a character whose bytes are not all there yet waits for them."""
    ids, told = [], ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if text.endswith("\ufffd"):
            continue
        yield text[len(told) :]
        told = text
    rest = decode(ids)[len(told) :]
    if rest:
        yield rest
