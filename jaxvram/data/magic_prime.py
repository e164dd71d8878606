"""The order in which RWKV's authors read a text: cubes modulo a prime (RWKV-LM, RWKV-v7/train_temp/src/dataset.py)."""

import functools
import math

import numpy as np

from jaxvram.errors import UserError


@functools.lru_cache(maxsize=8)
def magic_prime(windows: int) -> int:
    """The largest prime p = 3n + 2 below `windows`, the number of whole windows (with the token that follows) in a text.

    The authors ask for p < tokens / T - 1, which is the same: of q T + r tokens there are q windows, q - 1 if r = 0.
    Modulo such a prime no two numbers have the same cube, as 3 does not divide p - 1.
    """
    p = next((n for n in range(windows - 1, 1, -1) if n % 3 == 2 and _is_prime(n)), None)
    if p is None:
        raise UserError(f"data.order=magic_prime needs a text of at least 3 windows of model.block_size, not {windows}")
    return p


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def window_of(samples_B: np.ndarray, windows: int) -> np.ndarray:
    """The window that each sample of a run reads, int64, samples counted from 0; from the p-th on it begins again.

    The authors' ii = 1 + epoch 40320 + idx world_size + rank is 1 and the number of samples before; their factor is a
    double, rounded down. Python's integers, since f i^3 passes 2^64 after some thousand samples.
    """
    p = magic_prime(windows)
    factor = int(p * ((math.sqrt(5) - 1) / 2))
    return np.array([factor * (int(i) + 1) ** 3 % p for i in samples_B], np.int64)
