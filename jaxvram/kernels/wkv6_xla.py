"""RWKV-6's recurrence without kernels, by chunks of C = 16 tokens, and the algebra that both forms follow.

Within a chunk, with g the log decays and S_0 the state before it, rows for tokens,
  Y = (r P) S_0^T + A V,  S_C = S_0 exp(sum of all g) + V^T (k Q),  P_t = exp(sum_{i < t} g_i),  Q_j = exp(sum_{i > j} g_i),
  A_tj = r_t . k_j exp(sum_{j < i < t} g_i) for j < t,  A_tt = r_t . u k_t.
g is not bounded: P_t / P_{j+1} as two factors overflows within 16 tokens. So A is made by halves: of a block of 2 h
tokens, all t of the later half see all j of the earlier one across the bound m between them,
  A_tj = r_t f_t . k_j f_j,  f_t = exp(sum_{m <= i < t} g_i),  f_j = exp(sum_{j < i < m} g_i),
a product of matrices with no factor above 1. h = 8, 4, 2 and 1 have every pair once. Each exponent is a sum of just the g
that it is of (`spans`), not a difference of longer sums, so g of -10,000 beside one of -0.001 costs no digit. The gradient
of g goes back by the same sums: of a decay that is next to nothing it is as exact as of any other.
"""

import functools

import jax
import jax.numpy as jnp

from jaxvram.kernels import segments
from jaxvram.kernels.chunks import masks, side_by_side

CHUNK = 16
LEVELS = range(4)  # at which half a block has 1, 2, 4 and 8 tokens
FLOOR = -1e3  # exp of it is 0 in fp32, so that log decays may as well end there: -inf times 0 would be no number
SEGMENT_BUDGET = 4 * 2**20  # bytes of one fp32 array of a token and channel each, of all chunks computed side by side

product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def token_by_token(r, log_decay, k, v, u_HxN, s, resets):
    """(y_BxTxHxN in the dtype of v, the last state), in fp32 or higher. The decay has all axes, or some of size 1."""
    B, T, H, N = v.shape
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    s = jnp.zeros((B, H, N, N), dtype) if s is None else s
    resets = jnp.zeros((B, T), bool) if resets is None else resets

    def step(s_BxHxNxN, of_token):
        *of_token, reset_B = of_token
        r, g, k, v = (x.astype(dtype)[:, :, None, :] for x in of_token)  # rows
        s_BxHxNxN = jnp.where(reset_B[:, None, None, None], 0, s_BxHxNxN)
        own = (r * u_HxN[:, None, :] * k).sum(-1)
        y_BxHxN = (s_BxHxNxN * r).sum(-1) + own * v[:, :, 0]
        return s_BxHxNxN * jnp.exp(g) + v.swapaxes(2, 3) * k, y_BxHxN

    arrays = (r, jnp.broadcast_to(log_decay, v.shape), k, v, resets)
    s, y = jax.lax.scan(step, s, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), s


def middle_of(t, level):
    """The first token of the later half of t's block of 2 << level tokens."""
    return (2 * (t >> (level + 1)) + 1) << level


def spans(t, i, level):
    """Whether the log decay of token i lies between token t and the middle of its block."""
    middle = middle_of(t, level)
    return ((middle <= i) & (i < t)) | ((t < i) & (i < middle))


def across(t, j, level):
    """Whether t is in the later half of a block of 2 << level tokens, and j in the earlier one."""
    return ((t >> level) == (j >> level) + 1) & ((t >> level) % 2 == 1)


def _segment(r, g, k, v, u_HxN, s_BxHxNxN, resets_BxT):
    """(y_BxTxHxN in the dtype of v, the last state)."""
    (B, T, H, N), dtype = v.shape, v.dtype
    n = -(-T // CHUNK)
    r, g, k, v = (side_by_side(x, n, CHUNK) for x in (r, g, k, v))
    same, from_start, to_end = masks(resets_BxT, n, CHUNK)
    t, i = jnp.arange(CHUNK)[:, None], jnp.arange(CHUNK)[None, :]
    decay = lambda mask: jnp.exp(product("ti,...in->...tn", mask.astype(jnp.float32), g))
    pairs = lambda x, y, mask: jnp.where(mask, product("...in,...jn->...ij", x, y), 0)
    A = pairs(r * u_HxN[:, None, None, :], k, t == i)
    for level in LEVELS:
        f = decay(spans(t, i, level))
        A += pairs(r * f, k * f, across(t, i, level) & same)
    added = product("...jv,...jn->...vn", v, k * decay(i > t) * to_end)
    through = jnp.exp(g.sum(3, keepdims=True)) * from_start[..., -1:, :]

    def step(s, of_chunk):
        through, added = of_chunk
        return s * through + added, s

    s, before = jax.lax.scan(step, s_BxHxNxN, (jnp.moveaxis(through, 2, 0), jnp.moveaxis(added, 2, 0)), unroll=min(n, 4))
    R = r * decay(i < t) * from_start
    y = product("...in,...vn->...iv", R, jnp.moveaxis(before, 0, 2)) + product("...ij,...jv->...iv", A, v)
    return y.transpose(0, 2, 3, 1, 4).reshape(B, n * CHUNK, H, N)[:, :T].astype(dtype), s


def _of_segment(arrays, weights, s):
    (r, g, k, v, resets), (decay_HxN, u) = arrays, weights
    g = jnp.maximum(g if decay_HxN is None else g * decay_HxN, FLOOR)
    return (token_by_token if v.shape[1] < CHUNK else _segment)(r, g, k, v, u, s, resets)


def _cut(r, log_decay, k, v, u_HxN, resets):
    """(what has tokens, what has none, tokens of a segment, number of segments).

    A constant decay is one times it at each token, and zero times behind the last one.
    """
    B, T, H, N = v.shape
    constant = log_decay.ndim == 2
    g = jnp.ones((1, T, 1, 1), jnp.float32) if constant else log_decay
    chunks = -(-T // CHUNK)
    count = -(-chunks // max(1, SEGMENT_BUDGET // (4 * B * H * N * CHUNK)))
    return (r, g, k, v, resets), (log_decay if constant else None, u_HxN), CHUNK * -(-chunks // count), count


def forward(r, log_decay, k, v, u_HxN, s_BxHxNxN, resets_BxT):
    """(y_BxTxHxN in the dtype of v, the last state in fp32)."""
    arrays, weights, L, count = _cut(r, log_decay, k, v, u_HxN, resets_BxT)

    def step(s, arrays, _):
        y, s = _of_segment(arrays, weights, s)
        return s, y

    s, y_BxTxHxN = segments.walk(step, s_BxHxNxN, arrays, L, count)
    return y_BxTxHxN, s


def backward(r, log_decay, k, v, u_HxN, s_BxHxNxN, resets_BxT, dy_BxTxHxN, ds_BxHxNxN):
    """The gradients of the first six, by JAX of each segment; a state a segment is kept, made by a first walk."""
    arrays, weights, L, count = _cut(r, log_decay, k, v, u_HxN, resets_BxT)
    before = s_BxHxNxN[None]
    if count > 1:
        states = lambda s, arrays, _: (_of_segment(arrays, weights, s)[1], s[:, None])
        before = jnp.moveaxis(segments.walk(states, s_BxHxNxN, arrays, L, count)[1], 1, 0)

    def step(carry, both, s):
        ((*four, resets), dy), (ds, sums) = both, carry
        _, pull = jax.vjp(lambda four, weights, s: _of_segment((*four, resets), weights, s), tuple(four), weights, s)
        gradients, of_weights, ds = pull((dy, ds))
        return (ds, jax.tree.map(jnp.add, sums, of_weights)), gradients

    carry = (ds_BxHxNxN, jax.tree.map(jnp.zeros_like, weights))
    (ds, (ddecay, du)), (dr, dg, dk, dv) = segments.walk(step, carry, (arrays, dy_BxTxHxN), L, count, before, reverse=True)
    return dr, dg if ddecay is None else ddecay, dk, dv, du, ds
