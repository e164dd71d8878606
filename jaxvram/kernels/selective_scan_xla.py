"""The selective scan without kernels: a plain scan over time, in chunks whose states are made again for the gradients.

The state lies as (B, N, E): the sum over N then adds rows, which a CPU does for many channels at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64  # steps from one saved state to the next


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
    decay_BxNxE = jnp.exp(delta_BxE[:, None] * A_NxE)
    return decay_BxNxE if keep_B is None else decay_BxNxE * keep_B[:, None, None]


def _move(A_NxE, h_BxNxE, step: _Chunk):
    u_BxE = step.delta_LxBxE * step.x_LxBxE
    return _decay(A_NxE, step.delta_LxBxE, step.keep_LxB) * h_BxNxE + u_BxE[:, None] * step.B_LxBxN[..., None]


def _over_chunks(of_chunk, carry, T: int, per_chunk=None, *, reverse=False):
    """of_chunk(carry, start, L, x) over chunks of CHUNK steps, and once for a shorter rest.

    Returns:
      carry, and the results: of each whole chunk, stacked (None if there is none), and of the rest (None if none).
    """
    n, rest = divmod(T, CHUNK)
    part = lambda i: jax.tree.map(lambda a: a[i], per_chunk)
    whole = last = None
    if reverse and rest:
        carry, last = of_chunk(carry, n * CHUNK, rest, part(n))
    if n:
        first = jax.tree.map(lambda a: a[:n], per_chunk)
        body = lambda carry, x: of_chunk(carry, x[0] * CHUNK, CHUNK, x[1])
        carry, whole = lax.scan(body, carry, (jnp.arange(n), first), reverse=reverse)
    if not reverse and rest:
        carry, last = of_chunk(carry, n * CHUNK, rest, part(n))
    return carry, whole, last


def _by_token(whole, last):
    """(B, T, X) from (chunks, L, B, X) and (rest, B, X)."""
    flat = [] if whole is None else [whole.reshape(-1, *whole.shape[2:])]
    flat += [] if last is None else [last]
    return (flat[0] if len(flat) == 1 else jnp.concatenate(flat)).swapaxes(0, 1)


def forward(inputs: Inputs):
    """(y_BxTxE in the dtype of x, h_BxExN after the last token, the states before each chunk (B, chunks, N, E))."""
    A_NxE, T, dtype = inputs.A_ExN.T, inputs.x_BxTxE.shape[1], inputs.x_BxTxE.dtype

    def of_step(h_BxNxE, step: _Chunk):
        h_BxNxE = _move(A_NxE, h_BxNxE, step)
        return h_BxNxE, (h_BxNxE * step.C_LxBxN[..., None]).sum(1)

    def of_chunk(h_BxNxE, start, L, _):
        chunk = _chunk(inputs, start, L)
        last_BxNxE, y_LxBxE = lax.scan(of_step, h_BxNxE, chunk)
        y_LxBxE += inputs.D_E * chunk.x_LxBxE
        y_LxBxE = y_LxBxE if chunk.z_LxBxE is None else y_LxBxE * jax.nn.silu(chunk.z_LxBxE)
        return last_BxNxE, (y_LxBxE.astype(dtype), h_BxNxE)

    h_BxNxE, whole, last = _over_chunks(of_chunk, inputs.h_BxExN.swapaxes(1, 2), T)
    y_BxTxE = _by_token(*(None if found is None else found[0] for found in (whole, last)))
    states = ([] if whole is None else [whole[1]]) + ([] if last is None else [last[1][None]])
    states_BxcxNxE = (states[0] if len(states) == 1 else jnp.concatenate(states)).swapaxes(0, 1)
    return y_BxTxE, h_BxNxE.swapaxes(1, 2), states_BxcxNxE


def backward(inputs: Inputs, states_BxcxNxE, dy_BxTxE, dlast_BxExN) -> Inputs:
    """The gradients of `inputs`, those of weights in fp32; None for the resets. The maths: selective_scan_pallas.py."""
    A_NxE, T = inputs.A_ExN.T, inputs.x_BxTxE.shape[1]

    def decayed(h_BxNxE, step: _Chunk):
        decay_BxNxE = _decay(A_NxE, step.delta_LxBxE, step.keep_LxB)
        a_BxNxE = decay_BxNxE * h_BxNxE
        return a_BxNxE + (step.delta_LxBxE * step.x_LxBxE)[:, None] * step.B_LxBxN[..., None], (a_BxNxE, decay_BxNxE)

    def back(g_BxNxE, step):
        C_BxN, dy_BxE, decay_BxNxE = step
        g_BxNxE = g_BxNxE + C_BxN[..., None] * dy_BxE[:, None]
        return g_BxNxE * decay_BxNxE, g_BxNxE

    def of_chunk(carry, start, L, h_BxNxE):
        g_BxNxE, dA_NxE, dD_E, dbias_E = carry
        x, delta, slope, B, C, z, _ = chunk = _chunk(inputs, start, L)
        u, dy, dz = delta * x, _rows(dy_BxTxE, start, L), None
        # Sums over channels and states come after the walks, for all steps at once: inside, XLA would make each an own loop.
        _, (a_LxBxNxE, decay_LxBxNxE) = lax.scan(decayed, h_BxNxE, chunk)
        if z is not None:
            y = (a_LxBxNxE * C[..., None]).sum(2) + u * (B * C).sum(-1)[..., None] + inputs.D_E * x
            sigmoid = jax.nn.sigmoid(z)
            dy, dz = dy * z * sigmoid, dy * y * sigmoid * (1 + z * (1 - sigmoid))
        g_BxNxE, g_LxBxNxE = lax.scan(back, g_BxNxE, (C, dy, decay_LxBxNxE), reverse=True)
        ga_LxBxNxE = g_LxBxNxE * a_LxBxNxE
        s = (g_LxBxNxE * B[..., None]).sum(2)
        ddt = (x * s + (ga_LxBxNxE * A_NxE).sum(2)) * slope
        dB = (g_LxBxNxE * u[:, :, None]).sum(-1)
        dC = (a_LxBxNxE * dy[:, :, None]).sum(-1) + B * (u * dy).sum(-1, keepdims=True)
        dA_NxE += (ga_LxBxNxE * delta[:, :, None]).sum((0, 1))
        carry = g_BxNxE, dA_NxE, dD_E + (dy * x).sum((0, 1)), dbias_E + ddt.sum((0, 1))
        of = inputs.x_BxTxE, inputs.dt_BxTxE, inputs.B_BxTxN, inputs.C_BxTxN
        rows = tuple(d.astype(a.dtype) for d, a in zip((delta * s + inputs.D_E * dy, ddt, dB, dC), of, strict=True))
        return carry, (*rows, None if z is None else dz.astype(inputs.z_BxTxE.dtype))

    zeros_E = jnp.zeros_like(inputs.D_E)
    carry = dlast_BxExN.swapaxes(1, 2), jnp.zeros_like(A_NxE), zeros_E, zeros_E
    carry, whole, last = _over_chunks(of_chunk, carry, T, states_BxcxNxE.swapaxes(0, 1), reverse=True)
    dh_BxNxE, dA_NxE, dD_E, dbias_E = carry
    pick = lambda i: _by_token(*(None if found is None else found[i] for found in (whole, last)))
    dx, ddt, dB, dC = (pick(i) for i in range(4))
    dz = None if inputs.z_BxTxE is None else pick(4)
    return Inputs(dx, ddt, dA_NxE.T, dB, dC, dD_E, dbias_E, dh_BxNxE.swapaxes(1, 2), dz, None)
