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
gradient, 2 each, and a part of the decay's gradient, 4: 24 together, 151 MB at 16 x 512 with D = 768, and 192 MiB at the
most: longer sequences go by segments, of which a state each is kept, and the tokens and gradients of one are there twice,
30 bytes. That of XLA does so as well.
"""

import jax.numpy as jnp

from jaxvram.kernels import heads, wkv7_pallas, wkv7_xla

LOWEST = -4.0  # log decay down to which the forms by chunks are right


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
    arrays = (r, jnp.asarray(log_decay_BxTxHxN, jnp.float32), k, v, kappa, a)
    if r.ndim != 4 or any(x.shape != r.shape for x in arrays):
        raise ValueError(f"wkv7: {', '.join(str(x.shape) for x in arrays)} must be six times one (B, T, H, N)")
    multiplied = {"r": r, "k": k, "v": v, "kappa": kappa, "a": a}
    return heads.call("wkv7", wkv7_pallas, wkv7_xla, arrays, multiplied, s_BxHxNxN, resets_BxT, implementation)
