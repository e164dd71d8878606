"""The scalar-decay recurrence as Pallas kernels: outputs, states between chunks, and all gradients of a chunk.

`forward`: a program has one head and a block of its values, and walks along the chunks with the state in registers.
`states`: the same walk for the backward pass, which writes the state before each chunk; run from the end with do, q in the
place of v, k it gives the gradients of the states. `gradients`: a program has one chunk of a group, and walks through the
heads that share its q and k, so that their sums over heads stay in registers; written are dq, dk, dv, dg, dw, once each.

Why not fused walks for the gradients as well: sums over heads would go through memory, two (T, N) arrays a head, which is
as much as the two states a chunk of 64 at P = 64, and the gradient of the decay needs a state and its gradient at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import HIDDEN, Tile
from jaxvram.kernels.scalar_decay_xla import Decays, decays


@dataclasses.dataclass(frozen=True)
class Tiles:
    """At one padded size of keys: tokens x values. Found by compiling for sm_89: the largest that spill nothing."""

    forward: Tile
    states: Tile  # as many tokens as gradients
    gradients: Tile


BF16 = {
    64: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 1)),
    128: Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
    256: Tiles(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
}
FP32 = {
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    256: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
}


def tiles_for(v_BxTxHxP, N: int) -> Tiles:
    P, table = v_BxTxHxP.shape[3], FP32 if v_BxTxHxP.dtype == jnp.float32 else BF16
    tiles = table[max(64, backend.power_of_two(N))]
    fit = lambda tile: dataclasses.replace(tile, columns=min(tile.columns, backend.power_of_two(P)))
    return Tiles(*(fit(getattr(tiles, field.name)) for field in dataclasses.fields(Tiles)))


@dataclasses.dataclass(frozen=True)
class _Span:
    """`count` places from `start` along an axis of `size`, which they may hang over."""

    start: int | jax.Array
    count: int
    size: int

    @property
    def at(self):
        return pl.ds(self.start, self.count)

    def inside(self, axis: int):
        """None where all are."""
        if self.size % self.count == 0:
            return None
        return jnp.expand_dims(self.start + jnp.arange(self.count) < self.size, 1 - axis)


def _all(N: int) -> _Span:
    width = backend.power_of_two(N)
    # JAX 0.12 refuses a constant slice that ends beyond the array, mask or not; it cannot object to a computed one.
    return _Span(0 if width == N else pl.program_id(0) * 0, width, N)


def _mask(rows: _Span, columns: _Span):
    masks = [mask for mask in (rows.inside(0), columns.inside(1)) if mask is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (rows.count, columns.count)) if masks else None


def _load(ref, rows: _Span, columns: _Span, *, first=(), head=()):
    """A tile of a matrix; `first` and `head` are the places before and between its axes, where `ref` has more."""
    return backend.load(ref.at[(*first, rows.at, *head, columns.at)], mask=_mask(rows, columns))


def _store(ref, rows: _Span, columns: _Span, value, *, first=(), head=()) -> None:
    backend.store(ref.at[(*first, rows.at, *head, columns.at)], value, mask=_mask(rows, columns))


def _scaled(x_CxP, scale_C):
    return (x_CxP * scale_C[:, None]).astype(x_CxP.dtype)


def _between(high_C, low_C, document_C):
    """exp of the log decay from token j (columns) to token i (rows), 0 where i does not see j: masked before the power."""
    C = high_C.shape[0]
    seen = jax.lax.broadcasted_iota(jnp.int32, (C, C), 0) >= jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)
    if document_C is not None:
        seen &= document_C[:, None] == document_C[None, :]
    exponent = (high_C[:, None] - high_C[None, :]) + (low_C[:, None] - low_C[None, :])
    return jnp.exp2(jnp.where(seen, exponent, HIDDEN))


def _forward_kernel(
    q_ref, k_ref, v_ref, high_ref, low_ref, from_start_ref, to_end_ref, through_ref, weight_ref, h_ref, *refs, tile, shape
):  # fmt: skip
    *document_ref, o_ref, last_ref = refs
    (T, P, N), C = shape, tile.rows
    keys = _all(N)
    values = _Span(pl.program_id(0) * tile.columns, tile.columns, P)

    def of_chunk(c, h_PxN):
        tokens = _Span(c * C, C, T)
        row = lambda ref: backend.load(ref.at[pl.ds(c * C, C)])
        q_CxN, k_CxN, v_CxP = _load(q_ref, tokens, keys), _load(k_ref, tokens, keys), _load(v_ref, tokens, values)
        weight_C = row(weight_ref)
        between_CxC = _between(row(high_ref), row(low_ref), row(document_ref[0]) if document_ref else None)
        scores_CxC = backend.dot(q_CxN, k_CxN, trans_b=True) * between_CxC * weight_C[None, :]
        o_CxP = row(from_start_ref)[:, None] * backend.dot(q_CxN, h_PxN.astype(q_CxN.dtype), trans_b=True)
        o_CxP += backend.dot(scores_CxC.astype(v_CxP.dtype), v_CxP)
        _store(o_ref, tokens, values, o_CxP)
        return through_ref[c] * h_PxN + backend.dot(_scaled(v_CxP, weight_C * row(to_end_ref)), k_CxN, trans_a=True)

    h_PxN = jax.lax.fori_loop(0, pl.cdiv(T, C), of_chunk, _load(h_ref, values, keys))
    _store(last_ref, values, keys, h_PxN)


def _states_kernel(x_ref, y_ref, scale_ref, through_ref, first_ref, states_ref, last_ref, *, tile, shape, backwards):
    """Chunk by chunk: write the state, then state = through state + sum_i scale_i x_i y_i^T."""
    (T, P, N), C = shape, tile.rows
    keys = _all(N)
    values = _Span(pl.program_id(0) * tile.columns, tile.columns, P)
    chunks = pl.cdiv(T, C)

    def of_chunk(i, state_PxN):
        c = chunks - 1 - i if backwards else i
        tokens = _Span(c * C, C, T)
        _store(states_ref, values, keys, state_PxN, first=(c,))
        x_CxP = _scaled(_load(x_ref, tokens, values), backend.load(scale_ref.at[tokens.at]))
        return through_ref[c] * state_PxN + backend.dot(x_CxP, _load(y_ref, tokens, keys), trans_a=True)

    state_PxN = jax.lax.fori_loop(0, chunks, of_chunk, _load(first_ref, values, keys))
    _store(last_ref, values, keys, state_PxN)


def _gradients_kernel(
    q_ref, k_ref, v_ref, do_ref, high_ref, low_ref, from_start_ref, to_end_ref, through_ref, weight_ref, before_ref,
    behind_ref, *refs, tile, shape, heads,
):  # fmt: skip
    *document_ref, dq_ref, dk_ref, dv_ref, dlog_decay_ref, dweight_ref = refs
    (T, P, N), C, c = shape, tile.rows, pl.program_id(0)
    keys, tokens = _all(N), _Span(c * C, C, T)
    q_CxN, k_CxN = _load(q_ref, tokens, keys), _load(k_ref, tokens, keys)
    dtype = q_CxN.dtype
    products_CxC = backend.dot(q_CxN, k_CxN, trans_b=True)
    i_CxC, j_CxC = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    document_C = backend.load(document_ref[0].at[pl.ds(c * C, C)]) if document_ref else None

    def of_head(r, carry):
        dq_CxN, dk_CxN, dproducts_CxC = carry
        row = lambda ref: backend.load(ref.at[r, pl.ds(c * C, C)])
        weight_C, from_start_C, to_end_C = row(weight_ref), row(from_start_ref), row(to_end_ref)
        between_CxC = _between(row(high_ref), row(low_ref), document_C)
        scores_CxC = products_CxC * between_CxC

        def of_values(p, carry):
            dq_CxN, dk_CxN, slopes_CxC, from_before_C, to_behind_C, across = carry
            values = _Span(p * tile.columns, tile.columns, P)
            v_CxP, do_CxP = (_load(ref, tokens, values, head=(r,)) for ref in (v_ref, do_ref))
            before_PxN, behind_PxN = (_load(ref, values, keys, first=(r,)) for ref in (before_ref, behind_ref))
            across += (before_PxN.astype(jnp.float32) * behind_PxN).sum(axis=1).sum(axis=0)
            slopes_CxC += backend.dot(do_CxP, v_CxP, trans_b=True)
            dq_CxN += backend.dot(_scaled(do_CxP, from_start_C), before_PxN)
            from_before_C += (do_CxP * backend.dot(q_CxN, before_PxN, trans_b=True)).sum(axis=1)
            dk_CxN += backend.dot(_scaled(v_CxP, weight_C * to_end_C), behind_PxN)
            dv_CxP = to_end_C[:, None] * backend.dot(k_CxN, behind_PxN, trans_b=True)
            to_behind_C += (v_CxP * dv_CxP).sum(axis=1)
            dv_CxP += backend.dot(scores_CxC.astype(dtype), do_CxP, trans_a=True)
            _store(dv_ref, tokens, values, dv_CxP * weight_C[:, None], head=(r,))
            return dq_CxN, dk_CxN, slopes_CxC, from_before_C, to_behind_C, across

        zeros_C = jnp.zeros(C, jnp.float32)
        carry = (dq_CxN, dk_CxN, jnp.zeros((C, C), jnp.float32), zeros_C, zeros_C, jnp.float32(0))
        carry = jax.lax.fori_loop(0, pl.cdiv(P, tile.columns), of_values, carry)
        dq_CxN, dk_CxN, slopes_CxC, from_before_C, to_behind_C, across = carry
        inner_CxC = scores_CxC * slopes_CxC
        backend.store(dweight_ref.at[r, pl.ds(c * C, C)], inner_CxC.sum(axis=0) + to_behind_C)
        # What crosses token t, summand by summand; see scalar_decay_xla.log_decay_gradient.
        begun_CxT = i_CxC < j_CxC
        ends_CxT = backend.dot((inner_CxC * weight_C[None, :]).astype(dtype), begun_CxT.astype(dtype))
        ends_CxT += (from_before_C * from_start_C)[:, None]
        crossing_CxT = jnp.where(i_CxC >= j_CxC, ends_CxT, (weight_C * to_behind_C)[:, None])
        dlog_decay_T = crossing_CxT.sum(axis=0) + through_ref[r, c] * across
        backend.store(dlog_decay_ref.at[r, pl.ds(c * C, C)], dlog_decay_T)
        return dq_CxN, dk_CxN, dproducts_CxC + slopes_CxC * between_CxC * weight_C[None, :]

    zeros_CxN = jnp.zeros((C, keys.count), jnp.float32)
    carry = jax.lax.fori_loop(0, heads, of_head, (zeros_CxN, zeros_CxN, jnp.zeros((C, C), jnp.float32)))
    dq_CxN, dk_CxN, dproducts_CxC = carry
    dproducts_CxC = dproducts_CxC.astype(dtype)
    _store(dq_ref, tokens, keys, dq_CxN + backend.dot(dproducts_CxC, k_CxN))
    _store(dk_ref, tokens, keys, dk_CxN + backend.dot(dproducts_CxC, q_CxN, trans_a=True))


def _per_token(d: Decays, weight_BxTxH):
    """(arrays (B, H, L) and (B, H, n) that the kernels read, document counts or nothing)."""
    L = d.high_BxHxL.shape[2]
    weight_BxHxL = jnp.pad(weight_BxTxH.swapaxes(1, 2), ((0, 0), (0, 0), (0, L - weight_BxTxH.shape[1])))
    documents = () if d.document_BxL is None else (d.document_BxL,)
    arrays = (d.high_BxHxL, d.low_BxHxL, d.from_start_BxHxL, d.to_end_BxHxL, d.through_BxHxn, weight_BxHxL)
    return arrays, documents


def _of_head(x, *index):
    """A block of one head's (T, P), (P, N), (n, P, N) or (L,), by batch and head; `index` says where these two are."""
    batch, head, R = index
    shape = tuple(None if axis in (batch, head) else size for axis, size in enumerate(x.shape))
    return pl.BlockSpec(
        shape, lambda p, h, b: tuple(b if axis == batch else h // R if axis == head else 0 for axis in range(x.ndim))
    )


def forward(
    q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, h_BxHxPxN, resets_BxT, *, interpret: bool
):  # fmt: skip
    """(o_BxTxHxP in the dtype of v, the last state in fp32)."""
    (B, T, G, N), (H, P) = q_BxTxGxN.shape, v_BxTxHxP.shape[2:]
    tile = tiles_for(v_BxTxHxP, N).forward
    arrays, documents = _per_token(decays(log_decay_BxTxH, resets_BxT, tile.rows), weight_BxTxH)
    keys, values = _of_head(q_BxTxGxN, 0, 2, H // G), _of_head(v_BxTxHxP, 0, 2, 1)
    state = _of_head(h_BxHxPxN, 0, 1, 1)
    return backend.call(
        functools.partial(_forward_kernel, tile=tile, shape=(T, P, N)),
        grid=(pl.cdiv(P, tile.columns), H, B),
        in_specs=[
            keys, keys, values, *(_of_head(x, 0, 1, 1) for x in arrays), state, *(_of_head(x, 0, None, 1) for x in documents)
        ],
        out_specs=[values, state],
        out_shape=[jax.ShapeDtypeStruct(v_BxTxHxP.shape, v_BxTxHxP.dtype), _like(h_BxHxPxN)],
        tile=tile, interpret=interpret, name="scalar_decay_forward",
    )(q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, *arrays, h_BxHxPxN, *documents)  # fmt: skip


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _states(tile, x_BxTxHxP, y_BxTxGxN, scale_BxHxL, through_BxHxn, first_BxHxPxN, backwards: bool, interpret: bool):
    """(the states before each chunk in walking order, (B, H, n, P, N) in the dtype of x; the last one in fp32)."""
    (B, T, G, N), (H, P) = y_BxTxGxN.shape, x_BxTxHxP.shape[2:]
    arrays = (x_BxTxHxP, y_BxTxGxN, scale_BxHxL, through_BxHxn, first_BxHxPxN)
    states = jax.ShapeDtypeStruct((B, H, pl.cdiv(T, tile.rows), P, N), x_BxTxHxP.dtype)
    by_head = lambda x: _of_head(x, 0, 1, 1)
    return backend.call(
        functools.partial(_states_kernel, tile=tile, shape=(T, P, N), backwards=backwards),
        grid=(pl.cdiv(P, tile.columns), H, B),
        in_specs=[_of_head(x_BxTxHxP, 0, 2, 1), _of_head(y_BxTxGxN, 0, 2, H // G), *map(by_head, arrays[2:])],
        out_specs=[by_head(states), by_head(first_BxHxPxN)],
        out_shape=[states, _like(first_BxHxPxN)],
        tile=tile, interpret=interpret, name=f"scalar_decay_states_{'from_end' if backwards else 'from_start'}",
    )(*arrays)  # fmt: skip


def backward(
    q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, h_BxHxPxN, resets_BxT, do_BxTxHxP, dh_BxHxPxN, *,
    interpret: bool,
):  # fmt: skip
    """The gradients of the first six, in their dtypes."""
    (B, T, G, N), (H, P) = q_BxTxGxN.shape, v_BxTxHxP.shape[2:]
    R, tiles = H // G, tiles_for(v_BxTxHxP, N)
    tile = tiles.gradients
    d = decays(log_decay_BxTxH, resets_BxT, tile.rows)
    arrays, documents = _per_token(d, weight_BxTxH)
    walk = functools.partial(_states, tiles.states, interpret=interpret)
    before, _ = walk(v_BxTxHxP, k_BxTxGxN, arrays[-1] * d.to_end_BxHxL, d.through_BxHxn, h_BxHxPxN, False)
    behind, dh = walk(do_BxTxHxP, q_BxTxGxN, d.from_start_BxHxL, d.through_BxHxn, dh_BxHxPxN, True)
    keys = pl.BlockSpec((None, T, None, N), lambda c, g, b: (b, 0, g, 0))
    values = pl.BlockSpec((None, T, R, P), lambda c, g, b: (b, 0, g, 0))
    tokens = [pl.BlockSpec((None, R, x.shape[2]), lambda c, g, b: (b, g, 0)) for x in arrays]
    state = pl.BlockSpec((None, R, None, P, N), lambda c, g, b: (b, g, c, 0, 0))
    document_specs = [pl.BlockSpec((None, x.shape[1]), lambda c, g, b: (b, 0)) for x in documents]
    *gradients, dg_BxHxL, dw_BxHxL = backend.call(
        functools.partial(_gradients_kernel, tile=tile, shape=(T, P, N), heads=R),
        grid=(pl.cdiv(T, tile.rows), G, B),
        in_specs=[keys, keys, values, values, *tokens, state, state, *document_specs],
        out_specs=[keys, keys, values, tokens[0], tokens[0]],
        out_shape=[*map(_like, (q_BxTxGxN, k_BxTxGxN, v_BxTxHxP)), _like(arrays[0]), _like(arrays[0])],
        tile=tile, interpret=interpret, name="scalar_decay_gradients",
    )(q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, do_BxTxHxP, *arrays, before, behind, *documents)  # fmt: skip
    return *gradients, *(x_BxHxL[..., :T].swapaxes(1, 2) for x_BxHxL in (dg_BxHxL, dw_BxHxL)), dh
