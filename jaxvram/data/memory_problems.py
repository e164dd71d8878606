"""Two problems that ask for memory chosen by content (Gu & Dao 2023, arXiv:2312.00752, section 4.1), made on the fly.

Targets are -1 but for the answer. The `length` that is trained on need not be that of the exam: a recurrent model reads on.
"""

import numpy as np

from jaxvram.data.order import generator
from jaxvram.data.problems import EXAM, shifted
from jaxvram.data.tokenizers import CharTokenizer
from jaxvram.errors import UserError

SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
