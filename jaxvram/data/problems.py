"""minGPT's two problems (`37baab7`): sorting a few digits (demo.ipynb) and adding two numbers (projects/adder).

Both are made on the fly; targets are -1 wherever the next token is part of the question, so only the answer is learnt.
"""

import numpy as np

from jaxvram.data.order import example_indices, generator
from jaxvram.data.tokenizers import CharTokenizer
from jaxvram.errors import UserError

EXAM = 2**63  # batch numbers from here on are for `problems`, no training run gets so far


class SortProblems:
    """`length` digits in [0, digits), then the same digits sorted: (2 * length - 1) tokens to predict from.

    One question in four is held out, by a hash of the question. minGPT's own hash of a pickle differs from process
    to process; ours is fixed. As there, half of the draws with more than length // 2 distinct digits are thrown back,
    since questions with many repeats are rare and hard (with 3 digits there are none to throw back).
    """

    def __init__(self, length: int, digits: int, seed: int):
        if not (2 <= digits <= 10 and 2 <= length <= 64):
            raise UserError(
                f"data.digits={digits} must lie in 2..10 and data.length={length} in 2..64 for the sort problem"
            )
        self.length, self.digits, self.seed = length, digits, seed
        self.tokenizer = CharTokenizer("0123456789"[:digits], "digits")
        self.vocab_size, self.sequence_length = digits, 2 * length - 1
        self.example_size = self.sequence_length
        self.description = f"sorting {length} digits of 0..{digits - 1}, one question in four held out"

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        question_BxL = self._questions(generator(self.seed, split, n), split, batch_size)[rows]
        return shifted(question_BxL, np.sort(question_BxL, axis=1))

    def problems(self, split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """`limit` drawn questions (N, length) and their answers (N, length), with repeats, like minGPT's 5,000."""
        question_NxL = self._questions(generator(self.seed, split, EXAM), split, limit)
        return question_NxL, np.sort(question_NxL, axis=1)

    def _questions(self, rng, split: str, count: int) -> np.ndarray:
        """`count` questions of the split, int32 (count, length), by rejection; there are some on both sides."""
        kept, missing = [], count
        while missing:
            draw_NxL = rng.integers(self.digits, size=(8 * missing, self.length), dtype=np.int32)
            distinct_N = 1 + (np.diff(np.sort(draw_NxL, axis=1), axis=1) != 0).sum(1)
            thrown_back_N = (rng.random(len(draw_NxL)) < 0.5) & (distinct_N > self.length // 2)
            kept.append(draw_NxL[~thrown_back_N & (self.held_out(draw_NxL) == (split == "val"))][:missing])
            missing -= len(kept[-1])
        return np.concatenate(kept)

    def held_out(self, question_NxL: np.ndarray) -> np.ndarray:
        """bool (N,): hash(question) % 4 == 0, the hash being splitmix64's finaliser of the digits read as a number."""
        h_N = np.zeros(len(question_NxL), np.uint64)
        for digit_N in question_NxL.T.astype(np.uint64):
            h_N = h_N * np.uint64(self.digits) + digit_N  # wraps for the longest: still a function of the question
        h_N = (h_N ^ (h_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h_N = (h_N ^ (h_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (h_N ^ (h_N >> np.uint64(31))) % np.uint64(4) == 0


class AdderProblems:
    """a + b of `ndigit` digits each, then the sum's ndigit + 1 digits, lowest first: 3 * ndigit tokens to predict from.

    The held-out questions are minGPT's very own: the first min(20 %, 500) of torch.randperm(100^ndigit) with seed 1337.
    """

    def __init__(self, ndigit: int, order: str, seed: int):
        if not 1 <= ndigit <= 3:
            raise UserError(f"data.ndigit={ndigit} must be 1, 2 or 3: all 100^ndigit questions are listed")
        self.ndigit, self.order, self.seed = ndigit, order, seed
        self.tokenizer = CharTokenizer("0123456789", "digits")
        self.vocab_size, self.sequence_length = 10, 3 * ndigit
        self.example_size = self.sequence_length
        count = 100**ndigit
        permutation = torch_randperm(count, 1337)
        held_out = min(count // 5, 500)
        self._questions = {"train": permutation[held_out:], "val": permutation[:held_out]}
        self.description = f"adding two {ndigit}-digit numbers, {held_out} of {count:,} questions held out"

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        questions = self._questions[split]
        order = self.order if split == "train" else "shuffled"  # val goes through the held-out questions in turn
        index_B = example_indices(order, self.seed, split, n, batch_size, rows, len(questions))
        return shifted(*self._digits(questions[index_B]))

    def problems(self, split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `limit` questions (N, 2 * ndigit) of the split and their answers (N, ndigit + 1)."""
        return self._digits(self._questions[split][:limit])

    def _digits(self, question_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a_N, b_N = np.divmod(question_N, 10**self.ndigit)
        high_first = 10 ** np.arange(self.ndigit - 1, -1, -1)
        low_first = 10 ** np.arange(self.ndigit + 1)
        digits = lambda x_N, powers: (x_N[:, None] // powers % 10).astype(np.int32)
        return np.hstack([digits(a_N, high_first), digits(b_N, high_first)]), digits(a_N + b_N, low_first)


def shifted(question_BxP: np.ndarray, answer_BxA: np.ndarray) -> dict[str, np.ndarray]:
    """Question and answer in one row, as tokens (B, P + A - 1) and next tokens, of which only the answer's count."""
    row_BxN = np.hstack([question_BxP, answer_BxA]).astype(np.int32)
    targets = row_BxN[:, 1:].copy()
    targets[:, : question_BxP.shape[1] - 1] = -1
    return {"tokens": row_BxN[:, :-1].copy(), "targets": targets}


def torch_randperm(count: int, seed: int) -> np.ndarray:
    """torch.randperm(count) of a CPU generator with this seed, int64: Fisher-Yates over raw 32-bit draws of MT19937."""
    draw_N = np.frombuffer(np.random.RandomState(seed).bytes(4 * count), "<u4").tolist()
    permutation = list(range(count))
    for i in range(count - 1):
        j = i + draw_N[i] % (count - i)
        permutation[i], permutation[j] = permutation[j], permutation[i]
    return np.array(permutation)
