"""The scalar-decay recurrence as Pallas kernels: outputs, states between chunks, and the gradients of a chunk.

`forward`: a program has one head and a block of its values, and walks along the chunks with the state in registers.
`states`: the same walk for the backward pass, which writes the state before each chunk; run from the end with do, q in the
place of v, k it gives the gradients of the states. `by_head`: a program has one chunk of one head: dv, dw, dg. `by_group`:
one chunk of a group and a block of its keys; it goes through the heads that share them, so that the sums over heads, dq and
dk, stay in registers. `outputs`: one chunk of one head, with the state before it. Where keys are wider than 128 it is the
forward pass behind `states`: a walk has registers for 16 values of such a state, and would make q k^T again for each 16.
Where decays are constants it is, transposed, all that is left of `by_head`: `dv`.

Why not walks for the gradients as well: the sums over heads would go through memory, (T, N) for dq and for dk a head, which
is as much as the two states a chunk of 64 at P = 64, and the gradient of the decay needs a state and its gradient at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import HIDDEN
from jaxvram.kernels.scalar_decay_tiles import KEYS, Span, block_of, blocks_of, load, store, tiles_for, walkers
from jaxvram.kernels.scalar_decay_xla import Decays, decays
from jaxvram.kernels.segments import equal_segments, walk, walk_back

BUDGET = 128 * 2**20  # bytes of the states before all chunks of a segment; a longer sequence has more segments


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


def _products(q_ref, k_ref, tokens: Span, N: int):
    """q k^T of a chunk. In a loop: unrolled, the operands of all blocks would be in registers at once."""

    def of_block(n, products_CxC):
        q_CxN, k_CxN = (load(ref, tokens, block_of(n, N)) for ref in (q_ref, k_ref))
        return products_CxC + backend.dot(q_CxN, k_CxN, trans_b=True)

    zeros_CxC = jnp.zeros((tokens.count, tokens.count), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(N, KEYS), of_block, zeros_CxC)


def _forward_kernel(
    q_ref, k_ref, v_ref, high_ref, low_ref, from_start_ref, to_end_ref, through_ref, weight_ref, h_ref, *refs, tile, shape
):  # fmt: skip
    *document_ref, o_ref, last_ref = refs
    (T, P, N), C = shape, tile.rows
    keys = blocks_of(N)
    values = Span(pl.program_id(0) * tile.columns, tile.columns, P)

    def of_chunk(c, h_NxP):
        tokens, through = Span(c * C, C, T), through_ref[c]
        row = lambda ref: backend.load(ref.at[tokens.at])
        key = lambda ref, block: load(ref, tokens, block)
        blocks = list(zip(keys, h_NxP, strict=True))
        between_CxC = _between(row(high_ref), row(low_ref), row(document_ref[0]) if document_ref else None)
        scores_CxC = _products(q_ref, k_ref, tokens, N) * between_CxC
        weight_C, v_CxP = row(weight_ref), load(v_ref, tokens, values)
        own_CxP = backend.dot((scores_CxC * weight_C[None, :]).astype(v_CxP.dtype), v_CxP)
        o_CxP = _sum(backend.dot(key(q_ref, block), h.astype(v_CxP.dtype)) for block, h in blocks)
        o_CxP = o_CxP * row(from_start_ref)[:, None] + own_CxP
        store(o_ref, tokens, values, o_CxP)
        scaled_CxP = _scaled(v_CxP, weight_C * row(to_end_ref))
        return [through * h + backend.dot(key(k_ref, block), scaled_CxP, trans_a=True) for block, h in blocks]

    h_NxP = jax.lax.fori_loop(0, pl.cdiv(T, C), of_chunk, [load(h_ref, values, block).T for block in keys])
    for block, h in zip(keys, h_NxP, strict=True):
        store(last_ref, values, block, h.T)


def _states_kernel(x_ref, y_ref, scale_ref, through_ref, first_ref, states_ref, last_ref, *, tile, shape, backwards):
    """Chunk by chunk: write the state, then state = through state + sum_i scale_i y_i x_i^T; of some of the keys."""
    (T, P, N), C, parts = shape, tile.rows, walkers(shape[2])
    keys = blocks_of(N) if parts == 1 else [block_of(pl.program_id(0) % parts, N)]
    values = Span(pl.program_id(0) // parts * tile.columns, tile.columns, P)
    chunks = pl.cdiv(T, C)

    def of_chunk(i, state_NxP):
        c = chunks - 1 - i if backwards else i
        tokens, through = Span(c * C, C, T), through_ref[c]
        x_CxP, results = _scaled(load(x_ref, tokens, values), backend.load(scale_ref.at[tokens.at])), []
        for block, state in zip(keys, state_NxP, strict=True):
            store(states_ref, block, values, state, first=(c,))
            results.append(through * state + backend.dot(load(y_ref, tokens, block), x_CxP, trans_a=True))
        return results

    state_NxP = jax.lax.fori_loop(0, chunks, of_chunk, [load(first_ref, values, block).T for block in keys])
    for block, state in zip(keys, state_NxP, strict=True):
        store(last_ref, values, block, state.T)


def _outputs_kernel(
    q_ref, k_ref, x_ref, high_ref, low_ref, scale_ref, weight_ref, state_ref, *refs, tile, shape, transposed
):  # fmt: skip
    """Of one chunk of one head: o from v and the state before it or, transposed, dv from do and the gradient behind it."""
    *document_ref, out_ref = refs
    (T, P, N), C = shape, tile.rows
    tokens, blocks, y_ref = Span(pl.program_id(0) * C, C, T), pl.cdiv(N, KEYS), k_ref if transposed else q_ref
    row = lambda ref: backend.load(ref.at[tokens.at])
    between_CxC = _between(row(high_ref), row(low_ref), row(document_ref[0]) if document_ref else None)
    scores_CxC = _products(q_ref, k_ref, tokens, N) * between_CxC
    scores_CxC = (scores_CxC if transposed else scores_CxC * row(weight_ref)[None, :]).astype(x_ref.dtype)

    def of_values(p, _):
        values = Span(p * tile.columns, tile.columns, P)

        def of_keys(n, out_CxP):
            block = block_of(n, N)
            return out_CxP + backend.dot(load(y_ref, tokens, block), load(state_ref, block, values))

        out_CxP = jax.lax.fori_loop(0, blocks, of_keys, jnp.zeros((C, tile.columns), jnp.float32))
        out_CxP *= row(scale_ref)[:, None]
        out_CxP += backend.dot(scores_CxC, load(x_ref, tokens, values), trans_a=transposed)
        store(out_ref, tokens, values, out_CxP * row(weight_ref)[:, None] if transposed else out_CxP)

    jax.lax.fori_loop(0, pl.cdiv(P, tile.columns), of_values, None)


def _by_head_kernel(
    q_ref, k_ref, v_ref, do_ref, high_ref, low_ref, from_start_ref, to_end_ref, through_ref, weight_ref, before_ref,
    behind_ref, *refs, tile, shape,
):  # fmt: skip
    """dv, the gradients of log decay and weight, of one chunk of one head."""
    *document_ref, dv_ref, dlog_decay_ref, dweight_ref = refs
    (T, P, N), C, c = shape, tile.rows, pl.program_id(0)
    tokens, blocks = Span(c * C, C, T), pl.cdiv(N, KEYS)
    row = lambda ref: backend.load(ref.at[tokens.at])
    zeros_C, zeros_CxC = jnp.zeros(C, jnp.float32), jnp.zeros((C, C), jnp.float32)

    between_CxC = _between(row(high_ref), row(low_ref), row(document_ref[0]) if document_ref else None)
    scores_CxC = _products(q_ref, k_ref, tokens, N) * between_CxC

    def of_values(p, carry):
        slopes_CxC, from_before_C, to_behind_C, across = carry
        values = Span(p * tile.columns, tile.columns, P)
        zeros_CxP = jnp.zeros((C, tile.columns), jnp.float32)

        def of_keys(n, carry):
            o_CxP, dv_CxP, across = carry
            block = block_of(n, N)
            before_NxP, behind_NxP = (load(ref, block, values) for ref in (before_ref, behind_ref))
            across += (before_NxP.astype(jnp.float32) * behind_NxP).sum(axis=1).sum(axis=0)
            o_CxP += backend.dot(load(q_ref, tokens, block), before_NxP)
            return o_CxP, dv_CxP + backend.dot(load(k_ref, tokens, block), behind_NxP), across

        o_CxP, dv_CxP, across = jax.lax.fori_loop(0, blocks, of_keys, (zeros_CxP, zeros_CxP, across))
        v_CxP, do_CxP = (load(ref, tokens, values) for ref in (v_ref, do_ref))
        from_before_C += (do_CxP * o_CxP).sum(axis=1)
        dv_CxP *= row(to_end_ref)[:, None]
        to_behind_C += (v_CxP * dv_CxP).sum(axis=1)
        dv_CxP += backend.dot(scores_CxC.astype(do_CxP.dtype), do_CxP, trans_a=True)
        store(dv_ref, tokens, values, dv_CxP * row(weight_ref)[:, None])
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
    block, tokens = block_of(pl.program_id(0) % blocks, N), Span(pl.program_id(0) // blocks * C, C, T)
    document_C = backend.load(document_ref[0].at[tokens.at]) if document_ref else None
    zeros_CxC, zeros_CxN = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, block.count), jnp.float32)

    def of_head(r, carry):
        row = lambda ref: backend.load(ref.at[r, tokens.at])

        def of_values(p, carry):
            dq_CxN, dk_CxN, slopes_CxC = carry
            values = Span(p * tile.columns, tile.columns, P)
            v_CxP, do_CxP = (load(ref, tokens, values, head=(r,)) for ref in (v_ref, do_ref))
            slopes_CxC += backend.dot(do_CxP, v_CxP, trans_b=True)
            before_NxP, behind_NxP = (load(ref, block, values, first=(r,)) for ref in (before_ref, behind_ref))
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
    store(dq_ref, tokens, block, dq_CxN + backend.dot(dproducts_CxC, load(k_ref, tokens, block)))
    store(dk_ref, tokens, block, dk_CxN + backend.dot(dproducts_CxC, load(q_ref, tokens, block), trans_a=True))


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


def _segments(tile, v_BxTxHxP, N: int) -> tuple[int, int]:
    """(tokens of a segment, number of segments): as many that the states of its chunks stay within BUDGET."""
    B, T, H, P = v_BxTxHxP.shape
    most = BUDGET // (B * H * P * N * v_BxTxHxP.dtype.itemsize)
    chunks, count = equal_segments(pl.cdiv(T, tile.rows), most)
    return tile.rows * chunks, count


def forward(
    q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, h_BxHxPxN, resets_BxT, *, interpret: bool
):  # fmt: skip
    """(o_BxTxHxP in the dtype of v, the last state in fp32)."""
    N = q_BxTxGxN.shape[3]
    tiles = tiles_for(v_BxTxHxP, N)
    if tiles.forward is not None:
        arrays, documents = _per_token(decays(log_decay_BxTxH, resets_BxT, tiles.forward.rows), weight_BxTxH)
        return _fused(tiles.forward, q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, arrays, h_BxHxPxN, documents, interpret)

    def step(h_BxHxPxN, arrays, _):
        q, k, v, g, w, resets = arrays
        d = decays(g, resets, tiles.states.rows)
        w_BxHxL = _per_token(d, w)[0][-1]
        before, h_BxHxPxN = _states(tiles.states, v, k, w_BxHxL * d.to_end_BxHxL, d, h_BxHxPxN, False, interpret)
        return h_BxHxPxN, _outputs(tiles.outputs, q, k, v, d, w_BxHxL, before, False, interpret)

    arrays = (q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, resets_BxT)
    h_BxHxPxN, o_BxTxHxP = walk(step, h_BxHxPxN, arrays, *_segments(tiles.states, v_BxTxHxP, N))
    return o_BxTxHxP, h_BxHxPxN


def _fused(tile, q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, arrays, h_BxHxPxN, documents, interpret: bool):
    (B, T, G, N), (H, P) = q_BxTxGxN.shape, v_BxTxHxP.shape[2:]
    keys, values = _of_head(q_BxTxGxN, 0, 2, H // G), _of_head(v_BxTxHxP, 0, 2, 1)
    state = _of_head(h_BxHxPxN, 0, 1, 1)
    return backend.call(
        functools.partial(_forward_kernel, tile=tile, shape=(T, P, N)),
        grid=(pl.cdiv(P, tile.columns), H, B),
        in_specs=[
            keys, keys, values, *(_of_head(x, 0, 1, 1) for x in arrays), state, *(_of_head(x, 0, None, 1) for x in documents)
        ],
        out_specs=[values, state],
        out_shape=[_like(v_BxTxHxP), _like(h_BxHxPxN)],
        tile=tile, interpret=interpret, name="scalar_decay_forward",
    )(q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, *arrays, h_BxHxPxN, *documents)  # fmt: skip


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _states(tile, x_BxTxHxP, y_BxTxGxN, scale_BxHxL, d: Decays, first_BxHxPxN, backwards: bool, interpret: bool):
    """(the states before each chunk in walking order, (B, H, n, N, P) in the dtype of x; the last one in fp32)."""
    (B, T, G, N), (H, P) = y_BxTxGxN.shape, x_BxTxHxP.shape[2:]
    arrays = (x_BxTxHxP, y_BxTxGxN, scale_BxHxL, d.through_BxHxn, first_BxHxPxN)
    states = jax.ShapeDtypeStruct((B, H, pl.cdiv(T, tile.rows), N, P), x_BxTxHxP.dtype)
    by_head = lambda x: _of_head(x, 0, 1, 1)
    return backend.call(
        functools.partial(_states_kernel, tile=tile, shape=(T, P, N), backwards=backwards),
        grid=(pl.cdiv(P, tile.columns) * walkers(N), H, B),
        in_specs=[_of_head(x_BxTxHxP, 0, 2, 1), _of_head(y_BxTxGxN, 0, 2, H // G), *map(by_head, arrays[2:])],
        out_specs=[by_head(states), by_head(first_BxHxPxN)],
        out_shape=[states, _like(first_BxHxPxN)],
        tile=tile, interpret=interpret, name=f"scalar_decay_states_{'from_end' if backwards else 'from_start'}",
    )(*arrays)  # fmt: skip


def backward(
    q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, h_BxHxPxN, resets_BxT, do_BxTxHxP, dh_BxHxPxN, *,
    rows: bool, interpret: bool,
):  # fmt: skip
    """Gradients of q, k, v; of log decay and weight, or () without `rows`; of h; in their dtypes."""
    N = q_BxTxGxN.shape[3]
    tiles = tiles_for(v_BxTxHxP, N)

    def from_start(arrays, h_BxHxPxN):
        _, k, v, g, w, resets = arrays
        d = decays(g, resets, tiles.states.rows)
        w_BxHxL = _per_token(d, w)[0][-1]
        return _states(tiles.states, v, k, w_BxHxL * d.to_end_BxHxL, d, h_BxHxPxN, False, interpret)

    def gradients_of(arrays, h_BxHxPxN, do, dh_BxHxPxN):
        q, k, v, g, w, resets = arrays
        d = decays(g, resets, tiles.states.rows)
        per_token, documents = _per_token(d, w)
        before, _ = from_start(arrays, h_BxHxPxN)
        behind, dh_BxHxPxN = _states(tiles.states, do, q, d.from_start_BxHxL, d, dh_BxHxPxN, True, interpret)
        inputs, drows = (q, k, v, do), ()
        if rows:
            dv, *drows = _by_head(tiles.by_head, inputs, per_token, before, behind, documents, interpret)
            drows = tuple(x_BxHxL[..., : q.shape[1]].swapaxes(1, 2) for x_BxHxL in drows)
        else:
            dv = _outputs(tiles.outputs, q, k, do, d, per_token[-1], behind, True, interpret)
        dq, dk = _by_group(tiles.by_group, inputs, (*per_token[:4], per_token[-1]), before, behind, documents, interpret)
        return (dq, dk, dv, drows), dh_BxHxPxN

    arrays = (q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, resets_BxT)
    last_of = lambda arrays, h_BxHxPxN: from_start(arrays, h_BxHxPxN)[1]
    segments = _segments(tiles.states, v_BxTxHxP, N)
    gradients, dh_BxHxPxN = walk_back(last_of, gradients_of, arrays, h_BxHxPxN, do_BxTxHxP, dh_BxHxPxN, *segments)
    return *gradients, dh_BxHxPxN


def _state_spec(state_BxHxnxNxP):
    """The one of a chunk, of a head."""
    return pl.BlockSpec((None, None, None, *state_BxHxnxNxP.shape[3:]), lambda c, h, b: (b, h, c, 0, 0))


def _outputs(tile, q_BxTxGxN, k_BxTxGxN, x_BxTxHxP, d: Decays, weight_BxHxL, states, transposed: bool, interpret: bool):
    """o or, transposed, dv: see the kernel."""
    (B, T, G, N), (H, P) = q_BxTxGxN.shape, x_BxTxHxP.shape[2:]
    documents = () if d.document_BxL is None else (d.document_BxL,)
    scale_BxHxL = d.to_end_BxHxL if transposed else d.from_start_BxHxL
    arrays = (d.high_BxHxL, d.low_BxHxL, scale_BxHxL, weight_BxHxL)
    keys, values = _of_head(q_BxTxGxN, 0, 2, H // G), _of_head(x_BxTxHxP, 0, 2, 1)
    per_token = [*(_of_head(x, 0, 1, 1) for x in arrays), _state_spec(states), *(_of_head(x, 0, None, 1) for x in documents)]
    return backend.call(
        functools.partial(_outputs_kernel, tile=tile, shape=(T, P, N), transposed=transposed),
        grid=(pl.cdiv(T, tile.rows), H, B),
        in_specs=[keys, keys, values, *per_token],
        out_specs=values,
        out_shape=_like(x_BxTxHxP),
        tile=tile, interpret=interpret, name=f"scalar_decay_{'dv' if transposed else 'outputs'}",
    )(q_BxTxGxN, k_BxTxGxN, x_BxTxHxP, *arrays, states, *documents)  # fmt: skip


def _by_head(tile, inputs, arrays, before, behind, documents, interpret: bool):
    """(dv, the gradients of log decay and weight, (B, H, L))."""
    q_BxTxGxN, _, v_BxTxHxP, _ = inputs
    (B, T, G, N), (H, P) = q_BxTxGxN.shape, v_BxTxHxP.shape[2:]
    keys, values, state = _of_head(q_BxTxGxN, 0, 2, H // G), _of_head(v_BxTxHxP, 0, 2, 1), _state_spec(before)
    per_token = [_of_head(x, 0, 1, 1) for x in arrays]
    return backend.call(
        functools.partial(_by_head_kernel, tile=tile, shape=(T, P, N)),
        grid=(pl.cdiv(T, tile.rows), H, B),
        in_specs=[keys, keys, values, values, *per_token, state, state, *(_of_head(x, 0, None, 1) for x in documents)],
        out_specs=[values, per_token[0], per_token[0]],
        out_shape=[_like(v_BxTxHxP), _like(arrays[0]), _like(arrays[0])],
        tile=tile, interpret=interpret, name="scalar_decay_by_head",
    )(*inputs, *arrays, before, behind, *documents)  # fmt: skip


def _by_group(tile, inputs, arrays, before, behind, documents, interpret: bool):
    """(dq, dk)."""
    q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, _ = inputs
    (B, T, G, N), (H, P) = q_BxTxGxN.shape, v_BxTxHxP.shape[2:]
    R, blocks = H // G, pl.cdiv(N, KEYS)
    values = pl.BlockSpec((None, T, R, P), lambda i, g, b: (b, 0, g, 0))
    tokens = pl.BlockSpec((None, R, arrays[0].shape[2]), lambda i, g, b: (b, g, 0))
    state = pl.BlockSpec((None, R, None, N, P), lambda i, g, b: (b, g, i // blocks, 0, 0))
    keys = _of_head(q_BxTxGxN, 0, 2, 1)
    return backend.call(
        functools.partial(_by_group_kernel, tile=tile, shape=(T, P, N), heads=R),
        grid=(pl.cdiv(T, tile.rows) * blocks, G, B),
        in_specs=[
            keys, keys, values, values, *[tokens] * len(arrays), state, state, *(_of_head(x, 0, None, 1) for x in documents)
        ],
        out_specs=[keys, keys],
        out_shape=[_like(q_BxTxGxN), _like(k_BxTxGxN)],
        tile=tile, interpret=interpret, name="scalar_decay_by_group",
    )(*inputs, *arrays, before, behind, *documents)  # fmt: skip
