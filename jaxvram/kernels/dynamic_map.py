"""bitsandbytes' dynamic map: 256 values for 8-bit codes, finer the larger (Dettmers 2016, arXiv:1511.04561)."""

import numpy as np

DECADES = 7


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values in [-1, 1] or [0, 1], ascending, in fp32.

    Decade d has 2^d (unsigned: 2^(d + 1)) values, the centres of as many equal parts of [0.1, 1] * 10^(d - 6); besides
    there are 0 and 1, and of all but these two the negatives.
    """
    fp32, values = np.float32, [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for decade in range(DECADES):
        n = 2 ** (decade if signed else decade + 1)
        # Rounded where torch.linspace rounds: from either end to the middle, each with one rounding.
        step, i = np.float64((fp32(1) - fp32(0.1)) / fp32(n)), np.arange(n + 1)
        edges = np.where(i < (n + 1) // 2, fp32(0.1).astype(np.float64) + step * i, 1 - step * (n - i)).astype(fp32)
        centres = fp32(10.0 ** (decade - DECADES + 1)) * ((edges[:-1] + edges[1:]) / fp32(2))
        values += [centres, -centres] if signed else [centres]
    return np.sort(np.concatenate(values))
