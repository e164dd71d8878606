"""The selective scan without kernels: a plain scan over time, in pieces whose states are made again for the gradients.

The state lies as (B, N, E): the sum over N then adds rows, which a CPU does for many channels at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64  # steps from one saved state to the next
PIECE = 16  # steps that the backward pass works on at a time; other lengths have not been timed on a quiet machine


class Inputs(NamedTuple):
    """What the scan is a function of; gradients come in the same form. None: a call without it."""

    x_BxTxE: jax.Array
    dt_BxTxE: jax.Array
    A_ExN: jax.Array  # fp32, as the next three
    B_BxTxN: jax.Array
    C_BxTxN: jax.Array
    D_E: jax.Array
    dt_bias_E: jax.Array
    h_BxExN: jax.Array | None  # None in the backward pass, which has the saved states
    z_BxTxE: jax.Array | None
    resets_BxT: jax.Array | None


def discretise(v):
    """(softplus(v), its slope); v itself above 20."""
    e = jnp.exp(jnp.minimum(v, 20.0))
    return jnp.where(v > 20.0, v, jnp.log1p(e)), jnp.where(v > 20.0, 1.0, e / (1.0 + e))


class _Chunk(NamedTuple):
    """Steps [start, start + L) by time, in fp32."""

    x_LxBxE: jax.Array
    delta_LxBxE: jax.Array
    slope_LxBxE: jax.Array  # of delta by dt
    B_LxBxN: jax.Array
    C_LxBxN: jax.Array
    z_LxBxE: jax.Array | None
    keep_LxB: jax.Array | None


def _rows(array, start, L: int):
    rows = lax.dynamic_slice_in_dim(array, start, L, axis=1).swapaxes(0, 1)
    return rows if rows.dtype == bool else rows.astype(jnp.float32)


def _chunk(inputs: Inputs, start, L: int) -> _Chunk:
    x, dt, B, C = (_rows(a, start, L) for a in (inputs.x_BxTxE, inputs.dt_BxTxE, inputs.B_BxTxN, inputs.C_BxTxN))
    z = None if inputs.z_BxTxE is None else _rows(inputs.z_BxTxE, start, L)
    keep = None if inputs.resets_BxT is None else 1.0 - _rows(inputs.resets_BxT, start, L)
    return _Chunk(x, *discretise(dt + inputs.dt_bias_E), B, C, z, keep)


def _decay(A_NxE, delta_BxE, keep_B):
    """(B, N, E) of one step; or (L, B, N, E)."""
    decay_BxNxE = jnp.exp(delta_BxE[..., None, :] * A_NxE)
    return decay_BxNxE if keep_B is None else decay_BxNxE * keep_B[..., None, None]


def _onward(A_NxE, h_BxNxE, step: _Chunk):
    u_BxE = step.delta_LxBxE * step.x_LxBxE
    return _decay(A_NxE, step.delta_LxBxE, step.keep_LxB) * h_BxNxE + u_BxE[:, None] * step.B_LxBxN[..., None]


def _in_pieces(of_piece, carry, start, T: int, size: int, given=None, *, reverse=False):
    """of_piece(carry, start, L, given[i]) over pieces of `size` steps of [start, start + T), and once for a shorter rest.

    Returns:
      The last carry, and the results of all pieces, joined along their first axis.
    """
    n, rest = divmod(T, size)
    results = []
    of_rest = lambda carry: of_piece(carry, start + n * size, rest, jax.tree.map(lambda a: a[n], given))
    if reverse and rest:
        carry, last = of_rest(carry)
        results = [last]
    if n:
        starts_and_given = start + size * jnp.arange(n), jax.tree.map(lambda a: a[:n], given)
        body = lambda carry, x: of_piece(carry, x[0], size, x[1])
        carry, whole = lax.scan(body, carry, starts_and_given, reverse=reverse)
        results = [jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), whole), *results]
    if not reverse and rest:
        carry, last = of_rest(carry)
        results = [*results, last]
    return carry, results[0] if len(results) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)


def forward(inputs: Inputs):
    """(y_BxTxE in the dtype of x, h_BxExN after the last token, the states before each chunk (B, chunks, N, E))."""
    A_NxE, T, dtype = inputs.A_ExN.T, inputs.x_BxTxE.shape[1], inputs.x_BxTxE.dtype

    def of_step(h_BxNxE, step: _Chunk):
        h_BxNxE = _onward(A_NxE, h_BxNxE, step)
        return h_BxNxE, (h_BxNxE * step.C_LxBxN[..., None]).sum(1)

    def of_chunk(h_BxNxE, start, L, _):
        chunk = _chunk(inputs, start, L)
        last_BxNxE, y_LxBxE = lax.scan(of_step, h_BxNxE, chunk)
        y_LxBxE += inputs.D_E * chunk.x_LxBxE
        y_LxBxE = y_LxBxE if chunk.z_LxBxE is None else y_LxBxE * jax.nn.silu(chunk.z_LxBxE)
        return last_BxNxE, (y_LxBxE.astype(dtype), h_BxNxE[None])

    h_BxNxE, (y_TxBxE, states_cxBxNxE) = _in_pieces(of_chunk, inputs.h_BxExN.swapaxes(1, 2), 0, T, CHUNK)
    return y_TxBxE.swapaxes(0, 1), h_BxNxE.swapaxes(1, 2), states_cxBxNxE.swapaxes(0, 1)


def backward(inputs: Inputs, states_BxcxNxE, dy_BxTxE, dlast_BxExN) -> Inputs:
    """The gradients of `inputs`, those of weights in fp32; None for the resets."""
    A_NxE, T = inputs.A_ExN.T, inputs.x_BxTxE.shape[1]

    def of_chunk(carry, start, L, h_BxNxE):
        def through_piece(h_BxNxE, start, L, _):
            step = lambda h_BxNxE, step: (_onward(A_NxE, h_BxNxE, step), None)
            h_BxNxE, _ = lax.scan(step, h_BxNxE, _chunk(inputs, start, L))
            return h_BxNxE, h_BxNxE[None]

        states_pxBxNxE = h_BxNxE[None]
        if L > PIECE:
            _, after_pxBxNxE = _in_pieces(through_piece, h_BxNxE, start, (L - 1) // PIECE * PIECE, PIECE)
            states_pxBxNxE = jnp.concatenate([states_pxBxNxE, after_pxBxNxE])
        return _in_pieces(of_piece, carry, start, L, PIECE, states_pxBxNxE, reverse=True)

    of_piece = functools.partial(_back_through_piece, inputs, dy_BxTxE)
    zeros_E = jnp.zeros_like(inputs.D_E)
    carry = dlast_BxExN.swapaxes(1, 2), jnp.zeros_like(A_NxE), zeros_E, zeros_E
    carry, by_time = _in_pieces(of_chunk, carry, 0, T, CHUNK, states_BxcxNxE.swapaxes(0, 1), reverse=True)
    dh_BxNxE, dA_NxE, dD_E, dbias_E = carry
    dx, ddt, dB, dC, dz = (None if d is None else d.swapaxes(0, 1) for d in by_time)
    return Inputs(dx, ddt, dA_NxE.T, dB, dC, dD_E, dbias_E, dh_BxNxE.swapaxes(1, 2), dz, None)


def _back_through_piece(inputs: Inputs, dy_BxTxE, carry, start, L, h_BxNxE):
    """(carry, gradients by time) of steps [start, start + L), from the state before them."""
    A_NxE, (g_BxNxE, dA_NxE, dD_E, dbias_E) = inputs.A_ExN.T, carry
    x, delta, slope, B, C, z, keep = _chunk(inputs, start, L)
    u, dy, dz = delta * x, _rows(dy_BxTxE, start, L), None
    decay_LxBxNxE = _decay(A_NxE, delta, keep)

    def onward(h_BxNxE, step):
        decay_BxNxE, u_BxE, B_BxN = step
        a_BxNxE = decay_BxNxE * h_BxNxE
        return a_BxNxE + u_BxE[:, None] * B_BxN[..., None], a_BxNxE

    def back(g_BxNxE, step):
        decay_BxNxE, dy_BxE, C_BxN = step
        g_BxNxE = g_BxNxE + C_BxN[..., None] * dy_BxE[:, None]
        return g_BxNxE * decay_BxNxE, g_BxNxE

    # As products, not as sums of products: XLA:CPU makes four to six times faster loops of them.
    over_N = lambda f_LxBxNxE, w_LxBxN: jnp.einsum("lbne,lbn->lbe", f_LxBxNxE, w_LxBxN)
    over_E = lambda f_LxBxNxE, w_LxBxE: jnp.einsum("lbne,lbe->lbn", f_LxBxNxE, w_LxBxE)

    _, a_LxBxNxE = lax.scan(onward, h_BxNxE, (decay_LxBxNxE, u, B))
    if z is not None:
        y = over_N(a_LxBxNxE, C) + u * (B * C).sum(-1, keepdims=True) + inputs.D_E * x
        sigmoid = jax.nn.sigmoid(z)
        dy, dz = dy * z * sigmoid, dy * y * sigmoid * (1 + z * (1 - sigmoid))
    g_BxNxE, g_LxBxNxE = lax.scan(back, g_BxNxE, (decay_LxBxNxE, dy, C), reverse=True)
    ga_LxBxNxE = g_LxBxNxE * a_LxBxNxE
    s = over_N(g_LxBxNxE, B)
    ddt = (x * s + over_N(ga_LxBxNxE * A_NxE, jnp.ones_like(B))) * slope
    dB = over_E(g_LxBxNxE, u)
    dC = over_E(a_LxBxNxE, dy) + B * (u * dy).sum(-1, keepdims=True)
    dA_NxE += (ga_LxBxNxE * delta[:, :, None]).sum((0, 1))
    carry = g_BxNxE, dA_NxE, dD_E + (dy * x).sum((0, 1)), dbias_E + ddt.sum((0, 1))
    of = inputs.x_BxTxE, inputs.dt_BxTxE, inputs.B_BxTxN, inputs.C_BxTxN
    rows = tuple(d.astype(a.dtype) for d, a in zip((delta * s + inputs.D_E * dy, ddt, dB, dC), of, strict=True))
    return carry, (*rows, None if z is None else dz.astype(inputs.z_BxTxE.dtype))
