"""Instructions and their answers as a source of batches: several examples a row, of which none sees another."""

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxvram.data import prompt_styles
from jaxvram.data.conversations import KINDS, Conversation, python_functions, read_conversations
from jaxvram.data.order import SPLITS, generator
from jaxvram.data.packing import Packing
from jaxvram.data.prompt_styles import Message, Segment
from jaxvram.data.text import named_tokenizer
from jaxvram.data.tokenizers import CharTokenizer
from jaxvram.errors import UserError, nearest

LOSS_ON = ("responses", "all")
DIVISION = 2**63  # number of the draw that divides the examples; no run gets to so many epochs


class InstructionSource:
    """Rows of `block_size` tokens made of whole examples; every example once an epoch.

    Batches have "segments" (int32, B x T) where examples are packed: 1, 2, ... for the examples of a row, 0 for the
    padding at its end, which is token 0 and not learnt. The last token of an example predicts nothing.
    An example is cut at block_size; where that leaves nothing of its answers, it is left out.

    Args:
      encoded: {"train", "val"} -> [(ids int32 (N,), is_response bool (N,))].
      prompt: a user's message and the pairs (message, answer) before it -> the ids up to where the answer begins.
      end_ids: ids that end an answer.
    """

    def __init__(
        self, encoded, tokenizer, prompt, end_ids, block_size: int, seed: int, loss_on: str, pack: bool, what: str
    ):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.sequence_length = self.example_size = block_size
        self.seed, self.pack = seed, pack
        self.prompt_ids, self.end_ids = prompt, end_ids
        self._examples, self._packing, cut, dropped, count = {}, {}, 0, 0, 0
        for name in SPLITS:
            kept = []
            for ids_N, is_response_N in encoded[name]:
                count += 1
                if is_response_N[:block_size].any():
                    cut += len(ids_N) > block_size
                    kept.append(_example(ids_N[:block_size], is_response_N[:block_size] | (loss_on == "all")))
                else:
                    dropped += 1
            if not kept:
                raise UserError(
                    f"{what}: of {len(encoded[name]):,} examples of the {name} split none has an answer that begins within "
                    f"model.block_size={block_size} tokens; take a greater one, or shorter prompts"
                )
            self._examples[name] = kept
            self._packing[name] = Packing(np.array([len(tokens) for tokens, _ in kept]), block_size, pack)
        self._arranged = functools.lru_cache(maxsize=4)(self._arrange)
        self.description = self._describe(what, count, cut, dropped)

    def _describe(self, what: str, count: int, cut: int, dropped: int) -> str:
        train, rows = self._examples["train"], self._packing["train"].rows
        full = sum(len(tokens) for tokens, _ in train) / (rows * self.sequence_length)
        parts = [
            f"{what}: {len(train):,} examples to train on, {len(self._examples['val']):,} held out",
            f"an epoch is {rows:,} rows of {self.sequence_length:,} tokens, {full:.0%} full",
        ]
        if cut:
            parts.append(f"{cut:,} of {count:,} examples cut at {self.sequence_length:,} tokens")
        if dropped:
            parts.append(f"{dropped:,} of {count:,} left out, since that would cut all of the answer")
        return "; ".join(parts)

    def _arrange(self, split: str, epoch: int) -> list[np.ndarray]:
        return self._packing[split].arranged(generator(self.seed, split, epoch))

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """{"tokens", "targets"[, "segments"]}: int32 (rows, block_size), a function of (seed, split, n) alone."""
        numbers = [n * batch_size + b for b in range(batch_size)[rows]]
        shape = (len(numbers), self.sequence_length)
        tokens_BxT, segments_BxT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        targets_BxT = np.full(shape, -1, np.int32)
        for b, number in enumerate(numbers):
            epoch, row = divmod(number, self._packing[split].rows)
            start = 0
            for segment, example in enumerate(self._arranged(split, epoch)[row], 1):
                tokens_N, targets_N = self._examples[split][example]
                there = (b, slice(start, start := start + len(tokens_N)))
                tokens_BxT[there], targets_BxT[there], segments_BxT[there] = tokens_N, targets_N, segment
        batch = {"tokens": tokens_BxT, "targets": targets_BxT}
        return batch | {"segments": segments_BxT} if self.pack else batch

    def until_end(self, ids_N: np.ndarray) -> np.ndarray:
        """`ids_N` up to where an answer ends."""
        ends = np.flatnonzero(np.isin(ids_N, self.end_ids))
        return ids_N[: ends[0]] if len(ends) else ids_N


def _example(ids_N: np.ndarray, is_learnt_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, targets), both int32 (N,)."""
    targets_N = np.full(len(ids_N), -1, np.int32)
    targets_N[:-1] = np.where(is_learnt_N[1:], ids_N[1:], -1)
    return ids_N.astype(np.int32), targets_N


def load_instructions(cfg, block_size: int, seed: int) -> InstructionSource:
    """The source of data.name='instructions': data.path if given, else data.dataset=offline."""
    for field, options in (("prompt_style", prompt_styles.STYLES), ("loss_on", LOSS_ON)):
        if (value := getattr(cfg, field)) not in options:
            raise UserError(f"data.{field}={value!r} is unknown{nearest(value, options)}")
    if cfg.path is None and cfg.dataset != "offline":
        raise UserError(
            f"data.name=instructions needs data.path ({KINDS}), or data.dataset=offline (functions of Python's library)"
        )
    conversations = python_functions() if cfg.path is None else read_conversations(Path(cfg.path).expanduser())
    what = "functions of Python's library" if cfg.path is None else str(cfg.path)
    if len(conversations) < 2:
        raise UserError(f"{what} has one example; at least two are needed, since one is held out")
    segments_of = lambda c: _segments(cfg, c)
    tokenizer = _tokenizer(cfg, map(segments_of, conversations))
    prompt_styles.check_style(cfg.prompt_style, tokenizer)
    held_out = min(max(1, round(len(conversations) * cfg.val_fraction)), len(conversations) - 1)
    order = generator(seed, "val", DIVISION).permutation(len(conversations))  # the same for every seed
    encoded = lambda indices: [prompt_styles.encode(segments_of(conversations[i]), tokenizer) for i in indices]
    return InstructionSource(
        {"train": encoded(order[held_out:]), "val": encoded(order[:held_out])},
        tokenizer,
        lambda message, said=(): prompt_styles.encode(prompt_segments(cfg, message, said), tokenizer)[0],
        prompt_styles.end_ids(cfg.prompt_style, tokenizer),
        block_size, seed, cfg.loss_on, cfg.pack, what,
    )  # fmt: skip


def _segments(cfg, conversation: Conversation) -> list[Segment]:
    try:
        return prompt_styles.segments_of(cfg.prompt_style, cfg.system, conversation.messages)
    except UserError as error:
        raise UserError(f"{conversation.where}: {error}") from error


def prompt_segments(cfg, message: str, said: Iterable[tuple[str, str]] = ()) -> list[Segment]:
    """A user's message after those that were answered, up to where the answer begins.

    A style that has no place for more than one turn knows nothing of what was said.
    """
    said = said if prompt_styles.STYLES[cfg.prompt_style].several_turns else ()
    turns = [Message(role, text) for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)]
    return prompt_styles.segments_of(cfg.prompt_style, cfg.system, [*turns, Message("user", message)])


def _tokenizer(cfg, conversations):
    """The tokenizer that the data names; characters get one more, in no text, to end answers with."""
    if cfg.tokenizer != "char":
        return named_tokenizer(cfg.tokenizer, cfg.vocab_path, cfg.download)
    seen = {"\n"}.union(*(s.text for segments in conversations for s in segments if not s.is_special))
    end = next(c for c in map(chr, itertools.count(4)) if c not in seen)  # U+0004 is ASCII's end of transmission
    tokenizer = CharTokenizer("".join(sorted(seen | {end})))
    tokenizer.eos = int(tokenizer.encode(end)[0])
    return tokenizer
