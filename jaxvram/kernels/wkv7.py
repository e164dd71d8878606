"""RWKV-7's recurrence, a generalised delta rule: S_t = S_{t-1} (diag(d_t) - kappa_t^T (a_t kappa_t)) + v_t^T k_t, y = S r.

S is values x keys, d = exp(log decay) a key of its own for each token, kappa a key of length 1 that is looked up, and a says
how much of what was found there is taken out again (Peng et al. 2025, arXiv:2503.14456). With kappa = k and d = 1 it is the
delta rule. Both forms go by chunks of 16 tokens (`wkv7_xla.py` has the algebra): u_t = -S_{t-1} kappa_t, what is taken out,
solves a triangular system within the chunk; all else is products of matrices. On NVIDIA GPUs Pallas kernels (wkv7_pallas.py)
do so on tensor cores with the state in registers.

Decays are raised from one end of a chunk to the other, 1 / d^16 at the most: RWKV-7's log decays lie in (-0.61, 0), where
that is 16,384; down to LOWEST nothing overflows.

Bytes: kept for the backward pass are the inputs alone, 14 a token and channel in bf16 (r, k, v, kappa, a 2 each, the decay
4), where the official kernel keeps 20 more, states and u. While it runs, the backward pass of the kernels has the state
before each chunk and the gradient of that behind it, in bf16 with heads of 64 8 bytes a token and channel each, u and its
gradient, 2 each, and a part of the decay's gradient, 4: 24 together, 151 MB at 16 x 512 with D = 768, and never more than
256 MiB: longer sequences go by segments, of which a state each is kept. That of XLA does so as well.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import backend, wkv7_pallas, wkv7_xla

LOWEST = -4.0  # log decay down to which the forms by chunks are right
FEW = 16  # tokens below which 'auto' is XLA, which takes them one by one


def wkv7_reference(
    r_BxTxHxN, log_decay_BxTxHxN, k_BxTxHxN, v_BxTxHxN, kappa_BxTxHxN, a_BxTxHxN, *, s_BxHxNxN=None, resets_BxT=None
):  # fmt: skip
    """The definition, token by token; arguments and results as `wkv7` has them. Inside in fp32, or fp64 if given."""
    arrays = (r_BxTxHxN, log_decay_BxTxHxN, k_BxTxHxN, v_BxTxHxN, kappa_BxTxHxN, a_BxTxHxN)
    return wkv7_xla.token_by_token(*arrays, s_BxHxNxN, resets_BxT)


def wkv7(
    r_BxTxHxN, log_decay_BxTxHxN, k_BxTxHxN, v_BxTxHxN, kappa_BxTxHxN, a_BxTxHxN, *, s_BxHxNxN=None, resets_BxT=None,
    implementation="auto",
):  # fmt: skip
    """What each token reads, and the state after the last one.

    Args:
      r_BxTxHxN, k_BxTxHxN, v_BxTxHxN: what reads, keys and values. Products are made in their dtype, sums and the state in
        fp32.
      log_decay_BxTxHxN: from LOWEST to 0, fp32. Outside of that the result may be anything; it is not looked for.
      kappa_BxTxHxN, a_BxTxHxN: the key that is looked up, of length 1 a head, and how much of it is replaced, 0 to 1.
      s_BxHxNxN: the state before the first token (values x keys), fp32; None: zeros.
      resets_BxT: bool; where true a document begins: the state before counts as zero. Not differentiated.
      implementation: 'auto': kernels where the program is lowered for CUDA and they take the call (bf16, heads of 16, 32 or
        64), else XLA; 'pallas', 'xla' or 'interpret' (the kernels, slowly, anywhere, in fp32 too): that one.
    Returns:
      (y_BxTxHxN in the dtype of v, s_BxHxNxN in fp32). Both have gradients by all arguments but resets_BxT.
    Raises:
      ValueError: shapes that do not belong together, or a named implementation that does not take the call.
    """
    r, k, v, kappa, a = map(jnp.asarray, (r_BxTxHxN, k_BxTxHxN, v_BxTxHxN, kappa_BxTxHxN, a_BxTxHxN))
    log_decay = jnp.asarray(log_decay_BxTxHxN, jnp.float32)
    s = None if s_BxHxNxN is None else jnp.asarray(s_BxHxNxN, jnp.float32)
    arrays = (r, log_decay, k, v, kappa, a)
    _check(arrays, s, resets_BxT)
    if implementation == "auto" and (r.shape[1] < FEW or r.dtype == jnp.float32):
        implementation = "xla"
    choice = backend.choose("wkv7", implementation, _obstacle(implementation, r, k, v, kappa, a))
    return _wkv7(choice, arrays, s, None if resets_BxT is None else jnp.asarray(resets_BxT, bool))


def _check(arrays, s, resets) -> None:
    shape = arrays[0].shape
    if len(shape) != 4 or any(x.shape != shape for x in arrays):
        raise ValueError(f"wkv7: {', '.join(str(x.shape) for x in arrays)} must be six times one (B, T, H, N)")
    B, T, H, N = shape
    for name, array, wanted in (("s_BxHxNxN", s, (B, H, N, N)), ("resets_BxT", resets, (B, T))):
        if array is not None and jnp.shape(array) != wanted:
            raise ValueError(f"wkv7: {name} is {jnp.shape(array)} and must be {wanted}")


def _obstacle(implementation: str, *arrays) -> str | None:
    """Why the kernels don't take a call. In fp32 they would be slow and spill; interpreted, they show that they're right."""
    N, dtypes = arrays[0].shape[-1], {x.dtype for x in arrays}
    if N not in wkv7_pallas.HEADS:
        return f"a head of {N} is none of {', '.join(map(str, wkv7_pallas.HEADS))}"
    if dtypes != {jnp.dtype(jnp.bfloat16)} and (implementation != "interpret" or dtypes != {jnp.dtype(jnp.float32)}):
        return f"r, k, v, kappa, a: dtypes {', '.join(str(x.dtype) for x in arrays)} are not all bfloat16"
    return None


def _settled(v_BxTxHxN, s):
    """The state in full. Made here, and not before: a state of zeros need not be kept."""
    B, _, H, N = v_BxTxHxN.shape
    return jnp.zeros((B, H, N, N), jnp.float32) if s is None else s


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv7(implementation: str, arrays, s, resets):
    return _forward(implementation, arrays, s, resets)[0]


def _forward(implementation, arrays, s, resets):
    full = (*arrays, _settled(arrays[3], s), resets)
    return backend.dispatch(implementation, wkv7_pallas.forward, wkv7_xla.forward, *full), (arrays, s, resets)


def _backward(implementation, residuals, cotangents):
    arrays, s, resets = residuals
    full = (*arrays, _settled(arrays[3], s), resets, *cotangents)
    *gradients, ds = backend.dispatch(implementation, wkv7_pallas.backward, wkv7_xla.backward, *full)
    no_gradient = None if resets is None else np.zeros(resets.shape, jax.dtypes.float0)
    return tuple(gradients), None if s is None else ds, no_gradient


_wkv7.defvjp(_forward, _backward)
