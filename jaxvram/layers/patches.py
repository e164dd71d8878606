"""Images as sequences of square patches, row by row, and where each stands (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

import numpy as np


def patchify(x_BxHxWxC, p: int):
    """(B, T, p p C) with T = H W / p^2; within a patch row, column, channel."""
    B, H, W, C = x_BxHxWxC.shape
    x = x_BxHxWxC.reshape(B, H // p, p, W // p, p, C).swapaxes(2, 3)
    return x.reshape(B, H * W // p**2, p * p * C)


def unpatchify(x_BxTxF, p: int, H: int, W: int):
    """The inverse: (B, H, W, C) of (B, T, p p C)."""
    x = x_BxTxF.reshape(x_BxTxF.shape[0], H // p, W // p, p, p, -1).swapaxes(2, 3)
    return x.reshape(x_BxTxF.shape[0], H, W, -1)


def sincos_positions(D: int, rows: int, columns: int, span: float = 0.0) -> np.ndarray:
    """Fixed positions (T, D), fp32: D / 2 numbers for the column, then D / 2 for the row, each [sin, cos] of
    i 10000^(-4 k / D), k < D / 4 (Vaswani et al. 2017 along two axes; MAE's and DiT's order).

    `span`: rows, and columns, count from 0 to that length however many there are (PixArt); 0: each is one further.
    """
    omega_F = 10000.0 ** (-np.arange(D // 4) / (D / 4))
    along = lambda count: np.arange(count) * (span / count if span else 1)
    row_T, column_T = (axis.reshape(-1) for axis in np.meshgrid(along(rows), along(columns), indexing="ij"))
    of_axis = lambda i_T: np.concatenate([f(np.outer(i_T, omega_F)) for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([of_axis(column_T), of_axis(row_T)], axis=1).astype(np.float32)
