"""Softmax attention, o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s (Vaswani et al. 2017, arXiv:1706.03762).

Bytes: the plain form writes (B, H, T, S) scores, 4 bytes each, and reads them twice more in the backward pass: 403 MB a
layer for GPT-2 at 8 x 1024. The chunked form holds a chunk of C query rows at a time and recomputes its scores in the
backward pass, so it needs B H C S of them, and keeps q, k, v: 3 sizeof(q) bytes a token and channel.
"""

import functools

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # not -inf: a row without any visible key stays finite
SCORES_BUDGET = 64 * 2**20  # bytes of fp32 scores that a chunk may hold
MAX_CHUNKS = 8  # chunks are unrolled, so that a causal one reads only the keys before its end


def attention_reference(
    q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, *, causal=True, offset=0, dropout_rate=0.0, dropout_key=None
):
    """The definition. Scores and softmax in fp32, products in the dtype of the inputs.

    Args:
      q_BxTxHxK: queries, at positions offset, offset + 1, ... of the keys' axis.
      k_BxSxHxK, v_BxSxHxK: keys and values.
      causal: a query at position p sees keys 0..p.
      offset: int or int32 scalar; lets a chunk of queries attend into a cache.
      dropout_rate, dropout_key: dropout of probabilities, as in GPT-2; no key, no dropout.
    Returns:
      o_BxTxHxK in the dtype of v.
    """
    scores_BxHxTxS = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k_BxSxHxK, preferred_element_type=jnp.float32)
    scores_BxHxTxS *= q_BxTxHxK.shape[-1] ** -0.5
    if causal:
        T, S = scores_BxHxTxS.shape[-2:]
        visible_TxS = jnp.arange(S) <= offset + jnp.arange(T)[:, None]
        scores_BxHxTxS = jnp.where(visible_TxS, scores_BxHxTxS, NEGATIVE)
    p_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
    if dropout_key is not None and dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, p_BxHxTxS.shape)
        p_BxHxTxS = jnp.where(kept, p_BxHxTxS / (1 - dropout_rate), 0)
    return jnp.einsum("bhts,bshk->bthk", p_BxHxTxS.astype(v_BxSxHxK.dtype), v_BxSxHxK)


def attention(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, *, causal=True, offset=0, dropout_rate=0.0, dropout_key=None):
    """`attention_reference`, in chunks of queries wherever its scores would exceed SCORES_BUDGET; same arguments."""
    B, T, H, _ = q_BxTxHxK.shape
    chunks = chunk_count(B * H * k_BxSxHxK.shape[1] * 4, T)
    if chunks == 1:
        return attention_reference(
            q_BxTxHxK, k_BxSxHxK, v_BxSxHxK,
            causal=causal, offset=offset, dropout_rate=dropout_rate, dropout_key=dropout_key,
        )  # fmt: skip
    C = T // chunks
    skips = causal and isinstance(offset, int)  # keys past the chunk's last query are never read
    outs = []
    k_BxSxHxK, v_BxSxHxK = map(jnp.asarray, (k_BxSxHxK, v_BxSxHxK))
    for i in range(chunks):
        start = i * C
        end = min(offset + start + C, k_BxSxHxK.shape[1]) if skips else None
        chunk = functools.partial(
            attention_reference, causal=causal, offset=offset + start, dropout_rate=dropout_rate,
            dropout_key=None if dropout_key is None else jax.random.fold_in(dropout_key, i),
        )  # fmt: skip
        q_BxCxHxK = q_BxTxHxK[:, start : start + C]
        if outs:  # one chunk after another: side by side, they would need the memory that chunks save
            q_BxCxHxK, outs[-1] = jax.lax.optimization_barrier((q_BxCxHxK, outs[-1]))
        outs.append(jax.checkpoint(chunk)(q_BxCxHxK, k_BxSxHxK[:, :end], v_BxSxHxK[:, :end]))
    return jnp.concatenate(outs, axis=1)


def chunk_count(bytes_per_query: int, T: int) -> int:
    """The smallest divisor of T up to MAX_CHUNKS that brings a chunk's scores under the budget, or the largest there is."""
    divisors = [d for d in range(1, MAX_CHUNKS + 1) if T % d == 0]
    return next((d for d in divisors if bytes_per_query * (T // d) <= SCORES_BUDGET), divisors[-1])
