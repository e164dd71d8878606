"""The scalar-decay recurrence without kernels, by chunks of tokens, and what of the decays both forms make beforehand.

Within a chunk, with cs the sum of the log decays since its start, D_ij = exp(cs_i - cs_j) for i >= j, S = q k^T and h, dh
the states before and the gradient of the state behind it:
  o_i = sum_j S_ij D_ij w_j v_j + exp(cs_i) h q_i;  h' = exp(cs_last) h + sum_j exp(cs_last - cs_j) w_j v_j k_j^T.
Backward, with E_ij = do_i . v_j, the summands of the loss's slope are kept apart by what they cross (`log_decay_gradient`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxvram.kernels.backend import HIDDEN, LOG2_E
from jaxvram.kernels.segments import equal_segments, walk, walk_back

CHUNK = 64
SEGMENT_BUDGET = 32 * 2**20  # bytes of one (tokens, tokens) array of fp32 of all chunks that are computed side by side
FLOOR = -160.0  # binary logarithm of a decay that is 0 in fp32, as all below are
GRID = 2.0**-9  # 128 multiples of it down to FLOOR still add up without rounding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decays:
    """Of n chunks of C tokens each, the last one padded. Binary logarithms; L = n C.

    The decay from token j to token i of a chunk is 2^((high_i - high_j) + (low_i - low_j)). One fp32 sum would not do:
    behind a token of log decay -100 it keeps four digits of what follows. `high` holds multiples of GRID, summed exactly.
    """

    high_BxHxL: jax.Array
    low_BxHxL: jax.Array
    from_start_BxHxL: jax.Array  # decay of the state before the chunk up to token i
    to_end_BxHxL: jax.Array  # decay from token j to the chunk's end
    through_BxHxn: jax.Array  # decay of the state through the chunk
    document_BxL: jax.Array | None  # int32, how many documents have begun in the chunk; None: none does


def decays(log_decay_BxTxH, resets_BxT, C: int) -> Decays:
    B, T, H = log_decay_BxTxH.shape
    n = -(-T // C)
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * C - T)])
    g_BxHxnxC = pad(jnp.maximum(log_decay_BxTxH * LOG2_E, FLOOR).swapaxes(1, 2)).reshape(B, H, n, C)
    high = jnp.floor(g_BxHxnxC / GRID) * GRID
    high, low = _sums(high), _sums(g_BxHxnxC - high)
    from_start = jnp.exp2(high + low)
    to_end = jnp.exp2((high[..., -1:] - high) + (low[..., -1:] - low))
    through, document_BxL = from_start[..., -1], None
    if resets_BxT is not None:
        document = _sums(pad(resets_BxT.astype(jnp.float32)).reshape(B, 1, n, C))
        from_start = jnp.where(document == 0, from_start, 0)
        to_end = jnp.where(document == document[..., -1:], to_end, 0)
        through = jnp.where(document[..., -1] == 0, through, 0)
        document_BxL = document.reshape(B, n * C).astype(jnp.int32)
    flat = lambda x: x.reshape(B, H, n * C)
    return Decays(flat(high), flat(low), flat(from_start), flat(to_end), through, document_BxL)


def _sums(x):
    """Running sums along the last axis, by a product: one operation, where XLA's cumsum is a dozen."""
    C = x.shape[-1]
    return jnp.matmul(x, jnp.tri(C, dtype=x.dtype).T, precision=jax.lax.Precision.HIGHEST)


def product(spec: str, *operands, dtype):
    """Operands rounded to `dtype`, sums in fp32; fp32 is multiplied as fp32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    operands = [x.astype(dtype) for x in operands]
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=jnp.float32)


class _Segment:
    """Chunks that are computed side by side. Letters of products: b batch, g group, c chunk, r one of the group's R heads,
    i and j tokens, p value, k key.
    """

    def __init__(self, q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, resets_BxT, C: int):
        (self.B, self.T, self.G, _), H = q_BxTxGxN.shape, v_BxTxHxP.shape[2]
        self.n, self.C, self.R = -(-self.T // C), C, H // self.G
        self.dot = functools.partial(product, dtype=q_BxTxGxN.dtype)
        d = decays(log_decay_BxTxH, resets_BxT, C)
        rows = lambda x_BxHxL: x_BxHxL.reshape(self.B, self.G, self.R, self.n, C).swapaxes(2, 3)
        high, low, self.from_start, self.to_end = map(rows, (d.high_BxHxL, d.low_BxHxL, d.from_start_BxHxL, d.to_end_BxHxL))
        self.through = d.through_BxHxn.reshape(self.B, self.G, self.R, self.n).swapaxes(2, 3)[..., None, None]
        seen = jnp.tri(C, dtype=bool)
        if d.document_BxL is not None:
            document = d.document_BxL.reshape(self.B, 1, self.n, 1, C)
            seen = seen & (document[..., :, None] == document[..., None, :])
        exponent = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
        self.between = jnp.exp2(jnp.where(seen, exponent, HIDDEN))  # the mask before the power: nothing overflows
        self.q, self.k, self.v = self.of_groups(q_BxTxGxN), self.of_groups(k_BxTxGxN), self.of_heads(v_BxTxHxP)
        self.weight = self.of_heads(weight_BxTxH[..., None])[..., 0]
        self.scores = self.dot("bgcik,bgcjk->bgcij", self.q, self.k)[:, :, :, None] * self.between

    def of_groups(self, x_BxTxGxN):
        """(B, G, n, C, N), zeros behind the end."""
        x = jnp.pad(x_BxTxGxN, ((0, 0), (0, self.n * self.C - self.T), (0, 0), (0, 0)))
        return x.reshape(self.B, self.n, self.C, self.G, -1).transpose(0, 3, 1, 2, 4)

    def of_heads(self, x_BxTxHxP):
        """(B, G, n, R, C, P), zeros behind the end."""
        x = jnp.pad(x_BxTxHxP, ((0, 0), (0, self.n * self.C - self.T), (0, 0), (0, 0)))
        return x.reshape(self.B, self.n, self.C, self.G, self.R, -1).transpose(0, 3, 1, 4, 2, 5)

    def tokens(self, x):
        """(B, T, G, N) of what `of_groups` gives, (B, T, H, P) of what `of_heads` gives."""
        order = (0, 2, 3, 1, 4) if x.ndim == 5 else (0, 2, 4, 1, 3, 5)
        return x.transpose(order).reshape(self.B, self.n * self.C, -1, x.shape[-1])[:, : self.T]

    def pass_on(self, parts, h, reverse=False):
        """h' = through h + part, chunk by chunk: (the states before each, with the axis of the chunks third; the last)."""

        def step(h, of_chunk):
            through, part = of_chunk
            return through * h + part, h

        chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (self.through, parts))
        h, before = jax.lax.scan(step, h, chunks, reverse=reverse, unroll=min(self.n, 8))
        return jnp.moveaxis(before, 0, 2), h

    def states(self, h):
        """(the states before each chunk, (B, G, n, R, P, N); the last)."""
        scaled = self.v * (self.weight * self.to_end)[..., None]
        return self.pass_on(self.dot("bgcrjp,bgcjk->bgcrpk", scaled, self.k), h)

    def forward(self, h):
        """(o_BxTxHxP in fp32, the last state)."""
        before, h = self.states(h)
        o = self.dot("bgcrij,bgcrjp->bgcrip", self.scores * self.weight[..., None, :], self.v)
        o += self.from_start[..., None] * self.dot("bgcik,bgcrpk->bgcrip", self.q, before)
        return self.tokens(o), h

    def backward(self, h, do_BxTxHxP, dh, rows: bool):
        """(dq, dk, dv, with `rows` the gradients of log decay and weight, that of h), in fp32."""
        before, _ = self.states(h)
        do, weight = self.of_heads(do_BxTxHxP), self.weight
        behind, dh = self.pass_on(
            self.dot("bgcrip,bgcik->bgcrpk", do * self.from_start[..., None], self.q), dh, reverse=True
        )
        slopes = self.dot("bgcrip,bgcrjp->bgcrij", do, self.v)
        dscores = (slopes * self.between * weight[..., None, :]).sum(3)
        dq = self.dot("bgcij,bgcjk->bgcik", dscores, self.k)
        dq += self.dot("bgcrip,bgcrpk->bgcik", do * self.from_start[..., None], before)
        dk = self.dot("bgcij,bgcik->bgcjk", dscores, self.q)
        dk += self.dot("bgcrjp,bgcrpk->bgcjk", self.v * (weight * self.to_end)[..., None], behind)
        dv = self.dot("bgcrij,bgcrip->bgcrjp", self.scores, do)
        dv_from_behind = self.to_end[..., None] * self.dot("bgcjk,bgcrpk->bgcrjp", self.k, behind)
        results = [self.tokens(x) for x in (dq, dk, (dv + dv_from_behind) * weight[..., None])]
        if not rows:
            return *results, (), dh
        to_behind = (self.v * dv_from_behind).sum(-1)
        from_before = self.from_start * (do * self.dot("bgcik,bgcrpk->bgcrip", self.q, before)).sum(-1)
        inner = self.scores * slopes
        dweight = inner.sum(-2) + to_behind
        across = (self.through * before * behind).sum((-1, -2))
        dlog_decay = self.log_decay_gradient(inner * weight[..., None, :], from_before, weight * to_behind, across)
        return *results, [self.tokens(x[..., None])[..., 0] for x in (dlog_decay, dweight)], dh

    def log_decay_gradient(self, inner, from_before, to_behind, across):
        """The sum of all summands of the slope that cross token t: they begin before t and end at t or behind.

        Not the difference of all that end (q . dq) and all that begin (k . dk) since: where decays are strong it is 0 but
        for rounding, and the true value, far smaller, is lost.
        """
        begun_by = jnp.tri(self.C, k=-1).T  # [j, t]: j < t
        ends = self.dot("bgcrij,jt->bgcrit", inner, begun_by) + from_before[..., None]
        within = jnp.where(jnp.tri(self.C, dtype=bool), ends, 0).sum(-2)
        return within + product("bgcrj,jt->bgcrt", to_behind, begun_by, dtype=jnp.float32) + across[..., None]


def _segments(v_BxTxHxP) -> tuple[int, int, int]:
    """(tokens of a chunk, of a segment, number of segments)."""
    B, T, H, _ = v_BxTxHxP.shape
    C = min(CHUNK, T)
    chunks, count = equal_segments(-(-T // C), SEGMENT_BUDGET // (4 * B * H * C * C))
    return C, C * chunks, count


def _grouped(h_BxHxPxN, G: int):
    B, H, P, N = h_BxHxPxN.shape
    return h_BxHxPxN.reshape(B, G, H // G, P, N)


def forward(q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, h_BxHxPxN, resets_BxT):
    """(o_BxTxHxP in the dtype of v, the last state in fp32)."""
    C, L, count = _segments(v_BxTxHxP)

    def step(h, arrays, _):
        o_BxLxHxP, h = _Segment(*arrays, C).forward(h)
        return h, o_BxLxHxP.astype(v_BxTxHxP.dtype)

    arrays = (q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, resets_BxT)
    h, o_BxTxHxP = walk(step, _grouped(h_BxHxPxN, q_BxTxGxN.shape[2]), arrays, L, count)
    return o_BxTxHxP, h.reshape(h_BxHxPxN.shape)


def backward(
    q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, h_BxHxPxN, resets_BxT, do_BxTxHxP, dh_BxHxPxN, *,
    rows: bool,
):  # fmt: skip
    """Gradients of q, k, v; of log decay and weight, or () without `rows`; of h."""
    C, L, count = _segments(v_BxTxHxP)
    arrays = (q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, resets_BxT)
    h, dh = (_grouped(x, q_BxTxGxN.shape[2]) for x in (h_BxHxPxN, dh_BxHxPxN))

    def gradients_of(arrays, h, do, dh):
        *gradients, drows, dh = _Segment(*arrays, C).backward(h, do, dh, rows)
        return (*(dx.astype(x.dtype) for dx, x in zip(gradients, arrays[:3], strict=True)), tuple(drows)), dh

    last_of = lambda arrays, h: _Segment(*arrays, C).states(h)[1]
    gradients, dh = walk_back(last_of, gradients_of, arrays, h, do_BxTxHxP, dh, L, count)
    return *gradients, dh.reshape(h_BxHxPxN.shape)
