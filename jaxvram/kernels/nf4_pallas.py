"""Products with NF4 weights as Pallas kernels: a tile of codes is read, decoded in registers, and multiplied.

A byte holds two neighbours along D. To spare shuffles, kernels never put them side by side: the high nibbles meet the even
columns of x, the low ones the odd, which XLA parts before and joins after (x is small where a kernel is worth it). A value
comes of its code's bits by 15 selections, since registers can't be indexed.

Forward, a program makes a tile of y and walks along D; backward, a tile of dx, walking along F. With few rows there are too
few tiles to fill a card: the walk is then split among programs, whose fp32 sums XLA adds.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import Tile

VALUES = (  # quantiles of a normal distribution, 0 among them (QLoRA, appendix E)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

BYTES = 32  # of codes to an absmax
DEPTH = 64  # bytes of codes, or rows of W, at a time
FORWARD = {2: Tile(64, 32, 4, 3), 4: Tile(32, 32, 8, 2)}  # by the bytes of an element; columns of F
BACKWARD = {2: Tile(64, 32, 4, 3), 4: Tile(32, 32, 8, 2)}  # columns: bytes of codes, so half as many as of D
MOST_ROWS = FORWARD[2].rows
PROGRAMS = 256  # enough to fill a card; the walk is split until there are so many
LEAST_STEPS = 4  # of a part of a walk


def value_of(code):
    """fp32 VALUES[code] of int32 codes, without a table."""
    level = VALUES
    for bit in range(4):
        odd = (code >> bit) & 1 == 1
        level = [jnp.where(odd, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0].astype(jnp.float32)


def _decoded(codes_ref, absmax_ref, rows, first_byte, count, shape, dtype):
    """(high nibbles', low nibbles') weights of a tile of codes (rows.size, count), 0 outside."""
    (F, P), size = shape, rows.size
    at_rows = pl.ds(rows.start, size)
    inside_rows = None if F % size == 0 else (rows.start + jnp.arange(size) < F)[:, None]
    byte_inside, block_inside = (
        None if P % count == 0 else (first_byte // unit + jnp.arange(count // unit) < P // unit)[None, :]
        for unit in (1, BYTES)
    )
    mask = _both(inside_rows, byte_inside, (size, count))
    codes = backend.load(codes_ref.at[at_rows, pl.ds(first_byte, count)], mask=mask)
    blocks = count // BYTES
    mask = _both(inside_rows, block_inside, (size, blocks))
    absmax = backend.load(absmax_ref.at[at_rows, pl.ds(first_byte // BYTES, blocks)], mask=mask)
    absmax = jnp.broadcast_to(absmax[:, :, None], (size, blocks, BYTES)).reshape(size, count)
    codes = codes.astype(jnp.int32)
    return tuple((value_of(nibble) * absmax).astype(dtype) for nibble in (codes >> 4, codes & 15))


def _both(a, b, shape):
    masks = [jnp.broadcast_to(mask, shape) for mask in (a, b) if mask is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _walk(split, steps: int, splits: int, step, carry):
    """`step` for each of this program's part of the steps."""
    each = pl.cdiv(steps, splits)
    first = split * each
    return jax.lax.fori_loop(first, jnp.minimum(first + each, steps), step, carry)


def _forward_kernel(x_ref, codes_ref, absmax_ref, y_ref, *, tile, shape, splits):
    (N, _), (F, P) = x_ref.shape, shape
    row_start, rows = pl.program_id(0) * tile.rows, pl.ds(pl.program_id(1) * tile.columns, tile.columns)
    n_inside = row_start + jnp.arange(tile.rows) < N

    def step(i, y_RxC):
        inner = None if P % DEPTH == 0 else (i * DEPTH + jnp.arange(DEPTH) < P)[None, :]
        mask = _both(n_inside[:, None], inner, (tile.rows, DEPTH))
        weights = _decoded(codes_ref, absmax_ref, rows, i * DEPTH, DEPTH, shape, x_ref.dtype)
        for parity, w_CxK in enumerate(weights):
            at = pl.ds(parity * P + i * DEPTH, DEPTH)
            x_RxK = backend.load(x_ref.at[pl.ds(row_start, tile.rows), at], mask=mask)
            y_RxC += backend.dot(x_RxK, w_CxK, trans_b=True)
        return y_RxC

    zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    y_RxC = _walk(pl.program_id(2), pl.cdiv(P, DEPTH), splits, step, zeros)
    inside = n_inside[:, None] & (rows.start + jnp.arange(tile.columns) < F)[None, :]
    backend.store(y_ref.at[pl.ds(row_start, tile.rows), rows], y_RxC, mask=inside)


def _backward_kernel(dy_ref, codes_ref, absmax_ref, dx_ref, *, tile, shape, splits):
    (N, F), P = dy_ref.shape, shape[1]
    row_start, first_byte = pl.program_id(0) * tile.rows, pl.program_id(1) * tile.columns
    n_inside = row_start + jnp.arange(tile.rows) < N

    def step(i, dx):
        rows = pl.ds(i * DEPTH, DEPTH)
        inner = None if F % DEPTH == 0 else (i * DEPTH + jnp.arange(DEPTH) < F)[None, :]
        mask = _both(n_inside[:, None], inner, (tile.rows, DEPTH))
        dy_RxK = backend.load(dy_ref.at[pl.ds(row_start, tile.rows), rows], mask=mask)
        weights = _decoded(codes_ref, absmax_ref, rows, first_byte, tile.columns, shape, dy_ref.dtype)
        return tuple(dx_RxC + backend.dot(dy_RxK, w_KxC) for dx_RxC, w_KxC in zip(dx, weights, strict=True))

    zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    dx = _walk(pl.program_id(2), pl.cdiv(F, DEPTH), splits, step, (zeros, zeros))
    inside = n_inside[:, None] & (first_byte + jnp.arange(tile.columns) < P)[None, :]
    for parity, dx_RxC in enumerate(dx):
        at = pl.ds(parity * P + first_byte, tile.columns)
        backend.store(dx_ref.at[pl.ds(row_start, tile.rows), at], dx_RxC, mask=inside)


def forward_plan(N: int, F: int, D: int, itemsize: int) -> tuple[Tile, int]:
    """(tile, into how many parts D is split)."""
    return _plan(FORWARD[itemsize], N, F, D // 2)


def backward_plan(N: int, F: int, D: int, itemsize: int) -> tuple[Tile, int]:
    """(tile, into how many parts F is split)."""
    return _plan(BACKWARD[itemsize], N, D // 2, F)


def _plan(tile: Tile, N: int, across: int, along: int) -> tuple[Tile, int]:
    tile = Tile(min(tile.rows, backend.power_of_two(N)), tile.columns, tile.warps, tile.stages)
    programs = pl.cdiv(N, tile.rows) * pl.cdiv(across, tile.columns)
    return tile, max(1, min(PROGRAMS // programs, pl.cdiv(along, DEPTH) // LEAST_STEPS))


def _call(kernel, name, rows_NxK, codes_FxP, absmax_FxM, width, plan, across, interpret):
    """(N, width) in the dtype of the rows."""
    (tile, splits), N = plan, rows_NxK.shape[0]
    whole = lambda a: pl.BlockSpec(a.shape, lambda *_: (0, 0))
    arrays = (rows_NxK, codes_FxP, absmax_FxM)
    out = backend.call(
        functools.partial(kernel, tile=tile, shape=codes_FxP.shape, splits=splits),
        grid=(pl.cdiv(N, tile.rows), pl.cdiv(across, tile.columns), splits),
        in_specs=[whole(a) for a in arrays],
        out_specs=pl.BlockSpec((None, N, width), lambda i, j, s: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, N, width), jnp.float32 if splits > 1 else rows_NxK.dtype),
        tile=tile, interpret=interpret, name=f"nf4_linear_{name}",
    )(*arrays)  # fmt: skip
    return out.sum(axis=0).astype(rows_NxK.dtype)


def _parted(x_NxD):
    """The even columns, then the odd."""
    return x_NxD.reshape(x_NxD.shape[0], -1, 2).swapaxes(1, 2).reshape(x_NxD.shape)


def _joined(x_NxD):
    return x_NxD.reshape(x_NxD.shape[0], 2, -1).swapaxes(1, 2).reshape(x_NxD.shape)


def forward(x_NxD, codes_FxP, absmax_FxM, *, interpret: bool):
    """y_NxF in the dtype of x; P = D / 2 bytes and M = D / 64 fp32 absmax in a row of W."""
    (N, D), F = x_NxD.shape, codes_FxP.shape[0]
    plan = forward_plan(N, F, D, x_NxD.dtype.itemsize)
    return _call(_forward_kernel, "forward", _parted(x_NxD), codes_FxP, absmax_FxM, F, plan, F, interpret)


def backward(dy_NxF, codes_FxP, absmax_FxM, *, interpret: bool):
    """dx_NxD in the dtype of dy."""
    (N, F), P = dy_NxF.shape, codes_FxP.shape[1]
    plan = backward_plan(N, F, 2 * P, dy_NxF.dtype.itemsize)
    return _joined(_call(_backward_kernel, "backward", dy_NxF, codes_FxP, absmax_FxM, 2 * P, plan, P, interpret))
