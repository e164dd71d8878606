"""RWKV-7's recurrence without kernels, by chunks of C = 16 tokens, and the algebra that both forms follow.

With P_t the product of the decays of a chunk up to and with token t, P'_t up to t - 1, alpha = -kappa, beta = a kappa,
  A_tj = alpha_t P'_t . beta_j / P_j and B_tj = alpha_t P'_t . k_j / P_j for j < t,
  E_tj =     r_t P_t  . beta_j / P_j and F_tj =     r_t P_t  . k_j / P_j for j <= t,
what is taken out at t is u_t = S_{t-1} alpha_t = S_0 (alpha_t P'_t) + sum_j A_tj u_j + B_tj v_j. So, with rows for tokens,
  U = (I - A)^-1 (alpha P' S_0^T + B V),   Y = r P S_0^T + E U + F V,
  S_C = S_0 P_C + U^T (beta P_C / P) + V^T (k P_C / P).
A is strictly lower triangular. Where a key repeats with a = 1 and no decay, it is -1 everywhere below the diagonal: the
powers of 16 such tokens reach 6,435, those of 64 1e18, while the inverse is all 0 and +-1. So blocks of 8 are inverted by
powers, which reach 35, and put together (`inverse`).
Here U is put into the other two, so that chunk by chunk only S' = S M + N and Y = R S^T + Q are left.
"""

import functools

import jax
import jax.numpy as jnp

from jaxvram.kernels import segments
from jaxvram.kernels.chunks import masks, side_by_side

CHUNK = 16
BLOCK = 8  # tokens whose triangle is inverted by powers
SEGMENT_BUDGET = 4 * 2**20  # bytes of one fp32 array of a token and channel each, of all chunks computed side by side

product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def token_by_token(r, log_decay, k, v, kappa, a, s, resets):
    """(y_BxTxHxN in the dtype of v, the last state), in fp32 or higher."""
    B, T, H, N = v.shape
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    s = jnp.zeros((B, H, N, N), dtype) if s is None else s
    resets = jnp.zeros((B, T), bool) if resets is None else resets

    def step(s_BxHxNxN, of_token):
        *of_token, reset_B = of_token
        r, g, k, v, kappa, a = (x.astype(dtype)[:, :, None, :] for x in of_token)  # rows
        s_BxHxNxN = jnp.where(reset_B[:, None, None, None], 0, s_BxHxNxN)
        found = (s_BxHxNxN * kappa).sum(-1, keepdims=True)
        s_BxHxNxN = s_BxHxNxN * jnp.exp(g) - found * (a * kappa) + v.swapaxes(2, 3) * k
        return s_BxHxNxN, (s_BxHxNxN * r).sum(-1)

    arrays = (r, log_decay, k, v, kappa, a, resets)
    s, y = jax.lax.scan(step, s, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), s


def inverse(A, dot):
    """(I - A)^-1 of 16 x 16 triangles, strictly lower; `dot` multiplies two of them."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, A.shape, A.ndim - 2 + axis) for axis in (0, 1))
    diagonal = (row == column).astype(A.dtype)
    within = jnp.where(row // BLOCK == column // BLOCK, A, 0)
    across = A - within
    squared = dot(within, within)
    inner = dot(diagonal + within, diagonal + squared)
    inner = inner + dot(inner, dot(squared, squared))
    return inner + dot(inner, dot(across, inner))


def _segment(r, g, k, v, kappa, a, s_BxHxNxN, resets_BxT):
    """(y_BxTxHxN in the dtype of v, the last state)."""
    (B, T, H, N), dtype = v.shape, v.dtype
    n = -(-T // CHUNK)
    r, g, k, v, kappa, a = (side_by_side(x, n, CHUNK) for x in (r, g, k, v, kappa, a))
    same, from_start, to_end = masks(resets_BxT, n, CHUNK)
    sums = g.cumsum(3)
    last, shrink = sums[..., -1:, :], jnp.exp(-sums)
    alpha, rho, beta = -kappa * jnp.exp(sums - g), r * jnp.exp(sums), kappa * a
    seen, before = jnp.tri(CHUNK, dtype=bool) & same, jnp.tri(CHUNK, k=-1, dtype=bool) & same
    pairs = lambda x, y, mask: jnp.where(mask, product("...in,...jn->...ij", x, y), 0)
    rows = functools.partial(product, "...ij,...jn->...in")
    A, of_v = (pairs(alpha, x * shrink, before) for x in (beta, k))
    E, F = (pairs(rho, x * shrink, seen) for x in (beta, k))
    T_inverse = inverse(A, rows)
    W, Z = rows(T_inverse, alpha * from_start), rows(T_inverse, rows(of_v, v))
    R, Q = rho * from_start + rows(E, W), rows(E, Z) + rows(F, v)
    beta, k = (x * jnp.exp(last - sums) * to_end for x in (beta, k))
    through = jnp.exp(last) * from_start[..., -1:, :]
    M = product("...jm,...jn->...mn", W, beta) + jnp.eye(N) * through
    added = product("...jm,...jn->...mn", Z, beta) + product("...jm,...jn->...mn", v, k)

    def step(s, of_chunk):
        M, added = of_chunk
        return product("bhvm,bhmn->bhvn", s, M) + added, s

    s, before = jax.lax.scan(step, s_BxHxNxN, (jnp.moveaxis(M, 2, 0), jnp.moveaxis(added, 2, 0)), unroll=min(n, 4))
    y = product("...in,...vn->...iv", R, jnp.moveaxis(before, 0, 2)) + Q
    return y.transpose(0, 2, 3, 1, 4).reshape(B, n * CHUNK, H, N)[:, :T].astype(dtype), s


def _of_segment(arrays, s):
    *six, resets = arrays
    T = six[0].shape[1]
    return token_by_token(*six, s, resets) if T < CHUNK else _segment(*six, s, resets)


def _lengths(v_BxTxHxN) -> tuple[int, int]:
    """(tokens of a segment, number of segments)."""
    B, T, H, N = v_BxTxHxN.shape
    chunks, count = segments.equal_segments(-(-T // CHUNK), SEGMENT_BUDGET // (4 * B * H * N * CHUNK))
    return CHUNK * chunks, count


def forward(r, log_decay, k, v, kappa, a, s_BxHxNxN, resets_BxT):
    """(y_BxTxHxN in the dtype of v, the last state in fp32)."""

    def step(s, arrays, _):
        y, s = _of_segment(arrays, s)
        return s, y

    s, y_BxTxHxN = segments.walk(step, s_BxHxNxN, (r, log_decay, k, v, kappa, a, resets_BxT), *_lengths(v))
    return y_BxTxHxN, s


def backward(r, log_decay, k, v, kappa, a, s_BxHxNxN, resets_BxT, dy_BxTxHxN, ds_BxHxNxN):
    """The gradients of the first seven, by JAX of each segment; a state a segment is kept, made by a first walk."""
    L, count = _lengths(v)
    arrays = (r, log_decay, k, v, kappa, a, resets_BxT)
    before = s_BxHxNxN[None]
    if count > 1:
        states = lambda s, arrays, _: (_of_segment(arrays, s)[1], s[:, None])
        before = jnp.moveaxis(segments.walk(states, s_BxHxNxN, arrays, L, count)[1], 1, 0)

    def step(ds, both, s):
        (*six, resets), dy = both
        _, pull = jax.vjp(lambda s, *six: _of_segment((*six, resets), s), s, *six)
        ds, *gradients = pull((dy, ds))
        return ds, gradients

    ds, gradients = segments.walk(step, ds_BxHxNxN, (arrays, dy_BxTxHxN), L, count, before, reverse=True)
    return (*gradients, ds)
