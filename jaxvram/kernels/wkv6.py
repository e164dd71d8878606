"""RWKV-5's and RWKV-6's recurrence: y_t = S_{t-1} r_t + (r_t . u k_t) v_t, S_t = S_{t-1} diag(d_t) + v_t^T k_t.

S is values x keys; d = exp(log decay) is a key's own, for each token another in RWKV-6, for all the same in RWKV-5; u, the
bonus, is what a token's own key counts for (Peng et al. 2024, arXiv:2404.05892). Both forms go by chunks of 16 tokens, and
within a chunk by halves (`wkv6_xla.py` has the algebra): a decay may be as strong as it likes, since no factor is above 1,
and neither an exponent nor its gradient is a difference of sums. On NVIDIA GPUs Pallas kernels (wkv6_pallas.py) do so on
tensor cores with the state in registers.

Bytes: kept for the backward pass are the inputs alone, 10 a token and channel in bf16 (r, k, v 2 each, the decay 4), and 6
where the decay is constant. While they run, the forward pass of the kernels has what the tokens of a chunk read of each
other, with heads of 64 half a byte a token and channel, and the backward pass the state before each chunk and the gradient
of that behind it, in bf16 with heads of 64 8 bytes each: 16, 101 MB at 8 x 1024 with D = 768, and 128 MiB at the most:
longer sequences go by segments, of which a state each is kept, and the tokens and gradients of one are there twice, 22
bytes. That of XLA does so as well.
"""

import jax.numpy as jnp

from jaxvram.kernels import heads, wkv6_pallas, wkv6_xla


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
    _check(r, g, k, v, u)
    arrays, multiplied = (r, g, k, v, u), {"r": r, "k": k, "v": v}
    return heads.call("wkv6", wkv6_pallas, wkv6_xla, arrays, multiplied, s_BxHxNxN, resets_BxT, implementation)


def _check(r, g, k, v, u) -> None:
    shape = r.shape
    if len(shape) != 4 or k.shape != shape or v.shape != shape:
        raise ValueError(f"wkv6: r {r.shape}, k {k.shape}, v {v.shape} must be three times one (B, T, H, N)")
    _, _, H, N = shape
    if g.shape not in (shape, (H, N)):
        raise ValueError(f"wkv6: log_decay is {g.shape} and must be {shape}, or {(H, N)} for one of all tokens")
    heads.check_shapes("wkv6", u_HxN=(u, (H, N)))
