"""Which keys a query sees: as a dense mask for XLA, as spans of blocks for kernels, which visit nothing else.

The query in row t stands at position p = offset + t of the keys' axis. It sees key s if s < length of its sequence, and
if causal s <= p, and with a window p - window < s, and where segments are given if both carry the same.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is known when the program is built."""

    causal: bool = True
    window: int | None = None  # keys seen at most, the query's own included; with causal only
    offset: int | None = 0  # None: an array, in Data
    lengths: bool = False  # are there key lengths?
    segments: bool = False

    @property
    def may_hide_all(self) -> bool:
        """Can a query be left without any key?"""
        return self.lengths or self.segments or self.window is not None or (self.offset or 0) < 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
    """What is known when it runs; None where the rule says that there is none."""

    offset: jax.Array | None = None  # int32 scalar
    lengths_B: jax.Array | None = None
    query_segments_BxT: jax.Array | None = None
    key_segments_BxS: jax.Array | None = None


def offset_of(rule: Rule, data: Data):
    return rule.offset if data.offset is None else data.offset


def visible(rule: Rule, data: Data, start: int, rows: int, columns: int):
    """The dense mask of queries [start, start + rows) and keys [0, columns), broadcastable to (B, 1, 1, rows, columns).

    None if every key is seen.
    """
    mask = None
    both = lambda a, b: b if a is None else a & b
    position_Tx1 = offset_of(rule, data) + start + jnp.arange(rows)[:, None]
    column_S = jnp.arange(columns)
    if rule.causal:
        mask = column_S <= position_Tx1
    if rule.window is not None:
        mask = both(mask, column_S > position_Tx1 - rule.window)
    if mask is not None:
        mask = mask[None, None, None]
    if rule.lengths:
        mask = both(mask, (column_S < data.lengths_B[:, None])[:, None, None, None])
    if rule.segments:
        of_query_BxTx1 = data.query_segments_BxT[:, start : start + rows, None]
        mask = both(mask, (of_query_BxTx1 == data.key_segments_BxS[:, None, :columns])[:, None, None])
    return mask


# Columns of a span: blocks [FIRST, END) hold all that may be seen, in [WHOLE, WHOLE_END) nothing is hidden.
FIRST, WHOLE, WHOLE_END, END, OFFSET, LENGTH = range(6)


def _corners(rule: Rule, data: Data, B: int, S: int):
    """(offset, length) of every sequence, as int32 (B, 1) each."""
    offset_Bx1 = jnp.broadcast_to(jnp.asarray(offset_of(rule, data), jnp.int32), (B, 1))
    lengths_B = data.lengths_B if rule.lengths else jnp.full((B,), S)
    return offset_Bx1, jnp.clip(lengths_B, 0, S).astype(jnp.int32)[:, None]


def _spans(first, whole, whole_end, end, block: int, offset_Bx1, length_Bx1):
    """(B, n, 6) from four bounds in elements; what is whole lies within what is visited."""
    zero_BxN = jnp.zeros_like(first)
    end = jnp.where(first >= end, 0, jnp.maximum(end, 0))
    first = jnp.clip(first, 0, end) // block
    end = -(-end // block)
    first = jnp.minimum(first, end)
    whole = jnp.clip(-(-jnp.maximum(whole, 0) // block), first, end)
    whole_end = jnp.clip(jnp.maximum(whole_end, 0) // block, whole, end)
    return jnp.stack([first, whole, whole_end, end, zero_BxN + offset_Bx1, zero_BxN + length_Bx1], -1).astype(jnp.int32)


def key_spans(rule: Rule, data: Data, B: int, T: int, S: int, rows: int, columns: int, rows_per_token: int = 1):
    """For each block of `rows` queries, the blocks of `columns` keys that it visits: (B, ceil(T / rows), 6) int32.

    `rows_per_token` rows stand at one position (the heads of a group, packed for decoding).
    """
    offset_Bx1, length_Bx1 = _corners(rule, data, B, S)
    row_N = jnp.arange(-(-T // rows)) * rows
    low = offset_Bx1 + row_N // rows_per_token  # positions of the block's first and last query
    high = offset_Bx1 + jnp.minimum(row_N + rows - 1, T - 1) // rows_per_token
    first, whole, whole_end, end = 0 * low, 0 * low, length_Bx1 + 0 * low, length_Bx1 + 0 * low
    if rule.causal:
        whole_end, end = jnp.minimum(whole_end, low + 1), jnp.minimum(end, high + 1)
    if rule.window is not None:
        first, whole = low - rule.window + 1, high - rule.window + 1
    if rule.segments:
        near, far = _reach(data.query_segments_BxT, data.key_segments_BxS, rows)
        first, end, whole_end = jnp.maximum(first, near), jnp.minimum(end, far), 0 * low
    return _spans(first, whole, whole_end, end, columns, offset_Bx1, length_Bx1)


def query_spans(rule: Rule, data: Data, B: int, T: int, S: int, rows: int, columns: int):
    """For each block of `columns` keys, the blocks of `rows` queries that see any of it: (B, ceil(S / columns), 6)."""
    offset_Bx1, length_Bx1 = _corners(rule, data, B, S)
    left = jnp.arange(-(-S // columns)) * columns
    right = jnp.minimum(left + columns, length_Bx1) - 1  # the last key that counts
    first, whole, end = 0 * right, 0 * right, T + 0 * right
    whole_end = jnp.where(left + columns <= length_Bx1, T, 0)  # a block with keys that don't count hides some everywhere
    if rule.causal:
        first, whole = left - offset_Bx1, left + columns - 1 - offset_Bx1
    if rule.window is not None:
        end = jnp.minimum(end, right + rule.window - offset_Bx1)
        whole_end = jnp.minimum(whole_end, left + rule.window - offset_Bx1)
    if rule.segments:
        near, far = _reach(data.key_segments_BxS, data.query_segments_BxT, columns)
        first, end, whole_end = jnp.maximum(first, near), jnp.minimum(end, far), 0 * right
    end = jnp.where(right < left, 0, end)
    return _spans(first, whole, whole_end, end, rows, offset_Bx1, length_Bx1)


def _reach(mine_BxT, theirs_BxS, block: int):
    """For each block of mine, the first and one past the last of theirs with a segment between its least and greatest."""
    T, S = mine_BxT.shape[1], theirs_BxS.shape[1]
    blocks = jnp.pad(mine_BxT, ((0, 0), (0, -T % block)), mode="edge").reshape(mine_BxT.shape[0], -1, block)
    low_BxNx1, high_BxNx1 = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    seen_BxNxS = (theirs_BxS[:, None] >= low_BxNx1) & (theirs_BxS[:, None] <= high_BxNx1)
    some_BxN = seen_BxNxS.any(-1)
    first = jnp.where(some_BxN, jnp.argmax(seen_BxNxS, -1), 0)
    return first, jnp.where(some_BxN, S - jnp.argmax(seen_BxNxS[..., ::-1], -1), 0)
