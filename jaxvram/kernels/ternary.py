"""Ternary weights: what a matrix becomes in BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), and how its codes share bytes.

    scale = max(mean |W|, 1e-5);   code = clip(round(W / scale), -1, 1);   W ~ scale code          one scale a matrix

Codes lie a row an output, as others keep matrices. A byte holds codes of *one column* from rows that lie R = rows / 4 (or 5)
apart: row r + i R is its i-th. Whatever reads a tile of bytes so has tiles of 4 (5) groups of rows, and shuffles nothing.

    2bit    byte = sum_i (code_i + 1) 4^i, 4 a byte: 2 bits a weight; Hugging Face's layout, bit for bit
    base3   v = sum_i (code_i + 1) 3^(4 - i), 5 a byte: 3^5 = 243 <= 256, 1.6 bits a weight; byte = ceil(256 v / 243)

The last is v / 243 as a fraction of 256: times 3^i, less what is over 256, its first digit to base 3 is code_i + 1, two
instructions and no division (as llama.cpp's TQ1_0 has it).
"""

import jax.numpy as jnp
import numpy as np

CODES = {"2bit": 4, "base3": 5}  # a byte
STORAGE = tuple(CODES)
LEAST_SCALE = 1e-5
TWO_BITS = (0, 2, 4, 6)
POWERS = (1, 3, 9, 27, 81)


def codes_of(w, xp=jnp):
    """(int8 codes in the shape of w, its fp32 scale). Rounds half to even, as PyTorch does."""
    w = w.astype(xp.float32)
    scale = xp.maximum(xp.abs(w).mean(dtype=xp.float32), np.float32(LEAST_SCALE))
    inverse = np.float32(1) / scale  # multiplied with, as the reference has it: a code on a border depends on it
    return xp.clip(xp.round(w * inverse), -1, 1).astype(xp.int8), scale


def packed_rows(rows: int, storage: str) -> int:
    """R: rows of bytes for so many rows of codes."""
    return -(-rows // CODES[storage])


def pack(codes_FxD, storage: str, xp=jnp):
    """uint8 (R, D) of codes (F, D); rows of padding, where F is no multiple, are zero bits.

    Raises:
      ValueError: of NumPy's: the codes are not all -1, 0 or 1.
    """
    F, D = codes_FxD.shape
    each, R = CODES[storage], packed_rows(F, storage)
    if xp is np and not np.isin(codes_FxD, (-1, 0, 1)).all():
        raise ValueError(f"pack: these are not codes of -1, 0 and 1, but go from {codes_FxD.min()} to {codes_FxD.max()}")
    digits = xp.pad((codes_FxD + 1).astype(xp.uint16), ((0, each * R - F), (0, 0))).reshape(each, R, D)
    if storage == "2bit":
        packed = sum(digits[i] << shift for i, shift in enumerate(TWO_BITS))
    else:
        packed = (sum(digits[i] * 3 ** (4 - i) for i in range(each)) * 256 + 242) // 243
    return packed.astype(xp.uint8)


def unpack(packed_RxD, F: int, storage: str, xp=jnp):
    """int8 codes (F, D)."""
    bytes_RxD = packed_RxD.astype(xp.int32)
    groups = [code(bytes_RxD, i, storage).astype(xp.int8) for i in range(CODES[storage])]
    return xp.concatenate(groups)[:F]


def code(byte, i: int, storage: str):
    """The i-th code of bytes, all in int32: -1, 0 or 1. A byte that nobody packed may give 2."""
    if storage == "2bit":
        return ((byte >> TWO_BITS[i]) & 3) - 1
    return ((((byte * POWERS[i]) & 255) * 3) >> 8) - 1
