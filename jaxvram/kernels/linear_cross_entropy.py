"""Cross-entropy straight from hidden states and head, without the logits: loss_t = log sum_v e^{h_t . w_v} - h_t . w_{y_t}.

The logits of GPT-2 at 8 x 1024 are 1.6 GB in fp32, and a plain loss holds them two or three times. Here a scan walks along
T in chunks of C positions; a chunk's logits live only inside its step, forward and backward. Backward keeps h, w (which
exist anyway) and one fp32 log-sum-exp a token, and recomputes the logits: 2 D V more FLOPs a token, 8 D V in all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

LOGITS_BUDGET = 128 * 2**20  # bytes of fp32 logits that a chunk may hold
NEGATIVE = -1e30


def linear_cross_entropy_reference(hidden_BxTxD, head_VxD, targets_BxT, vocab_size=None):
    """The definition, with all logits at once; see `linear_cross_entropy`."""
    lse_BxT, target_logit_BxT, _ = _logits(hidden_BxTxD, head_VxD, targets_BxT, vocab_size)
    return jnp.where(targets_BxT >= 0, lse_BxT - target_logit_BxT, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_cross_entropy(hidden_BxTxD, head_VxD, targets_BxT, vocab_size=None, chunk=None):
    """Loss of each token in nats, fp32, 0 where the target is negative (ignored).

    Args:
      hidden_BxTxD: final hidden states, in the compute dtype.
      head_VxD: rows of the output matrix in the parameters' dtype; products are made in hidden's dtype.
      targets_BxT: int32 in [0, vocab_size), or negative to ignore.
      vocab_size: rows of the head from here on are padding and don't count; None: all count.
      chunk: positions of T at a time (the last one may be short); None: as LOGITS_BUDGET allows.
    Returns:
      loss_BxT. The gradient of the head is accumulated in fp32.
    """
    return _forward(hidden_BxTxD, head_VxD, targets_BxT, vocab_size, chunk)[0]


def _logits(hidden_BxCxD, head_VxD, targets_BxC, vocab_size):
    """Log-sum-exp, the target's logit, and the logits, of one chunk."""
    logits_BxCxV = jnp.einsum(
        "bcd,vd->bcv", hidden_BxCxD, head_VxD.astype(hidden_BxCxD.dtype), preferred_element_type=jnp.float32
    )
    V = head_VxD.shape[0]
    if vocab_size is not None and vocab_size < V:
        logits_BxCxV = jnp.where(jnp.arange(V) < vocab_size, logits_BxCxV, NEGATIVE)
    lse_BxC = jax.nn.logsumexp(logits_BxCxV, axis=-1)
    # A gather from logits would have to hold them; a masked sum fuses with the product that makes them.
    is_target_BxCxV = jnp.arange(V) == targets_BxC[..., None]
    return lse_BxC, jnp.where(is_target_BxCxV, logits_BxCxV, 0).sum(-1), logits_BxCxV


def _forward(hidden_BxTxD, head_VxD, targets_BxT, vocab_size, chunk):
    def of_chunk(_, chunk_of):
        hidden_BxCxD, targets_BxC = chunk_of
        lse_BxC, target_logit_BxC, _ = _logits(hidden_BxCxD, head_VxD, targets_BxC, vocab_size)
        return None, (jnp.where(targets_BxC >= 0, lse_BxC - target_logit_BxC, 0), lse_BxC)

    C = chunk or chunk_length(*hidden_BxTxD.shape[:2], head_VxD.shape[0])
    _, (loss_BxT, lse_BxT) = _over_chunks(of_chunk, None, C, hidden_BxTxD, targets_BxT)
    return loss_BxT, (hidden_BxTxD, head_VxD, targets_BxT, lse_BxT)


def _backward(vocab_size, chunk, residuals, g_BxT):
    """dlogits = (softmax - onehot(target)) g;  dhidden = dlogits w;  dw = dlogits^T h."""
    hidden_BxTxD, head_VxD, targets_BxT, lse_BxT = residuals
    V, D = head_VxD.shape
    dtype = hidden_BxTxD.dtype

    def of_chunk(dhead_VxD, chunk_of):
        hidden_BxCxD, targets_BxC, lse_BxC, g_BxC = chunk_of
        _, _, logits_BxCxV = _logits(hidden_BxCxD, head_VxD, targets_BxC, vocab_size)
        p_BxCxV = jnp.exp(logits_BxCxV - lse_BxC[..., None])
        onehot_BxCxV = jnp.arange(V) == targets_BxC[..., None]
        dlogits_BxCxV = ((p_BxCxV - onehot_BxCxV) * g_BxC[..., None]).astype(dtype)
        dhidden_BxCxD = jnp.einsum("bcv,vd->bcd", dlogits_BxCxV, head_VxD.astype(dtype))
        dhead_VxD += jnp.einsum("bcv,bcd->vd", dlogits_BxCxV, hidden_BxCxD, preferred_element_type=jnp.float32)
        return dhead_VxD, dhidden_BxCxD

    g_BxT = jnp.where(targets_BxT >= 0, g_BxT, 0)
    C = chunk or chunk_length(*hidden_BxTxD.shape[:2], V)
    zeros_VxD = jnp.zeros((V, D), jnp.float32)
    dhead_VxD, dhidden_BxTxD = _over_chunks(of_chunk, zeros_VxD, C, hidden_BxTxD, targets_BxT, lse_BxT, g_BxT)
    no_gradient = np.zeros(targets_BxT.shape, jax.dtypes.float0)
    return dhidden_BxTxD, dhead_VxD.astype(head_VxD.dtype), no_gradient


linear_cross_entropy.defvjp(_forward, _backward)


def _over_chunks(of_chunk, carry, C, *arrays_BxTx):
    """scan(of_chunk) over chunks of C positions, and once more for a shorter rest; B stays whole, as it may be sharded."""
    T = arrays_BxTx[0].shape[1]
    if C >= T:
        return of_chunk(carry, arrays_BxTx)
    n = T // C
    split = lambda x: jnp.moveaxis(x[:, : n * C].reshape(x.shape[0], n, C, *x.shape[2:]), 1, 0)
    join = lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], n * C, *y.shape[3:])
    carry, ys = jax.lax.scan(of_chunk, carry, jax.tree.map(split, arrays_BxTx))
    ys = jax.tree.map(join, ys)
    if n * C < T:
        carry, rest = of_chunk(carry, tuple(x[:, n * C :] for x in arrays_BxTx))
        ys = jax.tree.map(lambda y, r: jnp.concatenate([y, r], axis=1), ys, rest)
    return carry, ys


def chunk_length(B: int, T: int, V: int) -> int:
    """Positions of T whose fp32 logits over a batch of B stay within LOGITS_BUDGET, at least one; a power of two if < T."""
    longest = max(1, LOGITS_BUDGET // (4 * B * V))
    return T if longest >= T else 2 ** (longest.bit_length() - 1)
