"""RWKV-5's and RWKV-6's recurrence: y_t = S_{t-1} r_t + (r_t . u k_t) v_t, S_t = S_{t-1} diag(d_t) + v_t^T k_t.

S is values x keys; d = exp(log decay) is a key's own, for each token another in RWKV-6, for all the same in RWKV-5; u, the
bonus, is what a token's own key counts for (Peng et al. 2024, arXiv:2404.05892). Both forms go by chunks of 16 tokens, and
within a chunk by halves (`wkv6_xla.py` has the algebra): a decay may be as strong as it likes, since no factor is above 1,
and neither an exponent nor its gradient is a difference of sums. On NVIDIA GPUs Pallas kernels (wkv6_pallas.py) do so on
tensor cores with the state in registers.

Bytes: kept for the backward pass are the inputs alone, 10 a token and channel in bf16 (r, k, v 2 each, the decay 4), and 6
where the decay is constant. While they run, the forward pass of the kernels has what the tokens of a chunk read of each
other, with heads of 64 half a byte a token and channel, and the backward pass the state before each chunk and the gradient
of that behind it, in bf16 with heads of 64 8 bytes each: 16, 101 MB at 8 x 1024 with D = 768. That of XLA has a state a
segment, and what a segment needs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import backend, wkv6_pallas, wkv6_xla

FEW = 16  # tokens below which 'auto' is XLA, which takes them one by one


def wkv6_reference(r_BxTxHxN, log_decay, k_BxTxHxN, v_BxTxHxN, u_HxN, *, s_BxHxNxN=None, resets_BxT=None):
    """The definition, token by token; arguments and results as `wkv6` has them. Inside in fp32, or fp64 if given."""
    return wkv6_xla.token_by_token(r_BxTxHxN, log_decay, k_BxTxHxN, v_BxTxHxN, u_HxN, s_BxHxNxN, resets_BxT)


def wkv6(
    r_BxTxHxN, log_decay, k_BxTxHxN, v_BxTxHxN, u_HxN, *, s_BxHxNxN=None, resets_BxT=None, implementation="auto"
):  # fmt: skip
    """What each token reads, and the state after the last one.

    Args:
      r_BxTxHxN, k_BxTxHxN, v_BxTxHxN: what reads, keys and values. Products are made in their dtype, sums and the state in
        fp32. Nothing is scaled by 1 / sqrt(N).
      log_decay: (B, T, H, N), or (H, N) where it is the same for all tokens; 0 and anything below, -inf too, fp32.
      u_HxN: the bonus of a token's own key, fp32.
      s_BxHxNxN: the state before the first token (values x keys), fp32; None: zeros.
      resets_BxT: bool; where true a document begins: the state before counts as zero. Not differentiated.
      implementation: 'auto': kernels where the program is lowered for CUDA and they take the call (bf16, heads of 16, 32 or
        64), else XLA; 'pallas', 'xla' or 'interpret' (the kernels, slowly, anywhere, in fp32 too): that one.
    Returns:
      (y_BxTxHxN in the dtype of v, s_BxHxNxN in fp32). Both have gradients by all arguments but resets_BxT.
    Raises:
      ValueError: shapes that do not belong together, or a named implementation that does not take the call.
    """
    r, k, v = map(jnp.asarray, (r_BxTxHxN, k_BxTxHxN, v_BxTxHxN))
    g, u = jnp.asarray(log_decay, jnp.float32), jnp.asarray(u_HxN, jnp.float32)
    s = None if s_BxHxNxN is None else jnp.asarray(s_BxHxNxN, jnp.float32)
    _check(r, g, k, v, u, s, resets_BxT)
    if implementation == "auto" and (r.shape[1] < FEW or r.dtype == jnp.float32):
        implementation = "xla"
    choice = backend.choose("wkv6", implementation, _obstacle(implementation, r, k, v))
    return _wkv6(choice, (r, g, k, v, u), s, None if resets_BxT is None else jnp.asarray(resets_BxT, bool))


def _check(r, g, k, v, u, s, resets) -> None:
    shape = r.shape
    if len(shape) != 4 or k.shape != shape or v.shape != shape:
        raise ValueError(f"wkv6: r {r.shape}, k {k.shape}, v {v.shape} must be three times one (B, T, H, N)")
    B, T, H, N = shape
    if g.shape not in (shape, (H, N)):
        raise ValueError(f"wkv6: log_decay is {g.shape} and must be {shape}, or {(H, N)} for one of all tokens")
    for name, array, wanted in (("u_HxN", u, (H, N)), ("s_BxHxNxN", s, (B, H, N, N)), ("resets_BxT", resets, (B, T))):
        if array is not None and jnp.shape(array) != wanted:
            raise ValueError(f"wkv6: {name} is {jnp.shape(array)} and must be {wanted}")


def _obstacle(implementation: str, *arrays) -> str | None:
    """Why the kernels don't take a call. In fp32 they would be slow and spill; interpreted, they show that they're right."""
    N, dtypes = arrays[0].shape[-1], {x.dtype for x in arrays}
    if N not in wkv6_pallas.HEADS:
        return f"a head of {N} is none of {', '.join(map(str, wkv6_pallas.HEADS))}"
    if dtypes != {jnp.dtype(jnp.bfloat16)} and (implementation != "interpret" or dtypes != {jnp.dtype(jnp.float32)}):
        return f"r, k, v: dtypes {', '.join(str(x.dtype) for x in arrays)} are not all bfloat16"
    return None


def _settled(v_BxTxHxN, s):
    """The state in full. Made here, and not before: a state of zeros need not be kept."""
    B, _, H, N = v_BxTxHxN.shape
    return jnp.zeros((B, H, N, N), jnp.float32) if s is None else s


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv6(implementation: str, arrays, s, resets):
    return _forward(implementation, arrays, s, resets)[0]


def _forward(implementation, arrays, s, resets):
    full = (*arrays, _settled(arrays[3], s), resets)
    return backend.dispatch(implementation, wkv6_pallas.forward, wkv6_xla.forward, *full), (arrays, s, resets)


def _backward(implementation, residuals, cotangents):
    arrays, s, resets = residuals
    full = (*arrays, _settled(arrays[3], s), resets, *cotangents)
    *gradients, ds = backend.dispatch(implementation, wkv6_pallas.backward, wkv6_xla.backward, *full)
    no_gradient = None if resets is None else np.zeros(resets.shape, jax.dtypes.float0)
    return tuple(gradients), None if s is None else ds, no_gradient


_wkv6.defvjp(_forward, _backward)
