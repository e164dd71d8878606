"""FlashAttention-2 (Dao 2023, arXiv:2307.08691) as Pallas kernels: forward, gradient of k and v, gradient of q.

Forward, a block of queries: walk along the keys, s = q k^T scale, with running maximum m, sum l and output a,
  m' = max(m, max s);  p = 2^(s - m');  l = l 2^(m - m') + sum p;  a = a 2^(m - m') + p v;  at the end o = a / l.
Backward, with L = m + log l of each row and delta = sum_k do_k o_k:
  p = exp(s - L);  dv += p^T do;  ds = p (do v^T - delta);  dk += ds^T q scale;  dq += ds k scale.
Which blocks are visited, and which of them need a mask, comes ready made in spans (attention_mask.py).
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import attention_mask as spans
from jaxvram.kernels import backend
from jaxvram.kernels.attention_mask import Data, Rule
from jaxvram.kernels.attention_xla import Scores
from jaxvram.kernels.backend import HIDDEN, LOG2_E, START, Tile

DECODE_ROWS = 16  # queries x heads of a group up to which they are packed, and the keys split among programs
SPLIT_KEYS = 512  # keys a program at the least, when they are split
MAX_SPLITS = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One kernel's, at one padded head size. Found by compiling for sm_89: the largest that spill nothing."""

    plain: Tile  # nothing hidden but by causality, T and S multiples of ALIGNED
    rich: Tile  # masks, segments and soft caps need registers of their own
    fp32: Tile  # no tensor cores


ALIGNED = 128
FORWARD = {
    32: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 32, 4, 2)),
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(32, 32, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 16, 8, 1)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 16, 8, 1)),
}
BACKWARD_KV = {
    32: Tiles(Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 32, 4, 1)),
    64: Tiles(Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 32, 4, 1)),
    128: Tiles(Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    256: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
}
BACKWARD_Q = {
    32: Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 4, 1)),
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 16, 8, 1)),
    256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
}


def tile_for(table: dict[int, Tiles], rule: Rule, scores: Scores, q_BxTxHxK, S: int) -> Tile:
    """`table`: FORWARD, BACKWARD_KV or BACKWARD_Q; with no more loads in flight than shared memory has room for."""
    T, K, size = q_BxTxHxK.shape[1], q_BxTxHxK.shape[3], q_BxTxHxK.dtype.itemsize
    width = max(32, backend.power_of_two(K))
    rich = rule.may_hide_all or scores.cap is not None or T % ALIGNED or S % ALIGNED
    tile = table[width].fp32 if size == 4 else table[width].rich if rich else table[width].plain
    stays, passes = (tile.columns, tile.rows) if table is BACKWARD_KV else (tile.rows, tile.columns)
    stays *= 1 if table is FORWARD else 2  # q; k and v; q and do
    stages = backend.stages_that_fit(2 * passes * width * size, stays * width * size, tile.stages)
    return dataclasses.replace(tile, stages=stages)


class _Block:
    """One program's view: its spans, and what it reads of arrays whose edges its tiles may hang over."""

    def __init__(self, rule: Rule, span_ref, segment_refs, head_size: int, rows_per_token: int = 1):
        self.rule, self.span, self.rows_per_token = rule, span_ref, rows_per_token
        self.query_segments, self.key_segments = segment_refs if rule.segments else (None, None)
        self.K, self.width = head_size, backend.power_of_two(head_size)
        # JAX 0.12 refuses a constant slice that ends beyond the array, mask or not; it cannot object to a computed one.
        self.columns = pl.ds(0 if self.width == self.K else pl.program_id(0) * 0, self.width)

    def tile(self, ref, start, count: int, limit: int | None, head=()):
        """Rows [start, start + count) of a (limit, K) array as (count, width), zero beyond; limit None: they lie inside."""
        mask = self.columns_mask(count)
        if limit is not None:
            inside = (start + jnp.arange(count) < limit)[:, None]
            mask = inside if mask is None else inside & mask
            mask = jnp.broadcast_to(mask, (count, self.width))
        return backend.load(ref.at[(pl.ds(start, count), *head, self.columns)], mask=mask)

    def columns_mask(self, count: int):
        inside = (jnp.arange(self.width) < self.K)[None, :]
        return None if self.width == self.K else jnp.broadcast_to(inside, (count, self.width))

    def row(self, ref, start, count: int, limit: int | None, head=()):
        """Entries [start, start + count) of a vector."""
        mask = None if limit is None else start + jnp.arange(count) < limit
        return backend.load(ref.at[(*head, pl.ds(start, count))], mask=mask)

    def put(self, ref, start, value, limit: int):
        count = value.shape[0]
        inside = (start + jnp.arange(count) < limit)[:, None]
        mask = self.columns_mask(count)
        mask = jnp.broadcast_to(inside if mask is None else inside & mask, value.shape)
        backend.store(ref.at[pl.ds(start, count), self.columns], value, mask=mask)

    def visible(self, row_start, column_start, shape, rows_axis: int, T: int, S: int):
        """The mask of one tile of scores; rows_axis says which axis the queries lie along."""
        row = row_start + jax.lax.broadcasted_iota(jnp.int32, shape, rows_axis)
        column = column_start + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - rows_axis)
        position = self.span[spans.OFFSET] + (row // self.rows_per_token if self.rows_per_token > 1 else row)
        seen = (column < self.span[spans.LENGTH]) & (row < T)
        if self.rule.causal:
            seen &= column <= position
        if self.rule.window is not None:
            seen &= column > position - self.rule.window
        if self.rule.segments:
            query = self.row(self.query_segments, row_start, shape[rows_axis], T)
            key = self.row(self.key_segments, column_start, shape[1 - rows_axis], S)
            seen &= (query[:, None] == key[None, :]) if rows_axis == 0 else (key[:, None] == query[None, :])
        return seen

    def walk(self, body, carry, low=None, high=None):
        """body(block, carry, masked) over the span: with a mask at its two ends, without where nothing is hidden."""
        clip = lambda n: n if low is None else jnp.clip(n, low, high)
        ends = [clip(self.span[i]) for i in (spans.FIRST, spans.WHOLE, spans.WHOLE_END, spans.END)]
        for (start, end), masked in zip(itertools.pairwise(ends), (True, False, True), strict=True):
            if not masked and self.rule.segments:
                continue
            carry = jax.lax.fori_loop(start, end, functools.partial(body, masked=masked), carry)
        return carry


def _query_block(rule: Rule, i, blocks: int):
    """Which block of queries program i has: the longest first, where later ones see more."""
    return blocks - 1 - i if rule.causal else i


def _forward_kernel(span_ref, q_ref, k_ref, v_ref, *refs, rule, scores, tile, T, S, rows_per_token, splits):
    *segment_refs, o_ref, lse_ref = refs
    rows, columns, in_bits = tile.rows, tile.columns, scores.in_units(LOG2_E)
    block = _Block(rule, span_ref, segment_refs, q_ref.shape[-1], rows_per_token)
    row_start = _query_block(rule, pl.program_id(0) // splits, pl.cdiv(T, rows)) * rows
    q_TxK = block.tile(q_ref, row_start, rows, T)

    def body(j, carry, masked):
        acc_TxK, max_T, sum_T = carry
        limit = S if masked else None
        k_SxK = block.tile(k_ref, j * columns, columns, limit)
        s_TxS = in_bits(backend.dot(q_TxK, k_SxK, trans_b=True))
        if masked:
            s_TxS = jnp.where(block.visible(row_start, j * columns, (rows, columns), 0, T, S), s_TxS, HIDDEN)
        new_max_T = jnp.maximum(max_T, s_TxS.max(axis=1))
        p_TxS = jnp.exp2(s_TxS - new_max_T[:, None])
        shrink_T = jnp.exp2(max_T - new_max_T)
        v_SxK = block.tile(v_ref, j * columns, columns, limit)
        acc_TxK = acc_TxK * shrink_T[:, None] + backend.dot(p_TxS.astype(v_SxK.dtype), v_SxK)
        return acc_TxK, new_max_T, sum_T * shrink_T + p_TxS.sum(axis=1)

    zeros_T = jnp.zeros(rows, jnp.float32)
    carry = jnp.zeros((rows, block.width), jnp.float32), zeros_T + START, zeros_T
    bounds = ()
    if splits > 1:
        each = pl.cdiv(pl.cdiv(S, columns), splits)
        low = pl.program_id(0) % splits * each
        bounds = low, low + each
    acc_TxK, max_T, sum_T = block.walk(body, carry, *bounds)
    empty_T = sum_T == 0
    lse_T = jnp.where(empty_T, HIDDEN, max_T / LOG2_E + jnp.log(jnp.where(empty_T, 1.0, sum_T)))
    block.put(o_ref, row_start, acc_TxK / jnp.where(empty_T, 1.0, sum_T)[:, None], T)
    backend.store(lse_ref.at[pl.ds(row_start, rows)], lse_T, mask=row_start + jnp.arange(rows) < T)


def _backward_kv_kernel(span_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs, rule, scores, tile, T, S, group):
    *segment_refs, dk_ref, dv_ref = refs
    rows, columns, in_bits = tile.rows, tile.columns, scores.in_units(LOG2_E)
    block = _Block(rule, span_ref, segment_refs, k_ref.shape[-1])
    column_start = pl.program_id(0) * columns
    k_SxK, v_SxK = (block.tile(ref, column_start, columns, S) for ref in (k_ref, v_ref))

    def of_head(head, carry):  # head: index into what the group's heads share a block of; () where it is one
        def body(i, carry, masked):
            dk_SxK, dv_SxK = carry
            at = (i * rows, rows, T if masked else None)
            q_TxK, do_TxK = (block.tile(ref, *at, head=head) for ref in (q_ref, do_ref))
            lse_T, delta_T = (block.row(ref, *at, head=head) for ref in (lse_ref, delta_ref))
            s_SxT = in_bits(backend.dot(k_SxK, q_TxK, trans_b=True))
            p_SxT = jnp.exp2(s_SxT - (lse_T * LOG2_E)[None, :])
            if masked:
                p_SxT = jnp.where(block.visible(i * rows, column_start, (columns, rows), 1, T, S), p_SxT, 0.0)
            dv_SxK += backend.dot(p_SxT.astype(do_TxK.dtype), do_TxK)
            dp_SxT = backend.dot(v_SxK, do_TxK, trans_b=True)
            ds_SxT = p_SxT * (dp_SxT - delta_T[None, :]) * in_bits.slope(s_SxT)
            dk_SxK += backend.dot(ds_SxT.astype(q_TxK.dtype), q_TxK)
            return dk_SxK, dv_SxK

        return block.walk(body, carry)

    zeros_SxK = jnp.zeros((columns, block.width), jnp.float32)
    carry = (zeros_SxK, zeros_SxK)
    if group == 1:
        dk_SxK, dv_SxK = of_head((), carry)
    else:
        dk_SxK, dv_SxK = jax.lax.fori_loop(0, group, lambda head, carry: of_head((head,), carry), carry)
    block.put(dk_ref, column_start, dk_SxK * scores.scale, S)
    block.put(dv_ref, column_start, dv_SxK, S)


def _backward_q_kernel(span_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs, rule, scores, tile, T, S):
    *segment_refs, dq_ref = refs
    rows, columns, in_bits = tile.rows, tile.columns, scores.in_units(LOG2_E)
    block = _Block(rule, span_ref, segment_refs, q_ref.shape[-1])
    row_start = _query_block(rule, pl.program_id(0), pl.cdiv(T, rows)) * rows
    q_TxK, do_TxK = (block.tile(ref, row_start, rows, T) for ref in (q_ref, do_ref))
    lse_T, delta_T = (block.row(ref, row_start, rows, T) for ref in (lse_ref, delta_ref))
    lse_T *= LOG2_E

    def body(j, dq_TxK, masked):
        limit = S if masked else None
        k_SxK, v_SxK = (block.tile(ref, j * columns, columns, limit) for ref in (k_ref, v_ref))
        s_TxS = in_bits(backend.dot(q_TxK, k_SxK, trans_b=True))
        p_TxS = jnp.exp2(s_TxS - lse_T[:, None])
        if masked:
            p_TxS = jnp.where(block.visible(row_start, j * columns, (rows, columns), 0, T, S), p_TxS, 0.0)
        dp_TxS = backend.dot(do_TxK, v_SxK, trans_b=True)
        ds_TxS = p_TxS * (dp_TxS - delta_T[:, None]) * in_bits.slope(s_TxS)
        return dq_TxK + backend.dot(ds_TxS.astype(k_SxK.dtype), k_SxK)

    dq_TxK = block.walk(body, jnp.zeros((rows, block.width), jnp.float32))
    block.put(dq_ref, row_start, dq_TxK * scores.scale, T)


def _segments(rule: Rule, data: Data):
    """(arrays, block specs) of the segment ids, none where there are none."""
    arrays = (data.query_segments_BxT, data.key_segments_BxS) if rule.segments else ()
    return arrays, [pl.BlockSpec((None, a.shape[1]), lambda i, h, b: (b, 0)) for a in arrays]


def forward(rule: Rule, scores: Scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, data: Data, *, interpret: bool):
    """(o_BxTxHxK in the dtype of v, log-sum-exp of the scores (B, H, T) in fp32)."""
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    R = H // G
    if T * R > DECODE_ROWS or rule.segments:
        return _forward(rule, scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, data, 1, 1, interpret)
    # Decoding: too few rows to fill a card. The heads of a group become rows of one block, and its keys are split.
    packed = q_BxTxHxK.reshape(B, T, G, R, K).swapaxes(2, 3).reshape(B, T * R, G, K)
    splits = max(1, min(S // SPLIT_KEYS, MAX_SPLITS))
    o_BxTRxGxK, lse_BxGxTR = _forward(rule, scores, packed, k_BxSxGxK, v_BxSxGxK, data, R, splits, interpret)
    o_BxTxHxK = o_BxTRxGxK.reshape(B, T, R, G, K).swapaxes(2, 3).reshape(B, T, H, K)
    return o_BxTxHxK, lse_BxGxTR.reshape(B, G, T, R).swapaxes(2, 3).reshape(B, H, T)


def _forward(rule, scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, data, rows_per_token, splits, interpret):
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    tile = tile_for(FORWARD, rule, scores, q_BxTxHxK, S)
    if T <= DECODE_ROWS:
        tile = dataclasses.replace(tile, rows=DECODE_ROWS)
    blocks = pl.cdiv(T, tile.rows)
    span_BxNx6 = spans.key_spans(rule, data, B, T, S, tile.rows, tile.columns, rows_per_token)
    segments, segment_specs = _segments(rule, data)
    i_of = lambda i: _query_block(rule, i // splits, blocks)
    queries = pl.BlockSpec((None, T, None, K), lambda i, h, b: (b, 0, h, 0))
    keys = pl.BlockSpec((None, S, None, K), lambda i, h, b: (b, 0, h // (H // G), 0))
    kernel = functools.partial(
        _forward_kernel, rule=rule, scores=scores, tile=tile, T=T, S=S, rows_per_token=rows_per_token, splits=splits
    )
    o, lse = backend.call(
        kernel,
        grid=(blocks * splits, H, B),
        in_specs=[pl.BlockSpec((None, None, 6), lambda i, h, b: (b, i_of(i), 0)), queries, keys, keys, *segment_specs],
        out_specs=[
            pl.BlockSpec((None, None, T, None, K), lambda i, h, b: (i % splits, b, 0, h, 0)),
            pl.BlockSpec((None, None, None, T), lambda i, h, b: (i % splits, b, h, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, B, T, H, K), v_BxSxGxK.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, B, H, T), jnp.float32),
        ],
        tile=tile, interpret=interpret, name="flash_attention_forward",
    )(span_BxNx6, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, *segments)  # fmt: skip
    if splits == 1:
        return o[0], lse[0]
    weights = jax.nn.softmax(lse, axis=0)  # each split's share of the sum
    o_BxTxHxK = jnp.einsum("nbht,nbthk->bthk", weights, o).astype(v_BxSxGxK.dtype)
    return o_BxTxHxK, jax.nn.logsumexp(lse, axis=0)


def backward(rule, scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, o_BxTxHxK, lse_BxHxT, do_BxTxHxK, data, *, interpret):
    """(dq, dk, dv), in the dtypes of q, k and v."""
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    R = H // G
    delta_BxHxT = jnp.einsum("bthk,bthk->bht", do_BxTxHxK, o_BxTxHxK, preferred_element_type=jnp.float32)
    do_BxTxHxK = do_BxTxHxK.astype(q_BxTxHxK.dtype)
    segments, segment_specs = _segments(rule, data)
    arrays = (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, do_BxTxHxK, lse_BxHxT, delta_BxHxT, *segments)
    options = {"rule": rule, "scores": scores, "T": T, "S": S}

    tile = tile_for(BACKWARD_KV, rule, scores, q_BxTxHxK, S)
    span = pl.BlockSpec((None, None, 6), lambda i, h, b: (b, i, 0))
    one = None if R == 1 else R  # all heads of a group
    queries = pl.BlockSpec((None, T, one, K), lambda i, g, b: (b, 0, g, 0))
    keys = pl.BlockSpec((None, S, None, K), lambda i, g, b: (b, 0, g, 0))
    rows = pl.BlockSpec((None, one, T), lambda i, g, b: (b, g, 0))
    dk_BxSxGxK, dv_BxSxGxK = backend.call(
        functools.partial(_backward_kv_kernel, tile=tile, group=R, **options),
        grid=(pl.cdiv(S, tile.columns), G, B),
        in_specs=[span, queries, keys, keys, queries, rows, rows, *segment_specs],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BxSxGxK, v_BxSxGxK)],
        tile=tile, interpret=interpret, name="flash_attention_backward_kv",
    )(spans.query_spans(rule, data, B, T, S, tile.rows, tile.columns), *arrays)  # fmt: skip

    tile = tile_for(BACKWARD_Q, rule, scores, q_BxTxHxK, S)
    blocks = pl.cdiv(T, tile.rows)
    span = pl.BlockSpec((None, None, 6), lambda i, h, b: (b, _query_block(rule, i, blocks), 0))
    queries = pl.BlockSpec((None, T, None, K), lambda i, h, b: (b, 0, h, 0))
    keys = pl.BlockSpec((None, S, None, K), lambda i, h, b: (b, 0, h // R, 0))
    rows = pl.BlockSpec((None, None, T), lambda i, h, b: (b, h, 0))
    dq_BxTxHxK = backend.call(
        functools.partial(_backward_q_kernel, tile=tile, **options),
        grid=(blocks, H, B),
        in_specs=[span, queries, keys, keys, queries, rows, rows, *segment_specs],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q_BxTxHxK.shape, q_BxTxHxK.dtype),
        tile=tile, interpret=interpret, name="flash_attention_backward_q",
    )(spans.key_spans(rule, data, B, T, S, tile.rows, tile.columns), *arrays)  # fmt: skip
    return dq_BxTxHxK, dk_BxSxGxK, dv_BxSxGxK
