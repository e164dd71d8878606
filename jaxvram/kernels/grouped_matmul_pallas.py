"""Grouped products as Pallas kernels: a program makes a tile of y, or a tile of dW.

y: the tile's rows lie in one group, so there is one matrix; a program walks along D. What it must know, its group and rows,
comes ready made (grouped_matmul_xla.tiles): rows beyond the group's end are the next tile's, and are not written.
dW_e: a program walks along the rows of group e, of which there may be none.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import Tile
from jaxvram.kernels.grouped_matmul_xla import tile_count, tiles

# By the bytes of an element. Found by compiling for sm_89: the largest that spill nothing.
PRODUCT = {2: Tile(128, 128, 8, 3), 4: Tile(32, 64, 8, 2)}  # rows of x, columns of y
GRADIENT = {2: Tile(128, 128, 8, 3), 4: Tile(32, 64, 8, 2)}  # rows and columns of W
DEPTH = {2: 32, 4: 16}  # of the walk, a step


def _product_kernel(tile_ref, x_ref, w_ref, y_ref, *, tile, depth, transposed):
    inner, width = x_ref.shape[1], y_ref.shape[1]
    group, first, end = tile_ref[0], tile_ref[1], tile_ref[2]
    rows = pl.ds(first, tile.rows)
    column = pl.program_id(1) * tile.columns
    columns = pl.ds(column, tile.columns)
    row_inside = first + jnp.arange(tile.rows) < end
    column_inside = column + jnp.arange(tile.columns) < width

    def step(i, y_RxC):
        along = pl.ds(i * depth, depth)
        inside = i * depth + jnp.arange(depth) < inner
        x_RxK = backend.load(x_ref.at[rows, along], mask=row_inside[:, None] & inside[None, :])
        if transposed:
            w_CxK = backend.load(w_ref.at[group, columns, along], mask=column_inside[:, None] & inside[None, :])
        else:
            w_KxC = backend.load(w_ref.at[group, along, columns], mask=inside[:, None] & column_inside[None, :])
        return y_RxC + backend.dot(x_RxK, w_CxK if transposed else w_KxC, trans_b=transposed)

    @pl.when(first < end)  # not all tiles are needed
    def _():
        zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        y_RxC = jax.lax.fori_loop(0, pl.cdiv(inner, depth), step, zeros)
        backend.store(y_ref.at[rows, columns], y_RxC, mask=row_inside[:, None] & column_inside[None, :])


def _gradient_kernel(span_ref, x_ref, dy_ref, dw_ref, *, tile, depth):
    first, end = span_ref[0], span_ref[1]
    starts = pl.program_id(0) * tile.rows, pl.program_id(1) * tile.columns
    at_rows, at_columns = pl.ds(starts[0], tile.rows), pl.ds(starts[1], tile.columns)
    row_inside = starts[0] + jnp.arange(tile.rows) < x_ref.shape[1]
    column_inside = starts[1] + jnp.arange(tile.columns) < dy_ref.shape[1]

    def step(i, dw_RxC):
        along = pl.ds(first + i * depth, depth)
        inside = (first + i * depth + jnp.arange(depth) < end)[:, None]
        x_KxR = backend.load(x_ref.at[along, at_rows], mask=inside & row_inside[None, :])
        dy_KxC = backend.load(dy_ref.at[along, at_columns], mask=inside & column_inside[None, :])
        return dw_RxC + backend.dot(x_KxR, dy_KxC, trans_a=True)

    zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    dw_RxC = jax.lax.fori_loop(jnp.int32(0), pl.cdiv(end - first, jnp.int32(depth)), step, zeros)
    backend.store(dw_ref.at[at_rows, at_columns], dw_RxC, mask=row_inside[:, None] & column_inside[None, :])


def product_tile(N: int, itemsize: int) -> Tile:
    """That of `product`; with few rows, a low one."""
    tile = PRODUCT[itemsize]
    return Tile(min(tile.rows, backend.power_of_two(N)), tile.columns, tile.warps, tile.stages)


def product(x_NxD, w_ExDxF, sizes_E, transposed: bool, *, interpret: bool):
    """x_n W_e, or x_n W_e^T, of every row; in the dtype of x."""
    N, E, size = x_NxD.shape[0], w_ExDxF.shape[0], x_NxD.dtype.itemsize
    tile, width = product_tile(N, size), w_ExDxF.shape[1 if transposed else 2]
    whole = lambda shape: pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
    return backend.call(
        functools.partial(_product_kernel, tile=tile, depth=DEPTH[size], transposed=transposed),
        grid=(tile_count(N, E, tile.rows), pl.cdiv(width, tile.columns)),
        in_specs=[pl.BlockSpec((None, 3), lambda i, j: (i, 0)), whole(x_NxD.shape), whole(w_ExDxF.shape)],
        out_specs=whole((N, width)),
        out_shape=jax.ShapeDtypeStruct((N, width), x_NxD.dtype),
        tile=tile, interpret=interpret, name="grouped_matmul_transposed" if transposed else "grouped_matmul_forward",
    )(tiles(sizes_E, N, tile.rows), x_NxD, w_ExDxF)  # fmt: skip


def gradient(x_NxD, dy_NxF, sizes_E, *, interpret: bool):
    """dW_ExDxF in the dtype of x."""
    D, F, E, size = x_NxD.shape[1], dy_NxF.shape[1], sizes_E.shape[0], x_NxD.dtype.itemsize
    tile, ends_E = GRADIENT[size], jnp.cumsum(sizes_E)
    spans_Ex2 = jnp.stack([ends_E - sizes_E, ends_E], -1).astype(jnp.int32)
    whole = lambda a: pl.BlockSpec(a.shape, lambda *_: (0, 0))
    return backend.call(
        functools.partial(_gradient_kernel, tile=tile, depth=DEPTH[size]),
        grid=(pl.cdiv(D, tile.rows), pl.cdiv(F, tile.columns), E),
        in_specs=[pl.BlockSpec((None, 2), lambda i, j, e: (e, 0)), whole(x_NxD), whole(dy_NxF)],
        out_specs=pl.BlockSpec((None, D, F), lambda i, j, e: (e, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((E, D, F), x_NxD.dtype),
        tile=tile, interpret=interpret, name="grouped_matmul_gradient",
    )(spans_Ex2, x_NxD, dy_NxF)  # fmt: skip
