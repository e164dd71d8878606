"""RWKV-5's and RWKV-6's recurrence as Pallas kernels (the algebra: wkv6_xla.py).

`forward` walks along a head's chunks with the state in registers. `states` is that walk for the backward pass, without what
tokens read, and at the same time the walk from the end: it writes the state before each chunk and the gradient of that behind
it. `gradients` has a program for each chunk of each head, and all else from the inputs and those two.

A decay that is the same for all tokens makes every exponent a number of tokens times it: no sums, and its gradient goes back as
one row a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import Tile
from jaxvram.kernels.wkv6_xla import FLOOR, across, spans

HEADS = (16, 32, 64)
CHUNK = 16
HALVES = tuple(1 << level for level in range(1, CHUNK.bit_length() - 1))  # of 2 tokens and up: between neighbours is no decay
FORWARD = STATES = GRADIENTS = Tile(CHUNK, 64, 4, 1)


def _fp32(x):
    return x.astype(jnp.float32)


class _Chunk:
    """What masks and decays of a chunk are. Arrays are turned, rows are keys or values, columns tokens, so that each warp has
    16 rows of all products but the small ones. (Triton gives the warps of chained products rows of 16 each.)
    """

    def __init__(self, c, T: int, dtype, g_ref, document_ref):
        self.start, self.dtype, self.constant = c * CHUNK, dtype, len(g_ref.shape) == 1
        self.row, self.column = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
        self.token = jax.lax.broadcasted_iota(jnp.int32, (1, CHUNK), 1)
        self.length = jnp.minimum(CHUNK, T - self.start)  # tokens behind the end don't decay
        self.g = jnp.maximum(backend.load(g_ref)[:, None] if self.constant else self.load(g_ref), FLOOR)
        last_Nx1 = self.g * self.length if self.constant else self.g.sum(axis=1)[:, None]
        self.same, self.from_start, self.to_end, self.through_1xN = True, 1.0, 1.0, jnp.exp(last_Nx1).T
        if document_ref is not None:
            document_C = backend.load(document_ref.at[pl.ds(self.start, CHUNK)])
            last = document_C.max()  # they are counted
            self.same = document_C[:, None] == document_C[None, :]
            self.from_start, self.to_end = _fp32(document_C == 0)[None, :], _fp32(document_C == last)[None, :]
            self.through_1xN *= _fp32(last == 0)

    def load(self, ref):
        return backend.load(ref.at[pl.ds(self.start, CHUNK), :]).T

    def store(self, ref, value_NxC) -> None:
        backend.store(ref.at[pl.ds(self.start, CHUNK), :], value_NxC.T)

    def sums(self, x_NxC, mask):
        """sum_i x_i of the tokens i (rows) that the mask has for token t (columns).

        On tensor cores as two products, of what bf16 has of x and of what it has of the rest: of an exponent x, exp(x) is
        wrong by less than 1e-5 then, of 1. An fp32 product would take a hundred registers a thread.
        """
        if self.dtype == jnp.float32:
            return backend.dot(x_NxC, _fp32(mask))
        high = x_NxC.astype(self.dtype)
        low = (x_NxC - _fp32(high)).astype(self.dtype)
        return backend.dot(high, mask.astype(self.dtype)) + backend.dot(low, mask.astype(self.dtype))

    def across(self, h: int):
        return across(self.row, self.column, h) & self.same

    def decay(self, mask):
        """(N, C): exp of the sum of the log decays of the tokens i (rows) that the mask has for token t (columns)."""
        if self.constant:
            count_C = jnp.where(mask & (self.row < self.length), 1.0, 0.0).sum(axis=0)
            return jnp.exp(self.g * count_C[None, :])
        return jnp.exp(self.sums(self.g, mask))

    def spans(self, h: int):
        return spans(self.column, self.row, h)

    def from_start_decay(self):
        return self.decay(self.row < self.column) * self.from_start

    def to_end_decay(self):
        return self.decay(self.row > self.column) * self.to_end

    def scaled(self, x_NxC, factor):
        return (_fp32(x_NxC) * factor).astype(self.dtype)

    def pairs(self, x_NxC, y_NxC, mask):
        """x_t . y_j of tokens t and j, where the mask is true."""
        return jnp.where(mask, backend.dot(x_NxC, y_NxC, trans_a=True), 0.0)


def _documents(refs, outputs: int):
    """(the reference of document counts or None, those of the outputs)."""
    return (refs[0] if len(refs) > outputs else None), refs[-outputs:]


def _forward_kernel(r_ref, g_ref, k_ref, v_ref, u_ref, s_ref, *refs, T: int, chunks: int):
    document_ref, (y_ref, last_ref) = _documents(refs, 2)
    u_Nx1 = backend.load(u_ref)[:, None]

    def of_chunk(c, s_NxN):
        chunk = _Chunk(c, T, v_ref.dtype, g_ref, document_ref)
        r, k, v = map(chunk.load, (r_ref, k_ref, v_ref))
        A_CxC = chunk.pairs(chunk.scaled(r, u_Nx1), k, chunk.row == chunk.column)
        A_CxC += chunk.pairs(r, k, chunk.across(1))
        for h in HALVES:
            f = chunk.decay(chunk.spans(h))
            A_CxC += chunk.pairs(chunk.scaled(r, f), chunk.scaled(k, f), chunk.across(h))
        y_NxC = backend.dot(s_NxN.astype(chunk.dtype), chunk.scaled(r, chunk.from_start_decay()))
        chunk.store(y_ref, y_NxC + backend.dot(v, A_CxC.astype(chunk.dtype), trans_b=True))
        return s_NxN * chunk.through_1xN + backend.dot(v, chunk.scaled(k, chunk.to_end_decay()), trans_b=True)

    backend.store(last_ref, jax.lax.fori_loop(0, chunks, of_chunk, backend.load(s_ref)))


def _states_kernel(r_ref, g_ref, k_ref, v_ref, dy_ref, s_ref, ds_ref, *refs, T: int, chunks: int):
    document_ref, (before_ref, behind_ref, first_ref) = _documents(refs, 3)

    def onwards(c, s_NxN):
        backend.store(before_ref.at[c], s_NxN)
        chunk = _Chunk(c, T, v_ref.dtype, g_ref, document_ref)
        k = chunk.scaled(chunk.load(k_ref), chunk.to_end_decay())
        return s_NxN * chunk.through_1xN + backend.dot(chunk.load(v_ref), k, trans_b=True)

    def back(i, ds_NxN):
        c = chunks - 1 - i
        backend.store(behind_ref.at[c], ds_NxN)
        chunk = _Chunk(c, T, v_ref.dtype, g_ref, document_ref)
        r = chunk.scaled(chunk.load(r_ref), chunk.from_start_decay())
        return ds_NxN * chunk.through_1xN + backend.dot(chunk.load(dy_ref), r, trans_b=True)

    @pl.when(pl.program_id(0) == 0)
    def _():
        jax.lax.fori_loop(0, chunks, onwards, backend.load(s_ref))

    @pl.when(pl.program_id(0) == 1)
    def _():
        backend.store(first_ref, jax.lax.fori_loop(0, chunks, back, backend.load(ds_ref)))


class _DecayGradient:
    """Collects that of the log decay, from what an exponent's gradient is. Nothing is subtracted: see wkv6_xla.py."""

    def __init__(self, chunk: _Chunk):
        self.chunk, self.total = chunk, 0.0

    def add(self, exponent_NxC, mask) -> None:
        """`exponent`: gradients of those of tokens t (rows of the mask), which are sums of the tokens i (columns) it has."""
        chunk = self.chunk
        if chunk.constant:
            count_C = jnp.where(mask & (chunk.column < chunk.length), 1.0, 0.0).sum(axis=1)
            self.total += (exponent_NxC * count_C[None, :]).sum(axis=1)
        else:
            self.total += chunk.sums(exponent_NxC, mask)

    def add_to_all(self, exponent_N) -> None:
        chunk = self.chunk
        self.total += exponent_N * chunk.length if chunk.constant else exponent_N[:, None]

    def store(self, ref) -> None:
        if self.chunk.constant:
            backend.store(ref, self.total)
        else:
            self.chunk.store(ref, self.total)


def _gradients_kernel(r_ref, g_ref, k_ref, v_ref, u_ref, dy_ref, before_ref, behind_ref, *refs, T: int, chunks: int):
    document_ref, (dr_ref, dg_ref, dk_ref, dv_ref, du_ref) = _documents(refs, 5)
    chunk, dot = _Chunk(pl.program_id(0), T, v_ref.dtype, g_ref, document_ref), backend.dot
    r, k, v, dy = map(chunk.load, (r_ref, k_ref, v_ref, dy_ref))
    s, ds, u_Nx1 = backend.load(before_ref), backend.load(behind_ref), backend.load(u_ref)[:, None]
    row, column = chunk.row, chunk.column
    dg = _DecayGradient(chunk)

    of_pairs = dot(dy, v, trans_a=True)  # dA
    own_1xC = jnp.where(row == column, of_pairs, 0.0).sum(axis=0)[None, :]
    backend.store(du_ref, (own_1xC * r * k).sum(axis=1))
    A_CxC = chunk.pairs(chunk.scaled(r, u_Nx1), k, row == column) + chunk.pairs(r, k, chunk.across(1))
    dA = jnp.where(chunk.across(1), of_pairs, 0.0).astype(chunk.dtype)
    dr = own_1xC * u_Nx1 * k + dot(k, dA, trans_b=True)
    dk = own_1xC * u_Nx1 * r + dot(r, dA)
    for h in HALVES:
        f, mask = chunk.decay(chunk.spans(h)), chunk.across(h)
        r_f, k_f, dA = chunk.scaled(r, f), chunk.scaled(k, f), jnp.where(mask, of_pairs, 0.0).astype(chunk.dtype)
        A_CxC += chunk.pairs(r_f, k_f, mask)
        dr_f, dk_f = f * dot(k_f, dA, trans_b=True), f * dot(r_f, dA)
        dr, dk = dr + dr_f, dk + dk_f
        dg.add(r * dr_f + k * dk_f, spans(row, column, h))

    f = chunk.to_end_decay()
    chunk.store(dv_ref, dot(dy, A_CxC.astype(chunk.dtype)) + dot(ds, chunk.scaled(k, f)))
    dk_f = f * dot(ds, v, trans_a=True)
    chunk.store(dk_ref, dk + dk_f)
    dg.add(k * dk_f, row < column)
    dr_f = chunk.from_start_decay() * dot(s, dy, trans_a=True)
    chunk.store(dr_ref, dr + dr_f)
    dg.add(r * dr_f, row > column)
    dg.add_to_all((_fp32(s) * _fp32(ds) * chunk.through_1xN).sum(axis=0))
    dg.store(dg_ref)


class _Specs:
    """What a program (chunk or direction, head, example) sees of each kind of array."""

    def __init__(self, n: int, N: int):
        self.tokens = pl.BlockSpec((None, n * CHUNK, None, N), lambda c, h, b: (b, 0, h, 0))
        self.head = pl.BlockSpec((None, N), lambda c, h, b: (h, 0))
        self.state = pl.BlockSpec((None, None, N, N), lambda c, h, b: (b, h, 0, 0))
        self.states = pl.BlockSpec((None, None, n, N, N), lambda c, h, b: (b, h, 0, 0, 0))
        self.state_of_chunk = pl.BlockSpec((None, None, None, N, N), lambda c, h, b: (b, h, c, 0, 0))
        self.row_of_chunk = pl.BlockSpec((None, None, None, N), lambda c, h, b: (b, c, h, 0))
        self.documents = pl.BlockSpec((None, n * CHUNK), lambda c, h, b: (b, 0))


class _Calls:
    """The kernels on arrays of one size, of whole chunks; the last `T` has tokens behind the end."""

    def __init__(self, v_BxTxHxN, log_decay, resets_BxT, interpret: bool):
        self.B, self.T, self.H, self.N = v_BxTxHxN.shape
        self.n, self.interpret = pl.cdiv(self.T, CHUNK), interpret
        self.specs = _Specs(self.n, self.N)
        self.decay = self.specs.head if log_decay.ndim == 2 else self.specs.tokens
        self.documents = []
        if resets_BxT is not None:
            resets = self.padded(resets_BxT).reshape(self.B, self.n, CHUNK)
            self.documents = [resets.cumsum(2, dtype=jnp.int32).reshape(self.B, -1)]

    def padded(self, x):
        """The last chunk ends in tokens that change nothing: masks in the kernels would cost registers."""
        if x.ndim == 2 and x.dtype != bool:
            return x
        return jnp.pad(x, [(0, 0), (0, self.n * CHUNK - self.T)] + [(0, 0)] * (x.ndim - 2))

    def __call__(self, kernel, programs: int, inputs: list, outputs: list, tile: Tile, name: str):
        """`inputs`: (array, spec) each; `outputs`: (shape, dtype, spec)."""
        return backend.call(
            functools.partial(kernel, T=self.T, chunks=self.n),
            grid=(programs, self.H, self.B),
            in_specs=[*(spec for _, spec in inputs), *[self.specs.documents] * len(self.documents)],
            out_specs=[spec for *_, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
            tile=tile, interpret=self.interpret, name=f"wkv6_{name}",
        )(*(x for x, _ in inputs), *self.documents)  # fmt: skip


def forward(r, log_decay, k, v, u_HxN, s_BxHxNxN, resets_BxT, *, interpret: bool):
    """(y_BxTxHxN in the dtype of v, the last state in fp32)."""
    T, call = v.shape[1], _Calls(v, log_decay, resets_BxT, interpret)
    tokens, state = call.specs.tokens, call.specs.state
    r, g, k, v = map(call.padded, (r, log_decay, k, v))
    inputs = [(r, tokens), (g, call.decay), (k, tokens), (v, tokens), (u_HxN, call.specs.head), (s_BxHxNxN, state)]
    outputs = [(v.shape, v.dtype, tokens), (s_BxHxNxN.shape, jnp.float32, state)]
    y, s = call(_forward_kernel, 1, inputs, outputs, FORWARD, "forward")
    return y[:, :T], s


def backward(r, log_decay, k, v, u_HxN, s_BxHxNxN, resets_BxT, dy_BxTxHxN, ds_BxHxNxN, *, interpret: bool):
    """The gradients of the first six, in their dtypes."""
    T, call = v.shape[1], _Calls(v, log_decay, resets_BxT, interpret)
    specs, states, rows = call.specs, (call.B, call.H, call.n, call.N, call.N), (call.B, call.n, call.H, call.N)
    r, g, k, v, dy = map(call.padded, (r, log_decay, k, v, dy_BxTxHxN))
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
