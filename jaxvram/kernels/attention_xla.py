"""Softmax attention without kernels: the definition, and a form that holds one chunk of queries' scores at a time.

The chunked form saves what the kernels save, q, k, v, o and a log-sum-exp a row, and makes the scores again for the
gradients. It needs B H C S fp32 scores for chunks of C queries, SCORES_BUDGET at the most where T can be cut so far.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxvram.kernels.attention_mask import Data, Rule, visible
from jaxvram.kernels.backend import HIDDEN

SCORES_BUDGET = 64 * 2**20  # bytes of fp32 scores that a chunk may hold
MAX_CHUNKS = 8  # chunks are unrolled, so that a causal one reads only the keys before its end


@dataclasses.dataclass(frozen=True)
class Scores:
    """s = q . k scale, softly capped at cap tanh(s / cap), as Gemma 2 and Grok-1 do; and its slope."""

    scale: float
    cap: float | None = None

    def __call__(self, products):
        scores = products * self.scale
        return scores if self.cap is None else self.cap * jnp.tanh(scores / self.cap)

    def in_units(self, unit: float) -> "Scores":
        """The same scores times `unit`; the slope stays the same."""
        return Scores(self.scale * unit, None if self.cap is None else self.cap * unit)

    def slope(self, scores):
        """d s / d (q . k scale), from s."""
        return 1.0 if self.cap is None else 1.0 - jnp.square(scores / self.cap)


# Products over K, S and T, in the order in which XLA:CPU's fast matrix product takes its operands as they lie: heads
# before positions, the summed axis last on the left. Letters: h a head, or g a key head and r one of its R query heads.
QK = {4: "bhtk,bhsk->bhts", 5: "bgrtk,bgsk->bgrts"}
PV = {4: "bhts,bhsk->bhtk", 5: "bgrts,bgsk->bgrtk"}
QTP = {4: "bhkt,bhts->bhks", 5: "bgrkt,bgrts->bgks"}


def by_head(x_BxTxHxK, G: int | None = None):
    """(B, H, T, K); or (B, G, R, T, K) where R > 1 query heads g R .. g R + R - 1 share the key head g."""
    x_BxHxTxK = x_BxTxHxK.swapaxes(1, 2)
    B, H, T, K = x_BxHxTxK.shape
    return x_BxHxTxK if G in (None, H) else x_BxHxTxK.reshape(B, G, H // G, T, K)


def by_position(x_BxGxRxTxK):
    """(B, T, H, K) again."""
    B, *_, T, K = x_BxGxRxTxK.shape
    return x_BxGxRxTxK.reshape(B, -1, T, K).swapaxes(1, 2)


def _scores(rule: Rule, scores: Scores, q_BxGxRxTxK, k_BxGxSxK, data: Data, start: int):
    """(scores of all in fp32, the mask of those that are seen or None) of queries [start, start + T), keys [0, S)."""
    s = scores(jnp.einsum(QK[q_BxGxRxTxK.ndim], q_BxGxRxTxK, k_BxGxSxK, preferred_element_type=jnp.float32))
    mask = visible(rule, data, start, *s.shape[-2:])
    return s, mask if mask is None or s.ndim == 5 else mask[:, 0]


def _hide(x, mask, value):
    return x if mask is None else jnp.where(mask, x, value)


def whole(rule, scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, data, *, start=0, dropout_rate=0.0, dropout_key=None):
    """The definition, with all scores at once; differentiated by JAX."""
    q, k, v = by_head(q_BxTxHxK, k_BxSxGxK.shape[2]), by_head(k_BxSxGxK), by_head(v_BxSxGxK)
    s, mask = _scores(rule, scores, q, k, data, start)
    p = jax.nn.softmax(_hide(s, mask, HIDDEN), axis=-1)
    if rule.may_hide_all:
        p = jnp.where(mask, p, 0)
    if dropout_key is not None and dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, p.shape)
        p = jnp.where(kept, p / (1 - dropout_rate), 0)
    return by_position(jnp.einsum(PV[p.ndim], p.astype(v.dtype), v))


def chunk_count(bytes_per_query: int, T: int) -> int:
    """The smallest divisor of T up to MAX_CHUNKS that brings a chunk's scores under the budget, or the largest there is."""
    divisors = [d for d in range(1, MAX_CHUNKS + 1) if T % d == 0]
    return next((d for d in divisors if bytes_per_query * (T // d) <= SCORES_BUDGET), divisors[-1])


def _chunks(rule: Rule, q_BxTxHxK, k_BxSxGxK):
    """(first query, end of the queries, end of the keys that they may see) of each chunk."""
    (B, T, H, _), S = q_BxTxHxK.shape, k_BxSxGxK.shape[1]
    C = T // chunk_count(B * H * S * 4, T)
    for start in range(0, T, C):
        skips = rule.causal and rule.offset is not None  # a traced offset can leave nothing out
        yield start, start + C, max(1, min(S, rule.offset + start + C)) if skips else S


def _in_turn(x, before):
    """x, but not before `before` is done: side by side, chunks would need the memory that they save."""
    return x if before is None else jax.lax.optimization_barrier((x, before))[0]


def with_dropout(rule, scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, data, dropout_rate, dropout_key):
    """Probabilities dropped, each chunk with a key of its own; differentiated by JAX, chunk by chunk."""
    outs = []
    chunks = list(_chunks(rule, q_BxTxHxK, k_BxSxGxK))
    for i, (start, end, keys) in enumerate(chunks):
        key = dropout_key if len(chunks) == 1 else jax.random.fold_in(dropout_key, i)
        chunk = functools.partial(whole, rule, scores, start=start, dropout_rate=dropout_rate, dropout_key=key)
        chunk = chunk if len(chunks) == 1 else jax.checkpoint(chunk)
        q_BxCxHxK = _in_turn(q_BxTxHxK[:, start:end], outs[-1] if outs else None)
        outs.append(chunk(q_BxCxHxK, k_BxSxGxK[:, :keys], v_BxSxGxK[:, :keys], data))
    return jnp.concatenate(outs, axis=1)


def forward(rule: Rule, scores: Scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, data: Data):
    """(o_BxTxHxK in the dtype of v, log-sum-exp of the scores (B, H, T) in fp32)."""
    B, _, H, _ = q_BxTxHxK.shape
    q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK = by_head(q_BxTxHxK, k_BxSxGxK.shape[2]), by_head(k_BxSxGxK), by_head(v_BxSxGxK)
    outs, lses = [], []
    for start, end, keys in _chunks(rule, q_BxTxHxK, k_BxSxGxK):
        q = _in_turn(q_BxGxRxTxK[..., start:end, :], outs[-1] if outs else None)
        s, mask = _scores(rule, scores, q, k_BxGxSxK[:, :, :keys], data, start)
        s = _hide(s, mask, HIDDEN)
        highest = s.max(-1, keepdims=True)
        p = jnp.exp(s - highest)
        total = p.sum(-1, keepdims=True)
        if rule.may_hide_all:
            p = jnp.where(mask, p, 0)
        v = v_BxGxSxK[:, :, :keys]
        o = jnp.einsum(PV[p.ndim], p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        outs.append((o / total).astype(v.dtype))
        lses.append((highest + jnp.log(total))[..., 0].reshape(B, H, end - start))
    return by_position(jnp.concatenate(outs, axis=-2)), jnp.concatenate(lses, axis=-1)


def backward(rule, scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, o_BxTxHxK, lse_BxHxT, do_BxTxHxK, data):
    """(dq, dk, dv), in the dtypes of q, k and v; sums over chunks in fp32."""
    dtype, (G, S) = q_BxTxHxK.dtype, (k_BxSxGxK.shape[2], k_BxSxGxK.shape[1])
    q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK = by_head(q_BxTxHxK, G), by_head(k_BxSxGxK), by_head(v_BxSxGxK)
    do_BxGxRxTxK, o_BxGxRxTxK = by_head(do_BxTxHxK, G), by_head(o_BxTxHxK, G)
    delta = (do_BxGxRxTxK.astype(jnp.float32) * o_BxGxRxTxK).sum(-1, keepdims=True)
    lse, do_BxGxRxTxK = lse_BxHxT.reshape(delta.shape), do_BxGxRxTxK.astype(dtype)
    dqs, dk, dv = [], None, None
    for start, end, keys in _chunks(rule, q_BxTxHxK, k_BxSxGxK):
        q = _in_turn(q_BxGxRxTxK[..., start:end, :], dqs[-1] if dqs else None)
        do, k, v = do_BxGxRxTxK[..., start:end, :], k_BxGxSxK[:, :, :keys], v_BxGxSxK[:, :, :keys]
        s, mask = _scores(rule, scores, q, k, data, start)
        p = _hide(jnp.exp(s - lse[..., start:end, :]), mask, 0)
        dp = jnp.einsum(QK[do.ndim], do, v, preferred_element_type=jnp.float32)
        ds = p * (dp - delta[..., start:end, :]) * scores.slope(s) * scores.scale
        p, ds = p.astype(dtype), ds.astype(dtype)
        dqs.append(jnp.einsum(PV[ds.ndim], ds, k))
        add = functools.partial(_add, keys=keys, S=S)
        dv = add(dv, jnp.einsum(QTP[p.ndim], do.swapaxes(-1, -2), p, preferred_element_type=jnp.float32))
        dk = add(dk, jnp.einsum(QTP[ds.ndim], q.swapaxes(-1, -2), ds, preferred_element_type=jnp.float32))
    dk_BxSxGxK, dv_BxSxGxK = (d_BxGxKxS.transpose(0, 3, 1, 2) for d_BxGxKxS in (dk, dv))
    return by_position(jnp.concatenate(dqs, axis=-2)), dk_BxSxGxK.astype(k.dtype), dv_BxSxGxK.astype(v.dtype)


def _add(total_BxGxKxS, part, keys: int, S: int):
    """total + part, where part is of the first `keys` keys."""
    if total_BxGxKxS is None:
        return part if keys == S else jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, S - keys)))
    return total_BxGxKxS.at[..., :keys].add(part)
