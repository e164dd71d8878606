"""The recurrence with one decay a head and token: h_t = e^{g_t} h_{t-1} + w_t v_t k_t^T, o_t = h_t q_t.

With q = C, k = B, v = x, g = delta A, w = delta it is Mamba-2's state space dual (Dao and Gu 2024, arXiv:2405.21060); with a
fixed g RetNet's retention (Sun et al. 2023, arXiv:2307.08621); with w = 1 gated linear attention with a scalar gate (Yang et
al. 2023, arXiv:2312.06635). All forms go by chunks of tokens: within one a masked product like attention's, between chunks
the state. On NVIDIA GPUs Pallas kernels (scalar_decay_pallas.py) do so on tensor cores, elsewhere XLA (scalar_decay_xla.py).

Bytes: kept for the backward pass are the inputs alone and nothing per chunk: a token and channel of a bf16 v takes 2, q and
k 2 N / (P R) each (R heads share them), g and w 4 / P each, nothing where g is constant and w is 1. The forward kernel
writes o and the last state. While it runs, the backward pass of the kernels has the states before all chunks of a segment
and their gradients in memory, 2 sizeof(v) N / C bytes a token and channel for chunks of C tokens (64; 32 in fp32), up to
256 MiB: 201 MB at 8 x 2048 with 24 heads of 64 and N = 128. Beyond, segments follow one another, and one fp32 state a
segment is kept. The backward pass of XLA has a state every 32 MiB of scores.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import backend, scalar_decay_pallas, scalar_decay_xla

LARGEST_KEY = 256
FEW = 16  # tokens up to which 'auto' is XLA: a kernel's tile of a chunk would be all padding


def scalar_decay_reference(
    q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH=None, *, h_BxHxPxN=None, resets_BxT=None
):  # fmt: skip
    """The definition, token by token; arguments and results as `scalar_decay` has them. Inside in fp32, or fp64 if given."""
    (B, T, H, P), (G, N) = v_BxTxHxP.shape, q_BxTxGxN.shape[2:]
    dtype = jnp.promote_types(v_BxTxHxP.dtype, jnp.float32)
    weight_BxTxH = jnp.ones((B, T, H), dtype) if weight_BxTxH is None else weight_BxTxH
    if jnp.ndim(log_decay_BxTxH) == 1:
        log_decay_BxTxH = jnp.broadcast_to(jax.lax.stop_gradient(log_decay_BxTxH), (B, T, H))
    resets_BxT = jnp.zeros((B, T), bool) if resets_BxT is None else resets_BxT

    def step(h_BxHxPxN, of_token):
        q_BxGxN, k_BxGxN, v_BxHxP, g_BxH, w_BxH, reset_B = of_token
        q_BxHx1xN, k_BxHx1xN = (jnp.repeat(x, H // G, axis=1)[:, :, None].astype(dtype) for x in (q_BxGxN, k_BxGxN))
        h_BxHxPxN = jnp.where(reset_B[:, None, None, None], 0, h_BxHxPxN)
        h_BxHxPxN = jnp.exp(g_BxH)[..., None, None] * h_BxHxPxN + (w_BxH[..., None] * v_BxHxP)[..., None] * k_BxHx1xN
        return h_BxHxPxN, (h_BxHxPxN * q_BxHx1xN).sum(-1)

    arrays = (q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH, resets_BxT)
    h_BxHxPxN = jnp.zeros((B, H, P, N), dtype) if h_BxHxPxN is None else h_BxHxPxN
    h_BxHxPxN, o = jax.lax.scan(step, h_BxHxPxN, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays))
    return jnp.moveaxis(o, 0, 1).astype(v_BxTxHxP.dtype), h_BxHxPxN


def scalar_decay(
    q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH, weight_BxTxH=None, *, h_BxHxPxN=None, resets_BxT=None,
    implementation="auto",
):  # fmt: skip
    """Outputs of H heads of P values, and the state after the last token.

    Args:
      q_BxTxGxN, k_BxTxGxN: queries and keys; head h reads group h G // H.
      v_BxTxHxP: values. Products are made in the dtype of q, k and v, sums and the state are fp32.
      log_decay_BxTxH: g <= 0, fp32; may be as low as one likes. A positive one would be a growth, and is not looked for.
        One of shape (H,) is the same at every token and a constant: not differentiated, which spares a third of the
        backward pass.
      weight_BxTxH: fp32; None: all are 1.
      h_BxHxPxN: the state before the first token, fp32; None: zeros.
      resets_BxT: bool; where true a document begins: the state before counts as zero. Not differentiated.
      implementation: 'auto': kernels where the program is lowered for CUDA and they take the call, else XLA; 'pallas',
        'xla' or 'interpret' (the kernels, slowly, anywhere): that one.
    Returns:
      (o_BxTxHxP in the dtype of v, h_BxHxPxN in fp32). Both have gradients by all arguments but
      resets_BxT and a constant decay.
    Raises:
      ValueError: shapes that do not belong together, or a named implementation that does not take the call.
    """
    q, k, v, g = map(jnp.asarray, (q_BxTxGxN, k_BxTxGxN, v_BxTxHxP, log_decay_BxTxH))
    as_fp32 = lambda x: None if x is None else jnp.asarray(x, jnp.float32)
    w, h = as_fp32(weight_BxTxH), as_fp32(h_BxHxPxN)
    _check(q, k, v, g, w, h, resets_BxT)
    choice = backend.choose("scalar_decay", implementation, _obstacle(q, k, v))
    if choice == "auto" and q.shape[1] < FEW:
        choice = "xla"
    resets = None if resets_BxT is None else jnp.asarray(resets_BxT, bool)
    return _scalar_decay(choice, q, k, v, g.astype(jnp.float32), w, h, resets)


def _check(q, k, v, g, w, h, resets) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(f"scalar_decay: q {q.shape}, k {k.shape} and v {v.shape} do not belong together")
    (B, T, H, P), N = v.shape, q.shape[3]
    for name, array, shape in (
        ("log_decay_BxTxH", g, (H,) if g.ndim == 1 else (B, T, H)),
        ("weight_BxTxH", w, (B, T, H)),
        ("h_BxHxPxN", h, (B, H, P, N)),
        ("resets_BxT", resets, (B, T)),
    ):
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"scalar_decay: {name} is {jnp.shape(array)} and must be {shape}")


def _obstacle(q, k, v) -> str | None:
    """Why the kernels don't take a call."""
    if q.shape[-1] > LARGEST_KEY:
        return f"q: a key of {q.shape[-1]} exceeds {LARGEST_KEY}"
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype} are not one of bfloat16, float32"
    return None


def settled(v_BxTxHxP, N: int, log_decay, weight_BxTxH=None, h_BxHxPxN=None):
    """Decay, weight and state in full. Made here, and not before: constants need not be kept."""
    B, T, H, P = v_BxTxHxP.shape
    weight_BxTxH = jnp.ones((B, T, H), jnp.float32) if weight_BxTxH is None else weight_BxTxH
    h_BxHxPxN = jnp.zeros((B, H, P, N), jnp.float32) if h_BxHxPxN is None else h_BxHxPxN
    return jnp.broadcast_to(log_decay, (B, T, H)), weight_BxTxH, h_BxHxPxN


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scalar_decay(implementation: str, q, k, v, g, w, h, resets):
    return _forward(implementation, q, k, v, g, w, h, resets)[0]


def _forward(implementation, q, k, v, g, w, h, resets):
    results = backend.dispatch(
        implementation, scalar_decay_pallas.forward, scalar_decay_xla.forward,
        q, k, v, *settled(v, q.shape[-1], g, w, h), resets,
    )  # fmt: skip
    return results, (q, k, v, g, w, h, resets)


def _backward(implementation, residuals, cotangents):
    q, k, v, g, w, h, resets = residuals
    fixed = g.ndim == 1
    rows = not fixed or w is not None  # numbers a token that have a gradient
    backward = (functools.partial(f.backward, rows=rows) for f in (scalar_decay_pallas, scalar_decay_xla))
    dq, dk, dv, drows, dh = backend.dispatch(
        implementation, *backward, q, k, v, *settled(v, q.shape[-1], g, w, h), resets, *cotangents
    )
    dg, dw = drows if rows else (None, None)
    dg = jnp.zeros_like(g) if fixed else dg
    no_gradient = None if resets is None else np.zeros(resets.shape, jax.dtypes.float0)
    return dq, dk, dv, dg, None if w is None else dw, None if h is None else dh, no_gradient


_scalar_decay.defvjp(_forward, _backward)
