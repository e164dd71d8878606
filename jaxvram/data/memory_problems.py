"""Problems that ask for memory chosen by content, made on the fly.

Selective copying and induction are Mamba's two (Gu & Dao 2023, arXiv:2312.00752, section 4.1), associative recall is that of
Arora et al. 2023 (arXiv:2312.04927). Targets are -1 but for the answers. The `length` that is trained on need not be that of
the exam: a recurrent model reads on.
"""

import numpy as np

from jaxvram.data.order import generator
from jaxvram.data.problems import EXAM, shifted
from jaxvram.data.tokenizers import CharTokenizer
from jaxvram.errors import UserError

SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Latin, Greek and Russian letters, each of which has one capital
SMALL = "".join(map(chr, (*range(0x61, 0x7B), *range(0x3B1, 0x3C2), *range(0x3C3, 0x3CA), *range(0x430, 0x450))))


class _MemoryProblems:
    """What both have in common; a subclass draws `_problems(rng, count, length) -> (questions, answers)`."""

    def __init__(self, name: str, length: int, exam_length: int, vocab: int, answer_length: int, extra: str, seed):
        self.length, self.exam_length, self.seed = length, exam_length or length, seed
        if not 2 <= vocab <= len(SYMBOLS):
            raise UserError(f"data.symbols={vocab} must lie in 2..{len(SYMBOLS)}")
        self.vocab = vocab
        self.tokenizer = CharTokenizer(SYMBOLS[:vocab] + extra, name)
        self.vocab_size = vocab + len(extra)
        self.sequence_length = self._question_length(length) + answer_length - 1
        self.example_size = self.sequence_length

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        question_BxP, answer_BxA = self._problems(generator(self.seed, split, n), batch_size, self.length)
        return shifted(question_BxP[rows], answer_BxA[rows])

    def problems(self, split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """`limit` questions of exam_length and their answers."""
        return self._problems(generator(self.seed, split, EXAM), limit, self.exam_length)


class SelectiveCopying(_MemoryProblems):
    """`remembered` tokens scattered among `length` blanks, then a mark: to be told again in their order.

    As a language model's problem: while it answers it reads its own answers, where the paper's models read marks.
    """

    def __init__(self, length: int, exam_length: int, symbols: int, remembered: int, seed: int):
        if not 1 <= remembered <= min(length, exam_length or length):
            raise UserError(f"data.remembered={remembered} must lie in 1..data.length={length}")
        self.remembered = remembered
        super().__init__("copying", length, exam_length, symbols, remembered, ".>", seed)
        self.description = f"telling again {remembered} of {symbols} symbols scattered over {length} places"

    @staticmethod
    def _question_length(length: int) -> int:
        return length + 1

    def _problems(self, rng, count: int, length: int):
        blank, mark = self.vocab, self.vocab + 1
        answer_NxA = rng.integers(self.vocab, size=(count, self.remembered), dtype=np.int32)
        places_NxA = np.sort(rng.random((count, length)).argpartition(self.remembered - 1)[:, : self.remembered])
        question_NxP = np.full((count, length + 1), blank, np.int32)
        np.put_along_axis(question_NxP, places_NxA, answer_NxA, axis=1)
        question_NxP[:, -1] = mark
        return question_NxP, answer_NxA


class InductionHeads(_MemoryProblems):
    """Random symbols, among them once a mark; at the end the mark again: what followed it? (Olsson et al. 2022)."""

    def __init__(self, length: int, exam_length: int, symbols: int, seed: int):
        if min(length, exam_length or length) < 4:
            raise UserError(f"data.length={length} must be at least 4 for the induction problem")
        super().__init__("induction", length, exam_length, symbols, 1, ">", seed)
        self.description = f"what followed the mark among {length} of {symbols} symbols"

    @staticmethod
    def _question_length(length: int) -> int:
        return length

    def _problems(self, rng, count: int, length: int):
        question_NxP = rng.integers(self.vocab, size=(count, length), dtype=np.int32)
        place_Nx1 = rng.integers(length - 2, size=(count, 1))  # so that a symbol follows before the end
        np.put_along_axis(question_NxP, place_Nx1, self.vocab, axis=1)
        question_NxP[:, -1] = self.vocab
        return question_NxP, np.take_along_axis(question_NxP, place_Nx1 + 1, axis=1)


class AssociativeRecall:
    """Multi-query associative recall: pairs of a key and a value are told, then each key comes again: what is its value?

    A row of `length` + 1 tokens: `pairs` different keys, each with a value drawn freely; then the same keys in another
    order, their values behind them, and blanks between one pair and the next wherever there is room. The paper spreads its
    queries by a power law and fills with random tokens; here all places are as likely. An exam (`exam`) is read at once,
    with its answers, and each of its targets is a question.
    """

    def __init__(self, length: int, exam_length: int, symbols: int, pairs: int, seed: int):
        self.length, self.exam_length, self.pairs, self.seed = length, exam_length or length, pairs, seed
        if not 2 <= symbols <= len(SMALL):
            raise UserError(f"data.symbols={symbols} must lie in 2..{len(SMALL)} for the recall problem")
        if not 1 <= pairs <= min(symbols, (min(length, self.exam_length) + 1) // 4):
            raise UserError(
                f"data.remembered={pairs} pairs need as many keys (data.symbols={symbols}) and 4 tokens each, less one "
                f"(data.length={length}, data.exam_length={exam_length})"
            )
        self.symbols = symbols
        self.tokenizer = CharTokenizer(SMALL[:symbols] + SMALL[:symbols].upper() + ".", "recall")
        self.vocab_size = 2 * symbols + 1
        self.sequence_length = self.example_size = length
        self.description = f"recalling the values of {pairs} of {symbols} keys, in rows of {length} tokens"

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        tokens, targets = self._rows(generator(self.seed, split, n), batch_size, self.length)
        return {"tokens": tokens[rows], "targets": targets[rows]}

    def exam(self, split: str, limit: int) -> dict[str, np.ndarray]:
        """A batch of `limit` rows of exam_length, of which each target is a question."""
        tokens, targets = self._rows(generator(self.seed, split, EXAM), limit, self.exam_length)
        return {"tokens": tokens, "targets": targets}

    def _rows(self, rng, count: int, length: int):
        P, blanks = self.pairs, length + 1 - 4 * self.pairs
        key_NxP = rng.random((count, self.symbols)).argsort(axis=1)[:, :P]
        value_NxP = self.symbols + rng.integers(self.symbols, size=(count, P))
        told_NxPx2 = np.stack([key_NxP, value_NxP], axis=-1)
        asked_NxPx2 = np.take_along_axis(told_NxPx2, rng.random((count, P)).argsort(axis=1)[..., None], axis=1)
        # a question takes two places, so its key stands one further for each question before it
        drawn_NxP = np.sort(rng.random((count, blanks + P)).argsort(axis=1)[:, :P])
        place_NxP = 2 * P + drawn_NxP + np.arange(P)
        row_NxL = np.full((count, length + 1), 2 * self.symbols, np.int32)
        row_NxL[:, : 2 * P] = told_NxPx2.reshape(count, 2 * P)
        np.put_along_axis(row_NxL, place_NxP, asked_NxPx2[..., 0].astype(np.int32), axis=1)
        np.put_along_axis(row_NxL, place_NxP + 1, asked_NxPx2[..., 1].astype(np.int32), axis=1)
        targets_NxT = np.full((count, length), -1, np.int32)
        np.put_along_axis(targets_NxT, place_NxP, asked_NxPx2[..., 1].astype(np.int32), axis=1)
        return row_NxL[:, :-1].copy(), targets_NxT
