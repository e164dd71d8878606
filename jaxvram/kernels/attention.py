"""Softmax attention, o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s (Vaswani et al. 2017, arXiv:1706.03762).

Bytes: the plain form writes (B, H, T, S) scores, 4 bytes each, and reads them twice more in the backward pass: 403 MB a
layer for GPT-2 at 8 x 1024. On NVIDIA GPUs Pallas kernels (attention_pallas.py) hold a tile of them on chip: forward they
read q once and k, v once per block of queries, and write o and 4 bytes a row. Elsewhere XLA holds a chunk of queries at a
time (attention_xla.py). Both keep q, k, v, o and the log-sum-exp for the backward pass: 4 sizeof(q) bytes a token and
channel with as many key as query heads, and 4 bytes a token and head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import attention_pallas, attention_xla, backend
from jaxvram.kernels.attention_mask import Data, Rule
from jaxvram.kernels.attention_xla import Scores

LARGEST_HEAD = 256
SMALL = 64  # up to so many queries and keys a row of scores is no longer than q, k, v and o: they are kept, by JAX


def attention_reference(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, *, dropout_rate=0.0, dropout_key=None, **options):
    """The definition, with all scores in memory; arguments as `attention` has them."""
    rule, scores, data = _settle(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, **options)
    return attention_xla.whole(
        rule, scores, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, data, dropout_rate=dropout_rate, dropout_key=dropout_key
    )


def attention(
    q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, *, dropout_rate=0.0, dropout_key=None, implementation="auto", **options
):  # fmt: skip
    """Attention of H query heads to G key heads, H a multiple of G. Scores and softmax in fp32.

    Args:
      q_BxTxHxK: queries, at positions offset, offset + 1, ... of the keys' axis.
      k_BxSxGxK, v_BxSxGxK: keys and values; head h reads key head h G // H. Heads of v may have another size (XLA).
      dropout_rate, dropout_key: dropout of probabilities, as in GPT-2; no key, no dropout. On the XLA path only.
      implementation: 'auto': kernels where the program is lowered for CUDA and they take the call, else XLA; 'pallas',
        'xla' or 'interpret' (the kernels, slowly, anywhere): that one.
      causal: (True) a query at position p sees keys 0..p.
      offset: (0) int or int32 scalar; lets a chunk of queries attend into a cache.
      window: (None) sees the last `window` keys only, its own included (Beltagy et al. 2020); with causal.
      key_lengths_B: (None) keys of each sequence that count, int32.
      query_segments_BxT, key_segments_BxS: (None) int32; a query sees the keys of its own segment only.
      scale: (None) factor of q . k; None: 1 / sqrt(K).
      soft_cap: (None) scores s become soft_cap tanh(s / soft_cap) (Gemma 2, arXiv:2408.00118).
    Returns:
      o_BxTxHxK in the dtype of v; 0 for a query that sees no key.
    Raises:
      ValueError: shapes or options that make no sense, or a named implementation that does not take them.
    """
    q, k, v = map(jnp.asarray, (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK))
    rule, scores, data = _settle(q, k, v, **options)
    drops = dropout_key is not None and dropout_rate > 0
    if implementation == "auto" and max(q.shape[1], k.shape[1]) <= SMALL:
        dropout = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
        return attention_xla.whole(rule, scores, q, k, v, data, **dropout)
    choice = backend.choose("attention", implementation, _obstacle(q, k, v, drops))
    if drops:
        return attention_xla.with_dropout(rule, scores, q, k, v, data, dropout_rate, dropout_key)
    return _attention(rule, scores, choice, q, k, v, data)


def _settle(
    q, k, v, *, causal=True, offset=0, window=None, key_lengths_B=None, query_segments_BxT=None, key_segments_BxS=None,
    scale=None, soft_cap=None,
):  # fmt: skip
    """(Rule, Scores, Data) of a call, checked."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if k.shape != (B, S, G, K) or v.shape[:3] != k.shape[:3] or H % G:
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not belong together")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"attention: window={window} needs causal=True and at least one key")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"attention: soft_cap={soft_cap} must be positive")
    if (query_segments_BxT is None) != (key_segments_BxS is None):
        raise ValueError("attention: give query_segments_BxT and key_segments_BxS, or neither")
    for name, array, shape in (
        ("key_lengths_B", key_lengths_B, (B,)),
        ("query_segments_BxT", query_segments_BxT, (B, T)),
        ("key_segments_BxS", key_segments_BxS, (B, S)),
    ):
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"attention: {name} is {jnp.shape(array)} and must be {shape}")
    is_static = isinstance(offset, int)
    rule = Rule(causal, window, offset if is_static else None, key_lengths_B is not None, key_segments_BxS is not None)
    as_int32 = lambda x: None if x is None else jnp.asarray(x, jnp.int32)
    data = Data(
        None if is_static else as_int32(offset),
        as_int32(key_lengths_B),
        as_int32(query_segments_BxT),
        as_int32(key_segments_BxS),
    )
    return rule, Scores(K**-0.5 if scale is None else float(scale), soft_cap), data


def _obstacle(q, k, v, drops: bool) -> str | None:
    """Why the kernels don't take a call."""
    if drops:
        return "dropout_key: probabilities are dropped on the XLA path only"
    if v.shape[-1] != q.shape[-1]:
        return f"v: its head of {v.shape[-1]} is not that of q, {q.shape[-1]}"
    if q.shape[-1] > LARGEST_HEAD:
        return f"q: a head of {q.shape[-1]} exceeds {LARGEST_HEAD}"
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype} are not one of bfloat16, float16, float32"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(rule: Rule, scores: Scores, implementation: str, q, k, v, data: Data):
    return _forward(rule, scores, implementation, q, k, v, data)[0]


def _forward(rule, scores, implementation, q, k, v, data):
    o, lse = backend.dispatch(
        implementation,
        functools.partial(attention_pallas.forward, rule, scores),
        functools.partial(attention_xla.forward, rule, scores),
        q, k, v, data,
    )  # fmt: skip
    return o, (q, k, v, o, lse, data)


def _backward(rule, scores, implementation, residuals, do):
    q, k, v, o, lse, data = residuals
    dq, dk, dv = backend.dispatch(
        implementation,
        functools.partial(attention_pallas.backward, rule, scores),
        functools.partial(attention_xla.backward, rule, scores),
        q, k, v, o, lse, do, data,
    )  # fmt: skip
    return dq, dk, dv, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), data)


_attention.defvjp(_forward, _backward)
