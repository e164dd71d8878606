"""Grouped products without kernels: a loop over tiles of rows, each with one matrix. And how groups are cut into tiles."""

import jax
import jax.numpy as jnp

from jaxvram.kernels.backend import power_of_two

MOST_ROWS = 256  # of a tile; fewer where groups are small, or most of a tile would be empty


def tile_count(N: int, E: int, rows: int) -> int:
    """Tiles that N rows in E groups need at the most."""
    return min(N, N // rows + E)


def tiles(sizes_E, N: int, rows: int):
    """(group, first row, end of the group) of every tile, int32 (tile_count, 3); of one that is not needed, zeros."""
    E = sizes_E.shape[0]
    starts_E, tiles_E = jnp.cumsum(sizes_E) - sizes_E, -(-sizes_E // rows)
    ends_E = jnp.cumsum(tiles_E)
    tile_V = jnp.arange(tile_count(N, E, rows))
    group_V = (tile_V[:, None] >= ends_E).sum(-1)
    of_E = jnp.stack([jnp.arange(E), starts_E - (ends_E - tiles_E) * rows, starts_E + sizes_E], -1)
    found_Vx3 = of_E[jnp.minimum(group_V, E - 1)] + tile_V[:, None] * jnp.array([0, rows, 0])
    return jnp.where((group_V < E)[:, None], found_Vx3, 0).astype(jnp.int32)


def _rows(N: int, E: int) -> int:
    return min(MOST_ROWS, power_of_two(-(-N // E)))


def product(x_NxD, w_ExDxF, sizes_E, transposed: bool):
    """x_n W_e, or x_n W_e^T, of every row; in the dtype of x."""
    (N, _), E = x_NxD.shape, w_ExDxF.shape[0]
    R = _rows(N, E)
    x_NRxD = jnp.pad(x_NxD, ((0, R), (0, 0)))

    def of_tile(tile_3):
        x_RxD = jax.lax.dynamic_slice_in_dim(x_NRxD, tile_3[1], R)
        w_DxF = w_ExDxF[tile_3[0]]
        return x_RxD @ (w_DxF.T if transposed else w_DxF)

    y_VxRxF = jax.lax.map(of_tile, tiles(sizes_E, N, R))
    ends_E, tiles_E, row_N = jnp.cumsum(sizes_E), -(-sizes_E // R), jnp.arange(N)
    group_N = jnp.minimum((row_N[:, None] >= ends_E).sum(-1), E - 1)
    first_row_E = (jnp.cumsum(tiles_E) - tiles_E) * R - (ends_E - sizes_E)  # of a group in y, less where it begins in x
    return y_VxRxF.reshape(-1, y_VxRxF.shape[-1])[row_N + first_row_E[group_N]]


def gradient(x_NxD, dy_NxF, sizes_E):
    """dW_ExDxF, added up in fp32, in the dtype of x."""
    (N, D), F, E = x_NxD.shape, dy_NxF.shape[1], sizes_E.shape[0]
    R = _rows(N, E)
    padded = [jnp.pad(a, ((0, R), (0, 0))) for a in (x_NxD, dy_NxF)]

    def add(dw_ExDxF, tile_3):
        group, first, end = tile_3
        x_RxD, dy_RxF = (jax.lax.dynamic_slice_in_dim(a, first, R) for a in padded)
        x_RxD = jnp.where((first + jnp.arange(R) < end)[:, None], x_RxD, 0)
        more_DxF = jnp.matmul(x_RxD.T, dy_RxF, preferred_element_type=jnp.float32)
        return dw_ExDxF.at[group].add(more_DxF), None

    dw_ExDxF, _ = jax.lax.scan(add, jnp.zeros((E, D, F), jnp.float32), tiles(sizes_E, N, R))
    return dw_ExDxF.astype(x_NxD.dtype)
