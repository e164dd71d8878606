"""A product with packed ternary weights as a Pallas kernel: a tile of bytes is read, unpacked in registers, and multiplied.

The bytes of a tile hold 4 (base3: 5) groups of rows of W (kernels/ternary.py), so that one tile of x meets as many tiles of
codes, each with sums of its own: x is read once for all. Products are of int8, sums of int32, on tensor cores; they are
exact, in whatever order. With few rows there are too few tiles to fill a card: the walk along D is then split among
programs, whose sums XLA adds.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend, ternary
from jaxvram.kernels.backend import Tile

DEPTH = 128  # columns of W at a time
TILE = Tile(64, 32, 4, 3)  # at the most so many rows of x; rows of bytes
PROGRAMS = 256  # enough to fill a card; the walk is split until there are so many
LEAST_STEPS = 2  # of a part of a walk


def _kernel(x_ref, packed_ref, y_ref, *, tile, storage, splits):
    (N, D), R = x_ref.shape, packed_ref.shape[0]
    rows, columns = pl.ds(pl.program_id(0) * tile.rows, tile.rows), pl.ds(pl.program_id(1) * tile.columns, tile.columns)
    n_inside = (rows.start + jnp.arange(tile.rows) < N)[:, None]
    r_inside = (columns.start + jnp.arange(tile.columns) < R)[:, None]

    def step(i, sums):
        along = pl.ds(i * DEPTH, DEPTH)
        d_inside = (along.start + jnp.arange(DEPTH) < D)[None, :]
        x_RxK = backend.load(x_ref.at[rows, along], mask=n_inside & d_inside)
        bytes_CxK = backend.load(packed_ref.at[columns, along], mask=r_inside & d_inside).astype(jnp.int32)
        codes = (ternary.code(bytes_CxK, i, storage).astype(jnp.int8) for i in range(len(sums)))
        return tuple(y_RxC + backend.dot(x_RxK, w_CxK, trans_b=True) for y_RxC, w_CxK in zip(sums, codes, strict=True))

    steps = pl.cdiv(D, DEPTH)
    each = pl.cdiv(steps, splits)
    first = pl.program_id(2) * each
    zeros = (jnp.zeros((tile.rows, tile.columns), jnp.int32),) * ternary.CODES[storage]
    sums = jax.lax.fori_loop(first, jnp.minimum(first + each, steps), step, zeros)
    for i, y_RxC in enumerate(sums):
        at = pl.ds(i * R + columns.start, tile.columns)
        backend.store(y_ref.at[rows, at], y_RxC, mask=n_inside & r_inside.reshape(1, -1))


def plan(N: int, R: int, D: int) -> tuple[Tile, int]:
    """(tile, into how many parts D is split)."""
    tile = Tile(min(TILE.rows, backend.power_of_two(N)), TILE.columns, TILE.warps, TILE.stages)
    programs = pl.cdiv(N, tile.rows) * pl.cdiv(R, tile.columns)
    return tile, max(1, min(PROGRAMS // programs, pl.cdiv(D, DEPTH) // LEAST_STEPS))


def forward(x_NxD, packed_RxD, *, storage: str, interpret: bool):
    """int32 (N, 4 R or 5 R): x, of int8, times the codes of every row of W, those of padding too."""
    (N, D), R = x_NxD.shape, packed_RxD.shape[0]
    tile, splits = plan(N, R, D)
    width = ternary.CODES[storage] * R
    whole = lambda a: pl.BlockSpec(a.shape, lambda *_: (0, 0))
    y = backend.call(
        functools.partial(_kernel, tile=tile, storage=storage, splits=splits),
        grid=(pl.cdiv(N, tile.rows), pl.cdiv(R, tile.columns), splits),
        in_specs=[whole(x_NxD), whole(packed_RxD)],
        out_specs=pl.BlockSpec((None, N, width), lambda i, j, s: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, N, width), jnp.int32),
        tile=tile, interpret=interpret, name=f"packed_linear_{storage}",
    )(x_NxD, packed_RxD)  # fmt: skip
    return y.sum(axis=0) if splits > 1 else y[0]
