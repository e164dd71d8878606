"""The scalar-decay recurrence as Pallas kernels: outputs, states between chunks, and the gradients of a chunk.

`forward`: a program has one head and a block of its values, and walks along the chunks with the state in registers.
`states`: the same walk for the backward pass, which writes the state before each chunk; run from the end with do, q in the
place of v, k it gives the gradients of the states. `by_head`: a program has one chunk of one head: dv, dw, dg. `by_group`:
one chunk of a group and a block of its keys; it goes through the heads that share them, so that the sums over heads, dq and
dk, stay in registers.

Why not walks for the gradients as well: the sums over heads would go through memory, (T, N) for dq and for dk a head, which
is as much as the two states a chunk of 64 at P = 64, and the gradient of the decay needs a state and its gradient at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import HIDDEN, Tile
from jaxvram.kernels.scalar_decay_xla import Decays, decays

KEYS = 64  # of the state at a time: an operand as wide as a whole key would not fit in registers


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens x values. Found by compiling for sm_89: the largest that spill nothing.

    Warps: Triton gives the warps of chained products rows of 16 each, so that more than tokens / 16 would repeat the work.
    """

    forward: Tile
    states: Tile  # as many tokens as by_head and by_group
    by_head: Tile
    by_group: Tile


BF16 = {
    64: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 16, 4, 1), Tile(64, 32, 4, 1)),
    128: Tiles(Tile(64, 32, 4, 1), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
}
# bf16: masks at the edges take registers, and so does a loop over values
UNEVEN = Tiles(*[Tile(32, 32, 4, 1)] * 4)
WIDE = dataclasses.replace(UNEVEN, by_head=Tile(32, 16, 4, 1))
FP32 = {
    64: Tiles(Tile(32, 16, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}


def tiles_for(v_BxTxHxP, N: int) -> Tiles:
    (_, T, _, P), table = v_BxTxHxP.shape, FP32 if v_BxTxHxP.dtype == jnp.float32 else BF16
    tiles = table[max(64, backend.power_of_two(N))]
    if table is BF16 and (T % 64 or P not in (32, 64) or N % 64):
        tiles = WIDE if P > 64 else UNEVEN
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


def _block(i, N: int) -> _Span:
    """Block i of the keys."""
    width = min(KEYS, backend.power_of_two(N))
    # JAX 0.12 refuses a constant slice that ends beyond the array, mask or not; it cannot object to a computed one.
    start = i * width + (pl.program_id(0) * 0 if isinstance(i, int) and N % width else 0)
    return _Span(start, width, N)


def _blocks(N: int) -> list[_Span]:
    return [_block(i, N) for i in range(pl.cdiv(N, KEYS))]


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


def _sum(products):
    return functools.reduce(jnp.add, products)


def _products(q_ref, k_ref, tokens: _Span, N: int):
    """q k^T of a chunk. In a loop: unrolled, the operands of all blocks would be in registers at once."""

    def of_block(n, products_CxC):
        q_CxN, k_CxN = (_load(ref, tokens, _block(n, N)) for ref in (q_ref, k_ref))
        return products_CxC + backend.dot(q_CxN, k_CxN, trans_b=True)

    zeros_CxC = jnp.zeros((tokens.count, tokens.count), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(N, KEYS), of_block, zeros_CxC)


def _forward_kernel(
    q_ref, k_ref, v_ref, high_ref, low_ref, from_start_ref, to_end_ref, through_ref, weight_ref, h_ref, *refs, tile, shape
):  # fmt: skip
    *document_ref, o_ref, last_ref = refs
    (T, P, N), C = shape, tile.rows
    keys = _blocks(N)
    values = _Span(pl.program_id(0) * tile.columns, tile.columns, P)

    def of_chunk(c, h_NxP):
        tokens, through = _Span(c * C, C, T), through_ref[c]
        row = lambda ref: backend.load(ref.at[tokens.at])
        key = lambda ref, block: _load(ref, tokens, block)
        blocks = list(zip(keys, h_NxP, strict=True))
        between_CxC = _between(row(high_ref), row(low_ref), row(document_ref[0]) if document_ref else None)
        scores_CxC = _products(q_ref, k_ref, tokens, N) * between_CxC
        weight_C, v_CxP = row(weight_ref), _load(v_ref, tokens, values)
        own_CxP = backend.dot((scores_CxC * weight_C[None, :]).astype(v_CxP.dtype), v_CxP)
        o_CxP = _sum(backend.dot(key(q_ref, block), h.astype(v_CxP.dtype)) for block, h in blocks)
        o_CxP = o_CxP * row(from_start_ref)[:, None] + own_CxP
        _store(o_ref, tokens, values, o_CxP)
        scaled_CxP = _scaled(v_CxP, weight_C * row(to_end_ref))
        return [through * h + backend.dot(key(k_ref, block), scaled_CxP, trans_a=True) for block, h in blocks]

    h_NxP = jax.lax.fori_loop(0, pl.cdiv(T, C), of_chunk, [_load(h_ref, values, block).T for block in keys])
    for block, h in zip(keys, h_NxP, strict=True):
        _store(last_ref, values, block, h.T)


def _states_kernel(x_ref, y_ref, scale_ref, through_ref, first_ref, states_ref, last_ref, *, tile, shape, backwards):
    """Chunk by chunk: write the state, then state = through state + sum_i scale_i y_i x_i^T."""
    (T, P, N), C = shape, tile.rows
    keys = _blocks(N)
    values = _Span(pl.program_id(0) * tile.columns, tile.columns, P)
    chunks = pl.cdiv(T, C)

    def of_chunk(i, state_NxP):
        c = chunks - 1 - i if backwards else i
        tokens, through = _Span(c * C, C, T), through_ref[c]
        x_CxP, results = _scaled(_load(x_ref, tokens, values), backend.load(scale_ref.at[tokens.at])), []
        for block, state in zip(keys, state_NxP, strict=True):
            _store(states_ref, block, values, state, first=(c,))
            results.append(through * state + backend.dot(_load(y_ref, tokens, block), x_CxP, trans_a=True))
        return results

    state_NxP = jax.lax.fori_loop(0, chunks, of_chunk, [_load(first_ref, values, block).T for block in keys])
    for block, state in zip(keys, state_NxP, strict=True):
        _store(last_ref, values, block, state.T)


def _by_head_kernel(
    q_ref, k_ref, v_ref, do_ref, high_ref, low_ref, from_start_ref, to_end_ref, through_ref, weight_ref, before_ref,
    behind_ref, *refs, tile, shape,
):  # fmt: skip
    """dv, the gradients of log decay and weight, of one chunk of one head."""
    *document_ref, dv_ref, dlog_decay_ref, dweight_ref = refs
    (T, P, N), C, c = shape, tile.rows, pl.program_id(0)
    tokens, blocks = _Span(c * C, C, T), pl.cdiv(N, KEYS)
    row = lambda ref: backend.load(ref.at[tokens.at])
    zeros_C, zeros_CxC = jnp.zeros(C, jnp.float32), jnp.zeros((C, C), jnp.float32)

    between_CxC = _between(row(high_ref), row(low_ref), row(document_ref[0]) if document_ref else None)
    scores_CxC = _products(q_ref, k_ref, tokens, N) * between_CxC

    def of_values(p, carry):
        slopes_CxC, from_before_C, to_behind_C, across = carry
        values = _Span(p * tile.columns, tile.columns, P)
        zeros_CxP = jnp.zeros((C, tile.columns), jnp.float32)

        def of_keys(n, carry):
            o_CxP, dv_CxP, across = carry
            block = _block(n, N)
            before_NxP, behind_NxP = (_load(ref, block, values) for ref in (before_ref, behind_ref))
            across += (before_NxP.astype(jnp.float32) * behind_NxP).sum(axis=1).sum(axis=0)
            o_CxP += backend.dot(_load(q_ref, tokens, block), before_NxP)
            return o_CxP, dv_CxP + backend.dot(_load(k_ref, tokens, block), behind_NxP), across

        o_CxP, dv_CxP, across = jax.lax.fori_loop(0, blocks, of_keys, (zeros_CxP, zeros_CxP, across))
        v_CxP, do_CxP = (_load(ref, tokens, values) for ref in (v_ref, do_ref))
        from_before_C += (do_CxP * o_CxP).sum(axis=1)
        dv_CxP *= row(to_end_ref)[:, None]
        to_behind_C += (v_CxP * dv_CxP).sum(axis=1)
        dv_CxP += backend.dot(scores_CxC.astype(do_CxP.dtype), do_CxP, trans_a=True)
        _store(dv_ref, tokens, values, dv_CxP * row(weight_ref)[:, None])
        return slopes_CxC + backend.dot(do_CxP, v_CxP, trans_b=True), from_before_C, to_behind_C, across

    carry = zeros_CxC, zeros_C, zeros_C, jnp.float32(0)
    carry = jax.lax.fori_loop(0, pl.cdiv(P, tile.columns), of_values, carry)
    slopes_CxC, from_before_C, to_behind_C, across = carry
    inner_CxC = scores_CxC * slopes_CxC
    backend.store(dweight_ref.at[tokens.at], inner_CxC.sum(axis=0) + to_behind_C)
    # What crosses token t, summand by summand; see scalar_decay_xla.log_decay_gradient.
    i_CxC, j_CxC = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    weight_C, dtype = row(weight_ref), q_ref.dtype
    ends_CxT = backend.dot((inner_CxC * weight_C[None, :]).astype(dtype), (i_CxC < j_CxC).astype(dtype))
    ends_CxT += (from_before_C * row(from_start_ref))[:, None]
    crossing_CxT = jnp.where(i_CxC >= j_CxC, ends_CxT, (weight_C * to_behind_C)[:, None])
    backend.store(dlog_decay_ref.at[tokens.at], crossing_CxT.sum(axis=0) + through_ref[c] * across)


def _by_group_kernel(
    q_ref, k_ref, v_ref, do_ref, high_ref, low_ref, from_start_ref, to_end_ref, weight_ref, before_ref, behind_ref, *refs,
    tile, shape, heads,
):  # fmt: skip
    """dq and dk of one chunk and a block of keys."""
    *document_ref, dq_ref, dk_ref = refs
    (T, P, N), C, blocks = shape, tile.rows, pl.cdiv(shape[2], KEYS)
    block, tokens = _block(pl.program_id(0) % blocks, N), _Span(pl.program_id(0) // blocks * C, C, T)
    document_C = backend.load(document_ref[0].at[tokens.at]) if document_ref else None
    zeros_CxC, zeros_CxN = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, block.count), jnp.float32)

    def of_head(r, carry):
        row = lambda ref: backend.load(ref.at[r, tokens.at])

        def of_values(p, carry):
            dq_CxN, dk_CxN, slopes_CxC = carry
            values = _Span(p * tile.columns, tile.columns, P)
            v_CxP, do_CxP = (_load(ref, tokens, values, head=(r,)) for ref in (v_ref, do_ref))
            slopes_CxC += backend.dot(do_CxP, v_CxP, trans_b=True)
            before_NxP, behind_NxP = (_load(ref, block, values, first=(r,)) for ref in (before_ref, behind_ref))
            dq_CxN += backend.dot(_scaled(do_CxP, row(from_start_ref)), before_NxP, trans_b=True)
            v_CxP = _scaled(v_CxP, row(weight_ref) * row(to_end_ref))
            return dq_CxN, dk_CxN + backend.dot(v_CxP, behind_NxP, trans_b=True), slopes_CxC

        dq_CxN, dk_CxN, dproducts_CxC = carry
        carry = dq_CxN, dk_CxN, zeros_CxC
        dq_CxN, dk_CxN, slopes_CxC = jax.lax.fori_loop(0, pl.cdiv(P, tile.columns), of_values, carry)
        between_CxC = _between(row(high_ref), row(low_ref), document_C)
        return dq_CxN, dk_CxN, dproducts_CxC + slopes_CxC * between_CxC * row(weight_ref)[None, :]

    carry = jax.lax.fori_loop(0, heads, of_head, (zeros_CxN, zeros_CxN, zeros_CxC))
    dq_CxN, dk_CxN, dproducts_CxC = carry
    dproducts_CxC = dproducts_CxC.astype(q_ref.dtype)
    _store(dq_ref, tokens, block, dq_CxN + backend.dot(dproducts_CxC, _load(k_ref, tokens, block)))
    _store(dk_ref, tokens, block, dk_CxN + backend.dot(dproducts_CxC, _load(q_ref, tokens, block), trans_a=True))


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
    """(the states before each chunk in walking order, (B, H, n, N, P) in the dtype of x; the last one in fp32)."""
    (B, T, G, N), (H, P) = y_BxTxGxN.shape, x_BxTxHxP.shape[2:]
    arrays = (x_BxTxHxP, y_BxTxGxN, scale_BxHxL, through_BxHxn, first_BxHxPxN)
    states = jax.ShapeDtypeStruct((B, H, pl.cdiv(T, tile.rows), N, P), x_BxTxHxP.dtype)
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
    R, tiles, shape = H // G, tiles_for(v_BxTxHxP, N), (T, P, N)
    C = tiles.states.rows
    d = decays(log_decay_BxTxH, resets_BxT, C)
    arrays, documents = _per_token(d, weight_BxTxH)
    walk = functools.partial(_states, tiles.states, interpret=interpret)
    before, _ = walk(v_BxTxHxP, k_BxTxGxN, arrays[-1] * d.to_end_BxHxL, d.through_BxHxn, h_BxHxPxN, False)
    behind, dh = walk(do_BxTxHxP, q_BxTxGxN, d.from_start_BxHxL, d.through_BxHxn, dh_BxHxPxN, True)

    by_head, values = lambda x: _of_head(x, 0, 1, 1), _of_head(v_BxTxHxP, 0, 2, 1)
    state = pl.BlockSpec((None, None, None, N, P), lambda c, h, b: (b, h, c, 0, 0))
    keys = _of_head(q_BxTxGxN, 0, 2, R)
    document_specs = [_of_head(x, 0, None, 1) for x in documents]
    inputs = (q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, do_BxTxHxP)
    dv, dg_BxHxL, dw_BxHxL = backend.call(
        functools.partial(_by_head_kernel, tile=tiles.by_head, shape=shape),
        grid=(pl.cdiv(T, C), H, B),
        in_specs=[keys, keys, values, values, *map(by_head, arrays), state, state, *document_specs],
        out_specs=[values, by_head(arrays[0]), by_head(arrays[0])],
        out_shape=[_like(v_BxTxHxP), _like(arrays[0]), _like(arrays[0])],
        tile=tiles.by_head, interpret=interpret, name="scalar_decay_by_head",
    )(*inputs, *arrays, before, behind, *documents)  # fmt: skip

    blocks = pl.cdiv(N, KEYS)
    values = pl.BlockSpec((None, T, R, P), lambda i, g, b: (b, 0, g, 0))
    tokens = pl.BlockSpec((None, R, arrays[0].shape[2]), lambda i, g, b: (b, g, 0))
    state = pl.BlockSpec((None, R, None, N, P), lambda i, g, b: (b, g, i // blocks, 0, 0))
    keys = _of_head(q_BxTxGxN, 0, 2, 1)
    rows = (*arrays[:4], arrays[-1])
    dq, dk = backend.call(
        functools.partial(_by_group_kernel, tile=tiles.by_group, shape=shape, heads=R),
        grid=(pl.cdiv(T, C) * blocks, G, B),
        in_specs=[keys, keys, values, values, *[tokens] * len(rows), state, state, *document_specs],
        out_specs=[keys, keys],
        out_shape=[_like(q_BxTxGxN), _like(k_BxTxGxN)],
        tile=tiles.by_group, interpret=interpret, name="scalar_decay_by_group",
    )(*inputs, *rows, before, behind, *documents)  # fmt: skip
    return dq, dk, dv, *(x_BxHxL[..., :T].swapaxes(1, 2) for x_BxHxL in (dg_BxHxL, dw_BxHxL)), dh
