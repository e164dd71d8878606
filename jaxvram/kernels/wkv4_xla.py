"""RWKV-4's recurrence a token at a time, the algebra that both forms follow, and the form without kernels.

A state (a, b, p) stands for two sums A = a e^p and B = b e^p; p is near the largest exponent in them. With w the log decay,
  y  = (A + e^(u+k) v) / (B + e^(u+k)) = past a + now v,   past = e^(p-q) / z, now = e^(u+k-q) / z,   q = max(p, u + k),
  p' = max(p + w, k);   a' = f a + g v;   b' = f b + g;    f = e^((p-p') + w), g = e^(k-p').
In this order f makes up for what p + w was rounded by: with a large p and a weak decay that would be the decay itself.

Backwards, with ga and gb the gradients of a and b where p is only a scale, and those after the token primed,
  dv = now dy + g ga';   du = now dy (v - y);   dk = du + g (ga' v + gb');   dw = f (ga' a + gb' b);
  ga = past dy + f ga';  gb = -past dy y + f gb'.
All that a sum A or B does is in these. A loss may read the last p itself: beyond what A and B explain, that is gp - a ga -
b gb, it goes to the one token that this p is from, and to the decay once a token since; `Gradient.p` carries it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvram.kernels import segments

EMPTY = -1e38  # p of a state that has seen no token
SEGMENT_BUDGET = 4 * 2**20  # bytes of one fp32 array of a segment's tokens and channels
LEAST_SEGMENT = 64  # tokens, however many channels there are


class State(NamedTuple):
    """Each (..., D) in fp32."""

    a: jax.Array
    b: jax.Array
    p: jax.Array


class Gradient(NamedTuple):
    """Of a state, while p is but a scale; and what is left for p."""

    a: jax.Array
    b: jax.Array
    p: jax.Array


def read(s: State, u, k, v):
    """(y, past, now)."""
    ahead = u + k - s.p
    e = jnp.exp(-jnp.abs(ahead))
    past, now = jnp.where(ahead > 0, e, 1.0), jnp.where(ahead > 0, 1.0, e)
    scale = 1.0 / (past * s.b + now)
    past, now = past * scale, now * scale
    return past * s.a + now * v, past, now


def move(s: State, w, k):
    """(p', f, g)."""
    p = jnp.maximum(s.p + w, k)
    return p, jnp.exp((s.p - p) + w), jnp.exp(k - p)


def advance(s: State, w, k, v) -> State:
    p, f, g = move(s, w, k)
    return State(f * s.a + g * v, f * s.b + g, p)


def start_back(last: State, da, db, dp) -> Gradient:
    """From the gradients of the last state's numbers."""
    return Gradient(da, db, dp - last.a * da - last.b * db)


def back(behind: Gradient, s: State, w, u, k, v, dy):
    """(the gradient of the state `s` before a token from that behind it, (dk, dv, dw, du) of the token)."""
    y, past, now = read(s, u, k, v)
    _, f, g = move(s, w, k)
    du = now * dy * (v - y)
    is_from_k = k >= s.p + w
    dk = du + g * (behind.a * v + behind.b) + jnp.where(is_from_k, behind.p, 0.0)
    p = jnp.where(is_from_k, 0.0, behind.p)
    dw = f * (behind.a * s.a + behind.b * s.b) + p
    before = Gradient(past * dy + f * behind.a, f * behind.b - past * dy * y, p)
    return before, (dk, now * dy + g * behind.a, dw, du)


def end_back(first: State, g: Gradient):
    """The gradients of the first state's numbers."""
    return g.a, g.b, g.p + first.a * g.a + first.b * g.b


def packed(s) -> jax.Array:
    return jnp.stack(s, axis=1)


def unpacked(s_Bx3xD) -> State:
    return State(*(s_Bx3xD[:, i] for i in range(3)))


class _Tokens(NamedTuple):
    """By time; None: no document begins, and all tokens are there."""

    k_LxBxD: jax.Array
    v_LxBxD: jax.Array
    resets_LxB: jax.Array | None
    there_Lx1: jax.Array | None

    def settled(self, s: State, w_D):
        """What this one token is given: the state that counts, and how it decays."""
        if self.resets_LxB is not None:  # e^EMPTY is 0, whatever a and b are
            s = s._replace(p=jnp.where(self.resets_LxB[:, None], EMPTY, s.p))
        return s, (w_D if self.there_Lx1 is None else jnp.where(self.there_Lx1[:, None], w_D, 0.0))


def _by_time(x):
    x = jnp.moveaxis(x, 1, 0)
    return x if x.dtype == bool else x.astype(jnp.float32)


def _tokens(arrays) -> _Tokens:
    """Behind the end, where there are zeros, tokens that change nothing."""
    k, v, resets, there = jax.tree.map(_by_time, arrays)
    return _Tokens(k if there is None else jnp.where(there[..., None], k, EMPTY), v, resets, there)


def _cut(k_BxTxD, v_BxTxD, resets_BxT):
    """(arrays, tokens of a segment, number of segments)."""
    B, T, D = k_BxTxD.shape
    count = -(-T // max(LEAST_SEGMENT, SEGMENT_BUDGET // (4 * B * D)))
    L = -(-T // count)
    there_1xT = None if L * count == T else jnp.ones((1, T), bool)
    return (k_BxTxD, v_BxTxD, resets_BxT, there_1xT), L, count


def _states(w_D, arrays, s_Bx3xD):
    """(the state behind a segment, those before each of its tokens)."""

    def step(s, token):
        s, w = token.settled(s, w_D)
        return advance(s, w, token.k_LxBxD, token.v_LxBxD), s

    return jax.lax.scan(step, unpacked(s_Bx3xD), _tokens(arrays))


def forward(w_D, u_D, k_BxTxD, v_BxTxD, s_Bx3xD, resets_BxT):
    """(y_BxTxD in the dtype of v, the last state)."""
    arrays, L, count = _cut(k_BxTxD, v_BxTxD, resets_BxT)

    def step(s, token):
        s, w = token.settled(s, w_D)
        y_BxD, _, _ = read(s, u_D, token.k_LxBxD, token.v_LxBxD)
        return advance(s, w, token.k_LxBxD, token.v_LxBxD), y_BxD

    def of_segment(s_Bx3xD, arrays, _):
        s, y_LxBxD = jax.lax.scan(step, unpacked(s_Bx3xD), _tokens(arrays))
        return packed(s), jnp.moveaxis(y_LxBxD, 0, 1).astype(v_BxTxD.dtype)

    s_Bx3xD, y_BxTxD = segments.walk(of_segment, s_Bx3xD, arrays, L, count)
    return y_BxTxD, s_Bx3xD


def backward(w_D, u_D, k_BxTxD, v_BxTxD, s_Bx3xD, resets_BxT, last_Bx3xD, dy_BxTxD, ds_Bx3xD):
    """(dw_D, du_D, dk_BxTxD, dv_BxTxD, ds_Bx3xD). A first walk keeps the state before each segment."""
    arrays, L, count = _cut(k_BxTxD, v_BxTxD, resets_BxT)
    before = s_Bx3xD[None]
    if count > 1:
        through = lambda s, arrays, _: (packed(_states(w_D, arrays, s)[0]), s[:, None])
        before = jnp.moveaxis(segments.walk(through, s_Bx3xD, arrays, L, count)[1], 1, 0)

    def step(carry, of_token):
        (g, dw_BxD, du_BxD), (token, s, dy_BxD) = carry, of_token
        _, w = token.settled(s, w_D)
        g, (dk, dv, dw, du) = back(g, s, w, u_D, token.k_LxBxD, token.v_LxBxD, dy_BxD)
        dw = dw if token.there_Lx1 is None else jnp.where(token.there_Lx1[:, None], dw, 0.0)
        return (g, dw_BxD + dw, du_BxD + du), (dk, dv)

    def of_segment(carry, both, s_Bx3xD):
        arrays, dy_BxLxD = both
        by_time = _tokens(arrays), _states(w_D, arrays, s_Bx3xD)[1], _by_time(dy_BxLxD)
        carry, gradients = jax.lax.scan(step, carry, by_time, reverse=True)
        return carry, [jnp.moveaxis(d, 0, 1).astype(x.dtype) for d, x in zip(gradients, arrays[:2], strict=True)]

    zeros_BxD = jnp.zeros_like(s_Bx3xD[:, 0])
    carry = start_back(unpacked(last_Bx3xD), *unpacked(ds_Bx3xD)), zeros_BxD, zeros_BxD
    carry, gradients = segments.walk(of_segment, carry, (arrays, dy_BxTxD), L, count, before, reverse=True)
    g, dw_BxD, du_BxD = carry
    return dw_BxD.sum(0), du_BxD.sum(0), *gradients, packed(end_back(unpacked(s_Bx3xD), g))
