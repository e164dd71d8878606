"""RWKV-4's recurrence (Peng et al. 2023, arXiv:2305.13048, eq. 16): each channel is an average over the past of its own.

    y_t = (sum_{i<t} e^((t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (the same without v)

w < 0 is the channel's log decay, u what the token at hand counts more; both are weights, not data. The two sums are kept as
a e^p and b e^p, p near the largest exponent in them, so that no exponential overflows (`wkv4_xla.py` has the algebra).
Every number belongs to one channel: there are no products of matrices, only T steps one after the other.

Bytes: kept for the backward pass are the inputs alone, k and v, 4 a token and channel in bf16, and the last state, 12 a
channel; flash-linear-attention's kernel keeps the states of all tokens, 12 a token and channel. While it runs, the backward
pass of the kernels has a state every 8 tokens, 1.5 bytes a token and channel. That of XLA has a state a segment
(of at least 64 tokens), and of one segment the states of all tokens and what they need.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import backend, wkv4_pallas, wkv4_xla
from jaxvram.kernels.wkv4_xla import EMPTY

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
FEW = 16  # tokens below which 'auto' is XLA


def empty_state(B: int, D: int):
    """s_Bx3xD before the first token."""
    return jnp.stack([jnp.zeros((B, D)), jnp.zeros((B, D)), jnp.full((B, D), EMPTY)], axis=1)


def wkv4_reference(log_decay_D, u_D, k_BxTxD, v_BxTxD, *, s_Bx3xD=None, resets_BxT=None):
    """The definition, token by token, as the authors compute it; arguments and results as `wkv4` has them.

    Inside in fp32, or fp64 if given. Differentiated by JAX.
    """
    B, T, D = k_BxTxD.shape
    dtype = jnp.promote_types(k_BxTxD.dtype, jnp.float32)
    s_Bx3xD = empty_state(B, D).astype(dtype) if s_Bx3xD is None else s_Bx3xD
    resets_BxT = jnp.zeros((B, T), bool) if resets_BxT is None else resets_BxT
    empty_Bx3xD = empty_state(B, D).astype(dtype)

    def step(s_Bx3xD, of_token):
        k, v, reset_B = of_token
        a, b, p = jnp.moveaxis(jnp.where(reset_B[:, None, None], empty_Bx3xD, s_Bx3xD), 1, 0)
        q = jnp.maximum(p, u_D + k)
        past, now = jnp.exp(p - q), jnp.exp(u_D + k - q)
        y = (past * a + now * v) / (past * b + now)
        q = jnp.maximum(p + log_decay_D, k)
        past, now = jnp.exp(p + log_decay_D - q), jnp.exp(k - q)
        return jnp.stack([past * a + now * v, past * b + now, q], axis=1), y

    by_time = [jnp.moveaxis(x, 1, 0) for x in (k_BxTxD.astype(dtype), v_BxTxD.astype(dtype), resets_BxT)]
    s_Bx3xD, y_TxBxD = jax.lax.scan(step, s_Bx3xD, tuple(by_time))
    return jnp.moveaxis(y_TxBxD, 0, 1).astype(v_BxTxD.dtype), s_Bx3xD


def wkv4(log_decay_D, u_D, k_BxTxD, v_BxTxD, *, s_Bx3xD=None, resets_BxT=None, implementation="auto"):
    """What each token reads, and the state after the last one.

    Args:
      log_decay_D: w above, at most 0, fp32; RWKV-4 has -exp(time_decay). -inf forgets all but the token at hand.
      u_D: "time_first", fp32.
      k_BxTxD, v_BxTxD: keys, of which the exponentials are weights, and values; all is computed in fp32.
      s_Bx3xD: the state before the first token, (a, b, p) a channel in fp32, standing for sums a e^p and b e^p; None:
        `empty_state`. b must not be negative.
      resets_BxT: bool; where true a document begins: the state before counts as empty. Not differentiated.
      implementation: 'auto': kernels where the program is lowered for CUDA and there are FEW tokens or more, else XLA;
        'pallas', 'xla' or 'interpret'.
    Returns:
      (y_BxTxD in the dtype of v, s_Bx3xD in fp32). Both have gradients by all arguments but resets_BxT. A sequence cut
      anywhere, with the state passed on, gives the same.
    Raises:
      ValueError: shapes that do not belong together, or a named implementation that does not take the call.
    """
    k, v = jnp.asarray(k_BxTxD), jnp.asarray(v_BxTxD)
    fp32 = lambda x: None if x is None else jnp.asarray(x, jnp.float32)
    w, u, s = fp32(log_decay_D), fp32(u_D), fp32(s_Bx3xD)
    _check(w, u, k, v, s, resets_BxT)
    if implementation == "auto" and k.shape[1] < FEW:
        implementation = "xla"
    choice = backend.choose("wkv4", implementation, _obstacle(k, v))
    return _wkv4(choice, (w, u, k, v), s, None if resets_BxT is None else jnp.asarray(resets_BxT, bool))


def _check(w, u, k, v, s, resets) -> None:
    if k.ndim != 3 or k.shape != v.shape:
        raise ValueError(f"wkv4: k_BxTxD {k.shape} and v_BxTxD {v.shape} must be twice one (B, T, D)")
    B, T, D = k.shape
    wanted = {"log_decay_D": (w, (D,)), "u_D": (u, (D,)), "s_Bx3xD": (s, (B, 3, D)), "resets_BxT": (resets, (B, T))}
    for name, (array, shape) in wanted.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"wkv4: {name} is {jnp.shape(array)} and must be {shape}")


def _obstacle(k, v) -> str | None:
    for name, array in {"k": k, "v": v}.items():
        if array.dtype not in KERNEL_DTYPES:
            return f"{name}: dtype {array.dtype} is not one of bfloat16, float16, float32"
    return None


def _settled(k_BxTxD, s):
    """The state in full. Made here, and not before: an empty one need not be kept."""
    return empty_state(k_BxTxD.shape[0], k_BxTxD.shape[2]) if s is None else s


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv4(implementation: str, arrays, s, resets):
    return _forward(implementation, arrays, s, resets)[0]


def _forward(implementation, arrays, s, resets):
    full = (*arrays, _settled(arrays[2], s), resets)
    y, last = backend.dispatch(implementation, wkv4_pallas.forward, wkv4_xla.forward, *full)
    return (y, last), (arrays, s, resets, last)


def _backward(implementation, residuals, cotangents):
    arrays, s, resets, last = residuals
    full = (*arrays, _settled(arrays[2], s), resets, last, *cotangents)
    *gradients, ds = backend.dispatch(implementation, wkv4_pallas.backward, wkv4_xla.backward, *full)
    no_gradient = None if resets is None else np.zeros(resets.shape, jax.dtypes.float0)
    return tuple(gradients), None if s is None else ds, no_gradient


_wkv4.defvjp(_forward, _backward)
