"""Log-sum-exp and gradient of logits = h . w that exist only as tiles on chip, as Pallas kernels.

Both walk along D to make one tile of logits with fp32 sums. `row_statistics` walks along V as well and keeps, per row, a
running maximum and sum (Wijmans et al. 2024, arXiv:2411.09009, do the same), the target's logit and the sum of logits;
for L2Wrap also where the maximum is.
`dlogits` writes the gradient of a chunk's logits in the dtype of h; the two products that follow are cuBLAS's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import HIDDEN, LOG2_E, START, Tile

DEPTH = {2: 64, 4: 32}  # of D at a time, by the bytes of an element
TILES = {2: Tile(128, 128, 8, 3), 4: Tile(64, 64, 8, 2)}
PROGRAMS = 512  # enough to fill any card several times over; V is split among programs until there are so many


def _logits(h_ref, w_ref, row_start, column_start, tile, depth, shape, spec):
    """(raw and capped logits, where columns count) of one tile, (rows, columns) in fp32."""
    N, V, D = shape
    rows = row_start + jnp.arange(tile.rows)
    columns = column_start + jnp.arange(tile.columns)

    def step(i, acc_RxC):
        at = pl.ds(i * depth, depth)
        inner = None if D % depth == 0 else (i * depth + jnp.arange(depth) < D)
        h_RxK = backend.load(h_ref.at[pl.ds(row_start, tile.rows), at], mask=_edge(rows < N, inner, N % tile.rows == 0))
        inside = _edge(columns < V, inner, V % tile.columns == 0)
        if spec.vocab_axis == 0:
            w_CxK = backend.load(w_ref.at[pl.ds(column_start, tile.columns), at], mask=inside)
            return acc_RxC + backend.dot(h_RxK, w_CxK, trans_b=True)
        w_KxC = backend.load(w_ref.at[at, pl.ds(column_start, tile.columns)], mask=None if inside is None else inside.T)
        return acc_RxC + backend.dot(h_RxK, w_KxC)

    zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    logits_RxC = spec.cap(jax.lax.fori_loop(0, pl.cdiv(D, depth), step, zeros))
    return logits_RxC, columns[None, :] < spec.counted(V)


def _edge(outer, inner, outer_is_whole: bool):
    """The mask of a tile (outer, inner), None if it lies inside."""
    if inner is None:
        return None if outer_is_whole else jnp.broadcast_to(outer[:, None], (outer.shape[0], 1))
    return (outer[:, None] & inner[None, :]) if not outer_is_whole else jnp.broadcast_to(inner[None, :], (1, inner.shape[0]))


def _statistics_kernel(h_ref, w_ref, target_ref, *out_refs, tile, depth, shape, spec, splits):
    N, V, _ = shape
    row_start = pl.program_id(0) * tile.rows
    rows_inside = row_start + jnp.arange(tile.rows) < N
    target_R = backend.load(target_ref.at[pl.ds(row_start, tile.rows)], mask=rows_inside)

    def of_columns(j, carry):
        max_R, total_R, target_logit_R, sum_R, *argmax = carry
        logits_RxC, counts_1xC = _logits(h_ref, w_ref, row_start, j * tile.columns, tile, depth, shape, spec)
        is_target = (j * tile.columns + jnp.arange(tile.columns))[None, :] == target_R[:, None]
        target_logit_R += jnp.where(is_target, logits_RxC, 0.0).sum(axis=1)
        if spec.label_smoothing:
            sum_R += jnp.where(counts_1xC, logits_RxC, 0.0).sum(axis=1)
        scaled = jnp.where(counts_1xC, logits_RxC * LOG2_E, HIDDEN)
        tile_max_R = scaled.max(axis=1)
        new_max_R = jnp.maximum(max_R, tile_max_R)
        total_R = total_R * jnp.exp2(max_R - new_max_R) + jnp.exp2(scaled - new_max_R[:, None]).sum(axis=1)
        if argmax:
            columns = j * tile.columns + jnp.arange(tile.columns)
            first_R = jnp.where(scaled == tile_max_R[:, None], columns[None, :], V).min(axis=1)
            argmax = [jnp.where(tile_max_R > max_R, first_R, argmax[0])]
        return new_max_R, total_R, target_logit_R, sum_R, *argmax

    zeros_R = jnp.zeros(tile.rows, jnp.float32)
    blocks = pl.cdiv(spec.counted(V), tile.columns)
    each = pl.cdiv(blocks, splits)
    first = pl.program_id(1) * each
    carry = zeros_R + START, zeros_R, zeros_R, zeros_R, *([zeros_R.astype(jnp.int32)] if spec.l2wrap else [])
    carry = jax.lax.fori_loop(first, jnp.minimum(first + each, blocks), of_columns, carry)
    max_R, total_R, target_logit_R, sum_R, *argmax = carry
    lse_R = jnp.where(total_R == 0, HIDDEN, max_R / LOG2_E + jnp.log(jnp.where(total_R == 0, 1.0, total_R)))
    found = (lse_R, target_logit_R, sum_R, *((max_R / LOG2_E, *argmax) if argmax else ()))
    for ref, value in zip(out_refs, found, strict=True):
        backend.store(ref.at[pl.ds(row_start, tile.rows)], value, mask=rows_inside)


def row_statistics(spec, hidden_NxD, head, targets_N, *, interpret: bool):
    """(log-sum-exp, the target's logit, the sum of the logits that count) of each row, (N,) fp32 each.

    With L2Wrap also the largest logit and, int32, the first column that has it. `head` in the dtype of hidden. The target's
    logit is 0 for a negative target; the sum is 0 without label smoothing.
    """
    (N, D), V = hidden_NxD.shape, head.shape[spec.vocab_axis]
    tile, depth = _tile(hidden_NxD.dtype)
    blocks = pl.cdiv(N, tile.rows)
    splits = max(1, min(PROGRAMS // blocks, pl.cdiv(V, 8 * tile.columns)))
    kernel = functools.partial(_statistics_kernel, tile=tile, depth=depth, shape=(N, V, D), spec=spec, splits=splits)
    part = pl.BlockSpec((None, N), lambda i, s: (s, 0))
    dtypes = [jnp.float32] * 3 + ([jnp.float32, jnp.int32] if spec.l2wrap else [])
    lse, target_logit, total, *peak = backend.call(
        kernel,
        grid=(blocks, splits),
        in_specs=[_all(hidden_NxD), _all(head), _all(targets_N)],
        out_specs=[part] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct((splits, N), dtype) for dtype in dtypes],
        tile=tile, interpret=interpret, name="linear_cross_entropy_statistics",
    )(hidden_NxD, head, targets_N)  # fmt: skip
    if peak:
        largest, argmax = peak
        winner = jnp.argmax(largest, axis=0, keepdims=True)
        peak = [jnp.take_along_axis(x, winner, axis=0)[0] for x in (largest, argmax)]
    return jax.nn.logsumexp(lse, axis=0), target_logit.sum(axis=0), total.sum(axis=0), *peak


def _dlogits_kernel(h_ref, w_ref, *refs, tile, depth, shape, spec):
    N, V, _ = shape
    row_start, column_start = pl.program_id(0) * tile.rows, pl.program_id(1) * tile.columns
    rows_inside = row_start + jnp.arange(tile.rows) < N
    logits_RxC, counts_1xC = _logits(h_ref, w_ref, row_start, column_start, tile, depth, shape, spec)
    *row_refs, dlogits_ref = refs
    target_R, lse_R, weight_R, g_R, *peak = (
        backend.load(ref.at[pl.ds(row_start, tile.rows)], mask=rows_inside) for ref in row_refs
    )
    p_RxC = jnp.exp2(logits_RxC * LOG2_E - (lse_R * LOG2_E)[:, None])
    columns = column_start + jnp.arange(tile.columns)
    wanted_RxC = spec.wanted(columns[None, :] == target_R[:, None], V)
    dlogits_RxC = p_RxC * weight_R[:, None] - wanted_RxC * g_R[:, None]
    if peak:
        pull_R, argmax_R = peak
        dlogits_RxC += jnp.where(columns[None, :] == argmax_R[:, None], pull_R[:, None], 0.0)
    dlogits_RxC *= spec.slope(logits_RxC)
    inside = rows_inside[:, None] & (columns < V)[None, :]
    at = dlogits_ref.at[pl.ds(row_start, tile.rows), pl.ds(column_start, tile.columns)]
    backend.store(at, jnp.where(counts_1xC, dlogits_RxC, 0.0), mask=inside)


def dlogits(spec, hidden_NxD, head, targets_N, lse_N, weight_N, g_N, *peak, interpret: bool):
    """(p weight - wanted g) slope of each logit, (N, V) in the dtype of hidden; see `linear_cross_entropy`.

    peak: with L2Wrap (pull_N, argmax_N), what is added for one logit of each row, and which.
    """
    (N, D), V = hidden_NxD.shape, head.shape[spec.vocab_axis]
    tile, depth = _tile(hidden_NxD.dtype)
    arrays = (hidden_NxD, head, targets_N, lse_N, weight_N, g_N, *peak)
    out = jax.ShapeDtypeStruct((N, V), hidden_NxD.dtype)
    return backend.call(
        functools.partial(_dlogits_kernel, tile=tile, depth=depth, shape=(N, V, D), spec=spec),
        grid=(pl.cdiv(N, tile.rows), pl.cdiv(V, tile.columns)),
        in_specs=[_all(a) for a in arrays],
        out_specs=_all(out),
        out_shape=out,
        tile=tile, interpret=interpret, name="linear_cross_entropy_dlogits",
    )(*arrays)  # fmt: skip


def _tile(dtype) -> tuple[Tile, int]:
    size = jnp.dtype(dtype).itemsize
    return TILES[size], DEPTH[size]


def _all(array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))
