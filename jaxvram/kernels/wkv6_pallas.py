"""RWKV-5's and RWKV-6's recurrence as Pallas kernels (the algebra: wkv6_xla.py).

`pairs` makes A, a program of one warp for each chunk of each head: together with the walk it would leave room for two
blocks a multiprocessor and no more. `forward` walks along a head's chunks with the state in registers. `states` is that
walk for the backward pass, without what tokens read, and at the same time the walk from the end: it writes the state
before each chunk and the gradient of that behind it. `gradients` has a program for each chunk of each head, and all else
from the inputs and those.

A decay that is the same for all tokens makes every exponent a number of tokens times it: no sums, and its gradient goes
back as one row a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import LOG2_E, Tile
from jaxvram.kernels.chunks import document_counts, documents, padded
from jaxvram.kernels.segments import equal_segments, walk_back
from jaxvram.kernels.wkv6_xla import FLOOR, across, middle_of, spans

HEADS = (16, 32, 64)
FORWARD = Tile(16, 64, 4, 1)  # rows: tokens of a chunk
PAIRS = Tile(16, 64, 1, 1)
STATES = GRADIENTS = Tile(16, 64, 4, 1)  # of equal rows
BUDGET = 128 * 2**20  # bytes of the states that the backward pass makes on its way; a longer sequence has more segments


def _fp32(x):
    return x.astype(jnp.float32)


def _load(ref, c, C: int):
    """A chunk's tile: of tokens, turned; what all tokens share, as a column; or the one of its own."""
    if len(ref.shape) == 1:
        return backend.load(ref)[:, None]
    return backend.load(ref.at[c]) if len(ref.shape) == 3 else backend.load(ref.at[pl.ds(c * C, C), :]).T


class _Span:
    """The tokens whose log decays an exponent of token t sums: by a mask, or how many they are."""

    def __init__(self, mask, count):
        self.mask, self.count = mask, count  # of (t, i); of t


class _Chunk:
    """A chunk's decays and masks. Arrays are turned, rows are keys or values, columns tokens, so that each warp has 16 rows
    of all products but the small ones. (Triton gives the warps of chained products rows of 16 each.)
    """

    def __init__(self, c, C: int, T: int, dtype, g, document_ref):
        """`g`: log decays, (N, C), or (N, 1) of a constant one."""
        self.start, self.C, self.dtype, self.constant = c * C, C, dtype, g.shape[1] == 1
        self.row, self.column = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
        self.own = self.row == self.column
        self.token_1xC = jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
        self.length = length = jnp.minimum(C, T - self.start)  # tokens behind the end don't decay
        self.before = _Span(lambda t, i: i < t, lambda t: t)
        self.behind = _Span(lambda t, i: i > t, lambda t: jnp.maximum(length - 1 - t, 0))
        self.g = jnp.maximum(g, FLOOR) * LOG2_E  # so that decays are powers of two
        self.same, self.from_start, self.to_end = True, 1.0, 1.0
        # Of equal columns any one: a sum over tokens would go through all warps.
        total_Nx1 = self.g * length if self.constant else self.sums(self.g, self.row >= 0).max(axis=1)[:, None]
        self.through_1xN = jnp.exp2(total_Nx1).T
        if document_ref is not None:
            document_C = backend.load(document_ref.at[pl.ds(self.start, C)])
            last = document_C.max()  # they are counted
            self.same = document_C[:, None] == document_C[None, :]
            self.from_start, self.to_end = _fp32(document_C == 0)[None, :], _fp32(document_C == last)[None, :]
            self.through_1xN *= _fp32(last == 0)

    def to_middle(self, level) -> _Span:
        def count(t):
            past = t - middle_of(t, level)
            return jnp.where(past < 0, -1 - past, past)

        return _Span(lambda t, i: spans(t, i, level), count)

    def across(self, level):
        return across(self.row, self.column, level) & self.same

    def levels(self, of_level, carry):
        """of_level(level, carry) for all of them. A loop: unrolled it spills."""
        return jax.lax.fori_loop(0, self.C.bit_length() - 1, of_level, carry)

    def store(self, ref, value_NxC) -> None:
        backend.store(ref.at[pl.ds(self.start, self.C), :], value_NxC.T)

    def sums(self, x_NxC, mask):
        """sum_i x_i of the tokens i (rows) that the mask has for token t (columns).

        On tensor cores as two products, of what bf16 has of x and of what it has of the rest: of an exponent x, exp(x) is
        wrong by less than 1e-5 then, of 1. An fp32 product would take a hundred registers a thread.
        """
        if self.dtype == jnp.float32:
            return backend.dot(x_NxC, _fp32(mask))
        mask, high = mask.astype(self.dtype), x_NxC.astype(self.dtype)
        return backend.dot(high, mask) + backend.dot((x_NxC - _fp32(high)).astype(self.dtype), mask)

    def decay(self, span: _Span):
        """(N, C): exp of the sum of the log decays of a token's span."""
        if self.constant:
            return jnp.exp2(self.g * _fp32(span.count(self.token_1xC)))
        return jnp.exp2(self.sums(self.g, span.mask(self.column, self.row)))

    def gradient_of_decay(self, span: _Span, exponent_NxC):
        """That of the log decays, from that of the exponents of tokens: the same sums back, and nothing is subtracted."""
        if self.constant:
            return (exponent_NxC * _fp32(span.count(self.token_1xC))).sum(axis=1)
        return self.sums(exponent_NxC, span.mask(self.row, self.column))

    def scaled(self, x_NxC, factor):
        return (_fp32(x_NxC) * factor).astype(self.dtype)

    def pairs(self, x_NxC, y_NxC, mask):
        """x_t . y_j of tokens t and j, where the mask is true."""
        return jnp.where(mask, backend.dot(x_NxC, y_NxC, trans_a=True), 0.0)


def _pairs_kernel(r_ref, g_ref, k_ref, u_ref, *refs, T: int, C: int):
    document_ref, (A_ref,) = documents(refs, 1)
    c = pl.program_id(0)
    r, g, k = (_load(ref, c, C) for ref in (r_ref, g_ref, k_ref))
    chunk = _Chunk(c, C, T, r.dtype, g, document_ref)

    def of_level(level, A_CxC):
        f = chunk.decay(chunk.to_middle(level))
        return A_CxC + chunk.pairs(chunk.scaled(r, f), chunk.scaled(k, f), chunk.across(level))

    own = chunk.pairs(chunk.scaled(r, backend.load(u_ref)[:, None]), k, chunk.own)
    backend.store(A_ref, chunk.levels(of_level, own))


def _walk(of_chunk, s_NxN, refs, T: int, C: int, reverse=False):
    """s = of_chunk(c, s, its tiles) along the chunks. Each round loads the next one's tiles: memory answers meanwhile."""
    n = pl.cdiv(T, C)
    place = lambda i: n - 1 - i if reverse else i
    tiles = lambda i: [_load(ref, place(i), C) for ref in refs]

    def step(i, carry):
        s_NxN, now = carry
        following = tiles(jnp.minimum(i + 1, n - 1))
        return of_chunk(place(i), s_NxN, now), following

    return jax.lax.fori_loop(0, n, step, (s_NxN, tiles(jnp.int32(0))))[0]


def _forward_kernel(r_ref, g_ref, k_ref, v_ref, A_ref, s_ref, *refs, T: int, C: int):
    document_ref, (y_ref, last_ref) = documents(refs, 2)

    def of_chunk(c, s_NxN, tiles):
        r, g, k, v, A_CxC = tiles
        chunk = _Chunk(c, C, T, v.dtype, g, document_ref)
        r = chunk.scaled(r, chunk.decay(chunk.before) * chunk.from_start)
        k = chunk.scaled(k, chunk.decay(chunk.behind) * chunk.to_end)
        y_NxC = backend.dot(s_NxN.astype(chunk.dtype), r) + backend.dot(v, A_CxC, trans_b=True)
        chunk.store(y_ref, y_NxC)
        return s_NxN * chunk.through_1xN + backend.dot(v, k, trans_b=True)

    backend.store(last_ref, _walk(of_chunk, backend.load(s_ref), (r_ref, g_ref, k_ref, v_ref, A_ref), T, C))


def _states_kernel(r_ref, g_ref, k_ref, v_ref, dy_ref, s_ref, ds_ref, *refs, T: int, C: int):
    """Both walks at once, a program each."""
    document_ref, (before_ref, behind_ref, first_ref) = documents(refs, 3)

    def onwards(c, s_NxN, tiles):
        k, g, v = tiles
        backend.store(before_ref.at[c], s_NxN)
        chunk = _Chunk(c, C, T, v.dtype, g, document_ref)
        k = chunk.scaled(k, chunk.decay(chunk.behind) * chunk.to_end)
        return s_NxN * chunk.through_1xN + backend.dot(v, k, trans_b=True)

    def back(c, ds_NxN, tiles):
        r, g, dy = tiles
        backend.store(behind_ref.at[c], ds_NxN)
        chunk = _Chunk(c, C, T, r.dtype, g, document_ref)
        r = chunk.scaled(r, chunk.decay(chunk.before) * chunk.from_start)
        return ds_NxN * chunk.through_1xN + backend.dot(dy, r, trans_b=True)

    @pl.when(pl.program_id(0) == 0)
    def _():
        _walk(onwards, backend.load(s_ref), (k_ref, g_ref, v_ref), T, C)

    @pl.when(pl.program_id(0) == 1)
    def _():
        backend.store(first_ref, _walk(back, backend.load(ds_ref), (r_ref, g_ref, dy_ref), T, C, reverse=True))


def _gradients_kernel(r_ref, g_ref, k_ref, v_ref, u_ref, dy_ref, before_ref, behind_ref, *refs, T: int, C: int):
    document_ref, (dr_ref, dg_ref, dk_ref, dv_ref, du_ref) = documents(refs, 5)
    c, dot = pl.program_id(0), backend.dot
    r, g, k, v, dy = (_load(ref, c, C) for ref in (r_ref, g_ref, k_ref, v_ref, dy_ref))
    chunk = _Chunk(c, C, T, v.dtype, g, document_ref)
    of_pairs, u_Nx1 = dot(dy, v, trans_a=True), backend.load(u_ref)[:, None]  # the gradient of A, without mask

    def of_level(level, carry):
        A_CxC, dr, dk, dg = carry
        span, mask = chunk.to_middle(level), chunk.across(level)
        f, dA = chunk.decay(span), jnp.where(mask, of_pairs, 0.0).astype(chunk.dtype)
        r_f, k_f = chunk.scaled(r, f), chunk.scaled(k, f)
        dr_f, dk_f = f * dot(k_f, dA, trans_b=True), f * dot(r_f, dA)
        dg += chunk.gradient_of_decay(span, r * dr_f + k * dk_f)
        return A_CxC + chunk.pairs(r_f, k_f, mask), dr + dr_f, dk + dk_f, dg

    own_1xC = jnp.where(chunk.own, of_pairs, 0.0).sum(axis=0)[None, :]
    backend.store(du_ref, (own_1xC * r * k).sum(axis=1))
    A_CxC, dr, dk = chunk.pairs(chunk.scaled(r, u_Nx1), k, chunk.own), own_1xC * u_Nx1 * k, own_1xC * u_Nx1 * r
    dg = jnp.zeros(dg_ref.shape[-1:] if chunk.constant else r.shape, jnp.float32)
    A_CxC, dr, dk, dg = chunk.levels(of_level, (A_CxC, dr, dk, dg))

    s, ds, f = backend.load(before_ref), backend.load(behind_ref), chunk.decay(chunk.behind) * chunk.to_end
    chunk.store(dv_ref, dot(dy, A_CxC.astype(chunk.dtype)) + dot(ds, chunk.scaled(k, f)))
    dk_f = f * dot(ds, v, trans_a=True)
    chunk.store(dk_ref, dk + dk_f)
    dr_f = chunk.decay(chunk.before) * chunk.from_start * dot(s, dy, trans_a=True)
    chunk.store(dr_ref, dr + dr_f)
    dg += chunk.gradient_of_decay(chunk.behind, k * dk_f) + chunk.gradient_of_decay(chunk.before, r * dr_f)
    through_N = (_fp32(s) * _fp32(ds) * chunk.through_1xN).sum(axis=0)
    if chunk.constant:
        backend.store(dg_ref, dg + through_N * chunk.length)
    else:
        chunk.store(dg_ref, dg + through_N[:, None])


class _Specs:
    """What a program (chunk or direction, head, example) sees of each kind of array."""

    def __init__(self, L: int, n: int, N: int):
        self.tokens = pl.BlockSpec((None, L, None, N), lambda c, h, b: (b, 0, h, 0))
        self.head = pl.BlockSpec((None, N), lambda c, h, b: (h, 0))
        self.state = pl.BlockSpec((None, None, N, N), lambda c, h, b: (b, h, 0, 0))
        self.states = pl.BlockSpec((None, None, n, N, N), lambda c, h, b: (b, h, 0, 0, 0))
        self.state_of_chunk = pl.BlockSpec((None, None, None, N, N), lambda c, h, b: (b, h, c, 0, 0))
        self.pairs = pl.BlockSpec((None, None, n, L // n, L // n), lambda c, h, b: (b, h, 0, 0, 0))
        self.pairs_of_chunk = pl.BlockSpec((None, None, None, L // n, L // n), lambda c, h, b: (b, h, c, 0, 0))
        self.row_of_chunk = pl.BlockSpec((None, None, None, N), lambda c, h, b: (b, c, h, 0))
        self.documents = pl.BlockSpec((None, L), lambda c, h, b: (b, 0))


class _Calls:
    """The kernels on arrays of one size, of whole chunks; the last `T` has tokens behind the end."""

    def __init__(self, C: int, v_BxTxHxN, log_decay, resets_BxT, interpret: bool):
        self.B, self.T, self.H, self.N = v_BxTxHxN.shape
        self.C, self.n, self.interpret = C, pl.cdiv(self.T, C), interpret
        self.specs = _Specs(C * self.n, self.n, self.N)
        self.decay = self.specs.head if log_decay.ndim == 2 else self.specs.tokens
        self.documents = []
        if resets_BxT is not None:
            self.documents = [document_counts(padded(resets_BxT, self.n, C), C)]

    def whole(self, x):
        """Whole chunks of what has tokens; a constant decay has none."""
        return x if x.ndim == 2 else padded(x, self.n, self.C)

    def __call__(self, kernel, programs: int, inputs: list, outputs: list, tile: Tile, name: str):
        """`inputs`: (array, spec) each; `outputs`: (shape, dtype, spec)."""
        return backend.call(
            functools.partial(kernel, T=self.T, C=self.C),
            grid=(programs, self.H, self.B),
            in_specs=[*(spec for _, spec in inputs), *[self.specs.documents] * len(self.documents)],
            out_specs=[spec for *_, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
            tile=tile, interpret=self.interpret, name=f"wkv6_{name}",
        )(*(x for x, _ in inputs), *self.documents)  # fmt: skip


def forward(r, log_decay, k, v, u_HxN, s_BxHxNxN, resets_BxT, *, interpret: bool):
    """(y_BxTxHxN in the dtype of v, the last state in fp32)."""
    T, call = v.shape[1], _Calls(FORWARD.rows, v, log_decay, resets_BxT, interpret)
    specs, tokens, C = call.specs, call.specs.tokens, call.C
    r, g, k, v = map(call.whole, (r, log_decay, k, v))
    inputs = [(r, tokens), (g, call.decay), (k, tokens)]
    outputs = [((call.B, call.H, call.n, C, C), v.dtype, specs.pairs_of_chunk)]
    (A,) = call(_pairs_kernel, call.n, [*inputs, (u_HxN, specs.head)], outputs, PAIRS, "pairs")
    inputs = [*inputs, (v, tokens), (A, specs.pairs), (s_BxHxNxN, specs.state)]
    outputs = [(v.shape, v.dtype, tokens), (s_BxHxNxN.shape, jnp.float32, specs.state)]
    y, s = call(_forward_kernel, 1, inputs, outputs, FORWARD, "forward")
    return y[:, :T], s


def backward(r, log_decay, k, v, u_HxN, s_BxHxNxN, resets_BxT, dy_BxTxHxN, ds_BxHxNxN, *, interpret: bool):
    """The gradients of the first six, in their dtypes."""
    constant, (L, count) = log_decay.ndim == 2, _segments(v)
    if constant and count > 1 and L * count != v.shape[1]:  # what fills up the last segment must not decay
        g = jnp.broadcast_to(log_decay, v.shape)
        rest = (k, v, u_HxN, s_BxHxNxN, resets_BxT, dy_BxTxHxN, ds_BxHxNxN)
        dr, dg, *others = backward(r, g, *rest, interpret=interpret)
        return dr, dg.sum((0, 1)), *others
    arrays = (r, None if constant else log_decay, k, v, resets_BxT)
    whole = lambda arrays: (arrays[0], log_decay if constant else arrays[1], *arrays[2:4], u_HxN)

    def last_of(arrays, s):
        return forward(*whole(arrays), s, arrays[4], interpret=interpret)[1]

    def gradients_of(arrays, s, dy, ds):
        dr, dg, dk, dv, du, ds = _backward_of_segment(*whole(arrays), s, arrays[4], dy, ds, interpret=interpret)
        sums = lambda x_HxN: x_HxN[None, None]  # as of one token
        return (dr, sums(dg) if constant else dg, dk, dv, sums(du)), ds

    gradients, ds = walk_back(last_of, gradients_of, arrays, s_BxHxNxN, dy_BxTxHxN, ds_BxHxNxN, L, count)
    dr, dg, dk, dv, du = gradients
    return dr, dg.sum((0, 1)) if constant else dg, dk, dv, du.sum((0, 1)), ds


def _segments(v_BxTxHxN) -> tuple[int, int]:
    """(tokens of a segment, number of segments): as many that the states of its chunks stay within BUDGET."""
    B, T, H, N = v_BxTxHxN.shape
    C = GRADIENTS.rows
    chunks, count = equal_segments(pl.cdiv(T, C), BUDGET // (B * H * 2 * N * N * v_BxTxHxN.dtype.itemsize))
    return C * chunks, count


def _backward_of_segment(
    r, log_decay, k, v, u_HxN, s_BxHxNxN, resets_BxT, dy_BxTxHxN, ds_BxHxNxN, *, interpret: bool
):  # fmt: skip
    T, call = v.shape[1], _Calls(GRADIENTS.rows, v, log_decay, resets_BxT, interpret)
    specs, states, rows = call.specs, (call.B, call.H, call.n, call.N, call.N), (call.B, call.n, call.H, call.N)
    r, g, k, v, dy = map(call.whole, (r, log_decay, k, v, dy_BxTxHxN))
    tokens = [(r, specs.tokens), (g, call.decay), (k, specs.tokens), (v, specs.tokens)]
    inputs = [*tokens, (dy, specs.tokens), (s_BxHxNxN, specs.state), (ds_BxHxNxN, specs.state)]
    outputs = [*[(states, v.dtype, specs.states)] * 2, (s_BxHxNxN.shape, jnp.float32, specs.state)]
    before, behind, ds = call(_states_kernel, 2, inputs, outputs, STATES, "states")

    of_decay = (rows, jnp.float32, specs.row_of_chunk) if g.ndim == 2 else (g.shape, jnp.float32, specs.tokens)
    like = lambda x: (x.shape, x.dtype, specs.tokens)
    inputs = [*tokens, (u_HxN, specs.head), (dy, specs.tokens), *[(x, specs.state_of_chunk) for x in (before, behind)]]
    outputs = [like(r), of_decay, like(k), like(v), (rows, jnp.float32, specs.row_of_chunk)]
    dr, dg, dk, dv, du = call(_gradients_kernel, call.n, inputs, outputs, GRADIENTS, "gradients")
    dg = dg.sum((0, 1)) if g.ndim == 2 else dg[:, :T]
    return dr[:, :T], dg, dk[:, :T], dv[:, :T], du.sum((0, 1)), ds
