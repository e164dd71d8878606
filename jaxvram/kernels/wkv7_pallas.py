"""RWKV-7's recurrence as Pallas kernels (the algebra: wkv7_xla.py): walks along a head's chunks, and a program a chunk.

`forward` has the state in registers. `states` is the same walk for the backward pass, without what tokens read: it writes
the state before each chunk, and U. `states_back` walks from the end and writes the gradients of the state behind each
chunk and of what U is solved for.
`gradients` and `gradients_of_removal`: a program has one chunk of one head, and what these two left of it. As one walk, or
one kernel, they would spill.

Why chunks of 16: products with the state cost a token the same whatever C is, those within a chunk grow with C, and 16 is
the least that tensor cores take; a chunk is also as far as 1 / P can go in fp32 and bf16 without sub-blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import Tile
from jaxvram.kernels.chunks import document_counts, documents, padded
from jaxvram.kernels.segments import equal_segments, walk_back
from jaxvram.kernels.wkv7_xla import CHUNK, inverse

HEADS = (16, 32, 64)
FORWARD = STATES = STATES_BACK = Tile(CHUNK, 64, 4, 1)
GRADIENTS = Tile(CHUNK, 64, 4, 1)
BUDGET = 192 * 2**20  # bytes of what the backward pass makes on its way; a longer sequence has more segments


class _Chunk:
    """A chunk's arrays, turned: rows are keys or values, columns tokens, so that each warp has 16 rows of all products but
    the small ones. (Triton gives the warps of chained products rows of 16 each; of 16 tokens all warps would have all.)
    """

    def __init__(self, refs, document_ref, start):
        self.start = start
        self.r, g_NxC, self.k, self.v, self.kappa, self.a = (self.load(ref) for ref in refs)
        self.dtype = self.v.dtype
        self.row, self.column = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
        self.seen, self.before = self.row >= self.column, self.row > self.column
        self.from_start_C = self.to_end_C = jnp.ones(CHUNK, jnp.float32)
        sums_NxC, last_N = self.sums(g_NxC, self.row <= self.column), g_NxC.sum(axis=1)
        self.through_1xN, self.alive = jnp.exp(last_N)[None, :], jnp.float32(1)  # P_C
        if document_ref is not None:
            document_C = backend.load(document_ref.at[pl.ds(start, CHUNK)])
            last = document_C.max()  # they are counted
            same = document_C[:, None] == document_C[None, :]
            self.seen, self.before = self.seen & same, self.before & same
            self.from_start_C = self.ones(document_C == 0)
            self.to_end_C, self.alive = self.ones(document_C == last), self.ones(last == 0)
        self.grown, self.grown_before, self.shrunk = jnp.exp(sums_NxC), jnp.exp(sums_NxC - g_NxC), jnp.exp(-sums_NxC)
        self.beta = self.kappa.astype(jnp.float32) * self.a

    def load(self, ref):
        return backend.load(ref.at[pl.ds(self.start, CHUNK), :]).T

    def store(self, ref, value_NxC) -> None:
        backend.store(ref.at[pl.ds(self.start, CHUNK), :], value_NxC.T)

    @staticmethod
    def ones(mask):
        return mask.astype(jnp.float32)

    def sums(self, x_NxC, mask):
        """sum_i x_i of the tokens i (rows) that the mask has for token t (columns), in fp32.

        On tensor cores as three products, of what bf16 has of x, of what it has of the rest, and so on: an fp32 product
        would take a hundred registers a thread.
        """
        if self.dtype == jnp.float32:
            return backend.dot(x_NxC, self.ones(mask))
        mask, total = mask.astype(self.dtype), 0.0
        for _ in range(3):
            part = x_NxC.astype(self.dtype)
            total, x_NxC = total + backend.dot(part, mask), x_NxC - part.astype(jnp.float32)
        return total

    def scaled(self, x_NxC, factor):
        return (x_NxC.astype(jnp.float32) * factor).astype(self.dtype)

    def pairs(self, x_NxC, y_NxC, mask):
        """x_i . y_j of tokens i and j, where the mask is true."""
        return jnp.where(mask, backend.dot(x_NxC, y_NxC, trans_a=True), 0.0).astype(self.dtype)

    def of_keys(self):
        """(alpha P', r P, beta / P, k / P)."""
        alpha = self.scaled(self.kappa, -self.grown_before)
        return alpha, self.scaled(self.r, self.grown), self.scaled(self.beta, self.shrunk), self.scaled(self.k, self.shrunk)

    def inverse(self, alpha, beta):
        """(I - A)^-1, in fp32 inside."""
        A_CxC = jnp.where(self.before, backend.dot(alpha, beta, trans_a=True), 0.0)
        return inverse(A_CxC, backend.dot).astype(self.dtype)

    def taken_out(self, alpha, beta, k, s_NxN):
        """U, with the state before the chunk."""
        Z_NxC = self.from_start_C[None, :] * backend.dot(s_NxN, alpha)
        Z_NxC += backend.dot(self.v, self.pairs(alpha, k, self.before), trans_b=True)
        return backend.dot(Z_NxC.astype(self.dtype), self.inverse(alpha, beta), trans_b=True).astype(self.dtype)

    def passed_on(self, U_NxC, beta, k, s_NxN):
        """The state behind the chunk: the decay to its end is taken out of the sums."""
        to_end = self.to_end_C[None, :]
        s_NxN = s_NxN * self.alive + backend.dot(self.scaled(U_NxC, to_end), beta, trans_b=True)
        return (s_NxN + backend.dot(self.scaled(self.v, to_end), k, trans_b=True)) * self.through_1xN


def _forward_kernel(*refs, chunks: int):
    (*six, s_ref), (document_ref, (y_ref, last_ref)) = refs[:7], documents(refs[7:], 2)

    def of_chunk(c, s_NxN):
        chunk = _Chunk(six, document_ref, c * CHUNK)
        alpha, rho, beta, k = chunk.of_keys()
        s = s_NxN.astype(chunk.dtype)
        U_NxC = chunk.taken_out(alpha, beta, k, s)
        y_NxC = chunk.from_start_C[None, :] * backend.dot(s, rho)
        y_NxC += backend.dot(U_NxC, chunk.pairs(rho, beta, chunk.seen), trans_b=True)
        y_NxC += backend.dot(chunk.v, chunk.pairs(rho, k, chunk.seen), trans_b=True)
        chunk.store(y_ref, y_NxC)
        return chunk.passed_on(U_NxC, beta, k, s_NxN)

    backend.store(last_ref, jax.lax.fori_loop(0, chunks, of_chunk, backend.load(s_ref)))


def _states_kernel(*refs, chunks: int):
    (*six, s_ref), (document_ref, (states_ref, U_ref)) = refs[:7], documents(refs[7:], 2)

    def of_chunk(c, s_NxN):
        backend.store(states_ref.at[c], s_NxN)
        chunk = _Chunk(six, document_ref, c * CHUNK)
        alpha, _, beta, k = chunk.of_keys()
        U_NxC = chunk.taken_out(alpha, beta, k, s_NxN.astype(chunk.dtype))
        chunk.store(U_ref, U_NxC)
        return chunk.passed_on(U_NxC, beta, k, s_NxN)

    jax.lax.fori_loop(0, chunks, of_chunk, backend.load(s_ref))


def _states_back_kernel(*refs, chunks: int):
    (*six, dy_ref, ds_ref), (document_ref, (states_ref, dZ_ref, first_ref)) = refs[:8], documents(refs[8:], 3)

    def of_chunk(i, ds_NxN):
        c = chunks - 1 - i
        backend.store(states_ref.at[c], ds_NxN)
        chunk = _Chunk(six, document_ref, c * CHUNK)
        alpha, rho, beta, _ = chunk.of_keys()
        dy, from_start, ds_NxN = chunk.load(dy_ref), chunk.from_start_C[None, :], ds_NxN * chunk.through_1xN
        dU = chunk.to_end_C[None, :] * backend.dot(ds_NxN.astype(chunk.dtype), beta)
        dU += backend.dot(dy, chunk.pairs(rho, beta, chunk.seen))
        dZ = backend.dot(dU.astype(chunk.dtype), chunk.inverse(alpha, beta)).astype(chunk.dtype)
        chunk.store(dZ_ref, dZ)
        ds_NxN = ds_NxN * chunk.alive + backend.dot(dy, chunk.scaled(rho, from_start), trans_b=True)
        return ds_NxN + backend.dot(dZ, chunk.scaled(alpha, from_start), trans_b=True)

    backend.store(first_ref, jax.lax.fori_loop(0, chunks, of_chunk, backend.load(ds_ref)))


def _of_one_chunk(refs, outputs: int):
    """(its arrays, gradient of y, U, gradient of Z, the state before and the gradient of that behind, references)."""
    (*six, dy_ref, U_ref, dZ_ref, before_ref, behind_ref), (document_ref, refs) = refs[:11], documents(refs[11:], outputs)
    chunk = _Chunk(six, document_ref, pl.program_id(0) * CHUNK)
    behind = chunk.scaled(backend.load(behind_ref), chunk.through_1xN)
    return chunk, *map(chunk.load, (dy_ref, U_ref, dZ_ref)), backend.load(before_ref), behind, refs


def _fp32(x):
    return x.astype(jnp.float32)


def _gradients_kernel(*refs):
    """Of r, k and v, and their part of that of the log decay.

    That is the sum of all that crosses a token: what is read there or behind less what begins there, and what began before
    it and is in the state. What a token itself adds, k_t (beta_t) seen by r_t, knows no decay, and is kept apart: it need
    not cancel.
    """
    chunk, dy, U, dZ, s, ds, (dr_ref, dg_ref, dk_ref, dv_ref) = _of_one_chunk(refs, 4)
    dot, from_start, to_end = backend.dot, chunk.from_start_C[None, :], chunk.to_end_C[None, :]
    alpha, rho, beta, k = chunk.of_keys()
    dv = dot(dy, chunk.pairs(rho, k, chunk.seen)) + dot(dZ, chunk.pairs(alpha, k, chunk.before)) + to_end * dot(ds, k)
    chunk.store(dv_ref, dv)

    dE, dF = (chunk.pairs(dy, x, chunk.before) for x in (U, chunk.v))
    own_beta, own_k = ((_fp32(dy) * _fp32(x)).sum(axis=0)[None, :] for x in (U, chunk.v))
    dr = dot(beta, dE, trans_b=True) + dot(k, dF, trans_b=True) + from_start * dot(s, dy, trans_a=True)
    dr *= chunk.grown
    chunk.store(dr_ref, dr + own_beta * chunk.beta + own_k * chunk.k)
    read = _fp32(chunk.r) * dr
    dk = chunk.shrunk * (dot(alpha, chunk.pairs(dZ, chunk.v, chunk.before)) + dot(rho, dF))
    read -= _fp32(chunk.k) * dk
    behind = chunk.shrunk * to_end * dot(ds, chunk.v, trans_a=True)
    chunk.store(dk_ref, dk + behind + own_k * chunk.r)
    dg = chunk.sums(read, chunk.row >= chunk.column) + chunk.sums(_fp32(chunk.k) * behind, chunk.row < chunk.column)
    chunk.store(dg_ref, dg + chunk.alive * (_fp32(s) * _fp32(ds)).sum(axis=0)[:, None])


def _gradients_of_removal_kernel(*refs):
    """Of kappa and a, and the rest of that of the log decay."""
    part_ref, *refs = refs
    chunk, dy, U, dZ, s, ds, (dg_ref, dkappa_ref, da_ref) = _of_one_chunk(refs, 3)
    dot, from_start, to_end = backend.dot, chunk.from_start_C[None, :], chunk.to_end_C[None, :]
    alpha, rho, beta, k = chunk.of_keys()
    dA, dB, dE = (chunk.pairs(x, y, chunk.before) for x, y in ((dZ, U), (dZ, chunk.v), (dy, U)))
    dalpha = dot(beta, dA, trans_b=True) + dot(k, dB, trans_b=True) + from_start * dot(s, dZ, trans_a=True)
    dalpha *= chunk.grown_before
    dg = chunk.load(part_ref) - chunk.sums(_fp32(chunk.kappa) * dalpha, chunk.row > chunk.column)
    dbeta = chunk.shrunk * (dot(alpha, dA) + dot(rho, dE))
    dg -= chunk.sums(chunk.beta * dbeta, chunk.row >= chunk.column)
    behind = chunk.shrunk * to_end * dot(ds, U, trans_a=True)
    chunk.store(dg_ref, dg + chunk.sums(chunk.beta * behind, chunk.row < chunk.column))
    dbeta += behind + chunk.r * (_fp32(dy) * _fp32(U)).sum(axis=0)[None, :]
    chunk.store(da_ref, dbeta * chunk.kappa)
    chunk.store(dkappa_ref, dbeta * chunk.a - dalpha)


def _call(kernel, inputs, resets_BxL, outputs, tile: Tile, interpret: bool, name: str, by_chunk=False):
    """A program a head, or a chunk of one. Arrays are of tokens (four axes), states (three) or states of chunks (five)."""
    B, L, H, N = inputs[0].shape
    n = L // CHUNK

    def spec(x):
        if x.ndim == 4:
            return pl.BlockSpec((None, L, None, N), lambda c, h, b: (b, 0, h, 0))
        if x.ndim == 3:
            return pl.BlockSpec((None, N, N), lambda c, h, b: (b * H + h, 0, 0))
        if by_chunk:
            return pl.BlockSpec((None, None, None, N, N), lambda c, h, b: (b, h, c, 0, 0))
        return pl.BlockSpec((None, None, n, N, N), lambda c, h, b: (b, h, 0, 0, 0))

    counts, count_specs = [], []
    if resets_BxL is not None:
        counts = [document_counts(resets_BxL, CHUNK)]
        count_specs = [pl.BlockSpec((None, L), lambda c, h, b: (b, 0))]
    return backend.call(
        kernel if by_chunk else functools.partial(kernel, chunks=n),
        grid=(n if by_chunk else 1, H, B),
        in_specs=[*map(spec, inputs), *count_specs],
        out_specs=[*map(spec, outputs)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        tile=tile, interpret=interpret, name=name,
    )(*inputs, *counts)  # fmt: skip


def _by_head(s_BxHxNxN):
    """(B H, N, N): a state that no shape of tokens can be taken for."""
    return s_BxHxNxN.reshape(-1, *s_BxHxNxN.shape[2:])


def forward(r, log_decay, k, v, kappa, a, s_BxHxNxN, resets_BxT, *, interpret: bool):
    """(y_BxTxHxN in the dtype of v, the last state in fp32)."""
    T, arrays = v.shape[1], (r, log_decay, k, v, kappa, a, resets_BxT)
    *six, resets_BxL = jax.tree.map(lambda x: padded(x, pl.cdiv(T, CHUNK), CHUNK), arrays)
    s = _by_head(s_BxHxNxN)
    y, s = _call(_forward_kernel, [*six, s], resets_BxL, [six[3], s], FORWARD, interpret, "wkv7_forward")
    return y[:, :T], s.reshape(s_BxHxNxN.shape)


def _segments(v_BxTxHxN) -> tuple[int, int]:
    """(tokens of a segment, number of segments): as many that what is made on the way back stays within BUDGET."""
    B, T, H, N = v_BxTxHxN.shape
    itemsize = v_BxTxHxN.dtype.itemsize
    of_chunk = 2 * itemsize * N * N + CHUNK * N * (2 * itemsize + 4)  # two states; U, dZ and a part of dg
    chunks, count = equal_segments(pl.cdiv(T, CHUNK), BUDGET // (B * H * of_chunk))
    return CHUNK * chunks, count


def backward(r, log_decay, k, v, kappa, a, s_BxHxNxN, resets_BxT, dy_BxTxHxN, ds_BxHxNxN, *, interpret: bool):
    """The gradients of the first seven, in their dtypes."""

    def last_of(arrays, s):
        *six, resets = arrays
        return forward(*six, s, resets, interpret=interpret)[1]

    gradients_of = functools.partial(_backward_of_segment, interpret=interpret)
    arrays = (r, log_decay, k, v, kappa, a, resets_BxT)
    gradients, ds = walk_back(last_of, gradients_of, arrays, s_BxHxNxN, dy_BxTxHxN, ds_BxHxNxN, *_segments(v))
    return *gradients, ds


def _backward_of_segment(arrays, s_BxHxNxN, dy_BxTxHxN, ds_BxHxNxN, *, interpret: bool):
    """(the gradients of r, log decay, k, v, kappa and a, that of the state before the first token)."""
    B, T, H, N = dy_BxTxHxN.shape
    n = pl.cdiv(T, CHUNK)
    *six, resets_BxL, dy = jax.tree.map(lambda x: padded(x, n, CHUNK), (*arrays, dy_BxTxHxN))
    r, log_decay, k, v, kappa, a = six
    states = jax.ShapeDtypeStruct((B, H, n, N, N), v.dtype)
    call = lambda kernel, inputs, outputs, tile, name, **options: _call(
        kernel, inputs, resets_BxL, outputs, tile, interpret, f"wkv7_{name}", **options
    )
    s, ds = _by_head(s_BxHxNxN), _by_head(ds_BxHxNxN)
    before, U = call(_states_kernel, [*six, s], [states, v], STATES, "states")
    inputs, outputs = [*six, dy, ds], [states, v, s]
    behind, dZ, ds = call(_states_back_kernel, inputs, outputs, STATES_BACK, "states_back")
    inputs, outputs = [*six, dy, U, dZ, before, behind], [r, log_decay, k, v]
    dr, dg, dk, dv = call(_gradients_kernel, inputs, outputs, GRADIENTS, "gradients", by_chunk=True)
    inputs, outputs = [dg, *inputs], [log_decay, kappa, a]
    dg, dkappa, da = call(_gradients_of_removal_kernel, inputs, outputs, GRADIENTS, "gradients_of_removal", by_chunk=True)
    return tuple(x[:, :T] for x in (dr, dg, dk, dv, dkappa, da)), ds.reshape(s_BxHxNxN.shape)
