"""Retention (Sun et al. 2023, arXiv:2307.08621): o_n = sum over m <= n of gamma^(n - m) (q_n . k_m) v_m, gamma by head.

Three forms, of one value:
  parallel   O = ((Q K^T) * D) V, D_nm = gamma^(n - m) for n >= m, else 0         `retention_parallel`, the definition
  recurrent  h_n = gamma h_(n-1) + v_n k_n^T;  o_n = h_n q_n                       `scalar_decay_reference`
  chunkwise  within a chunk the first, between chunks the second                  `scalar_decay`
The second is the first with the sum over m kept: h_n = sum over m <= n of gamma^(n - m) v_m k_m^T. For the third, cut that
sum at the chunk's start s: what came before it is gamma^(n - s + 1) h_(s-1), with no need to know its tokens.

What runs is chunks or, on an NVIDIA GPU and up to SHORT, the parallel form by tiles (retention_pallas.py). Its products take
4 (K + P) T FLOPs a token and head, forward and backward, and nothing but inputs and results goes through memory. Those of
chunks don't grow with T, but seven times in 64 tokens a state of K P numbers in bf16 is written or read: 7/32 K P bytes a
token and head. The times of both are equal where T (K + P) / (K P) is 7/128 of the FLOPs that a card makes while it moves
a byte: at 6.3 on an RTX 4070 (116 of its peaks), which for the paper's heads of 256 keys and 432 values is T = 1,020.

Kept for the backward pass are the inputs alone, in all forms.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import backend, retention_pallas, scalar_decay_xla
from jaxvram.kernels.scalar_decay import FEW, scalar_decay, settled

SHORT = 6.4  # T (K + P) / (K P) up to which a GPU runs the parallel form: 1,024 tokens at the paper's heads


def log_gammas(heads: int) -> np.ndarray:
    """log(1 - 2^(-5 - h)), (H,) fp32. From 1 - gamma: gamma itself is 1 in fp32 from head 20 on."""
    return np.log1p(-(2.0 ** (-5 - np.arange(heads)))).astype(np.float32)


def is_short(T: int, K: int, P: int) -> bool:
    """Whether the tiled parallel form is the faster one."""
    return FEW <= T and T * (K + P) <= SHORT * K * P


def retention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gamma_H, *, h_BxHxPxK=None, resets_BxT=None, implementation="auto"):
    """Outputs of H heads of P values, and the state after the last token.

    Args:
      q_BxTxHxK, k_BxTxHxK, v_BxTxHxP: products are made in their dtype, sums are fp32.
      log_gamma_H: <= 0, fp32. A constant: not differentiated.
      h_BxHxPxK: the state before the first token, fp32; None: zeros, and the state behind the last one is not asked for.
      resets_BxT: bool; where true a document begins: what was before is not seen. Not differentiated.
      implementation: 'auto': kernels where the program is lowered for CUDA and they take the call, else XLA; 'pallas',
        'xla' or 'interpret' (the kernels, slowly, anywhere): that one.
    Returns:
      (o_BxTxHxP in the dtype of v, h_BxHxPxK in fp32 or None), with gradients by q, k, v and h.
    Raises:
      ValueError: shapes that do not belong together, or a named implementation that does not take the call.
    """
    arrays = _checked(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gamma_H, resets_BxT)
    (_, T, _, K), P = arrays[0].shape, arrays[2].shape[3]
    if h_BxHxPxK is None and is_short(T, K, P):
        return _tiled(_choice(implementation, arrays), *arrays), None
    *qkvg, resets_BxT = arrays
    options = {"resets_BxT": resets_BxT, "implementation": implementation}
    o_BxTxHxP, last_BxHxPxK = scalar_decay(*qkvg, h_BxHxPxN=h_BxHxPxK, **options)
    return o_BxTxHxP, None if h_BxHxPxK is None else last_BxHxPxK


def retention_tiled(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gamma_H, resets_BxT=None, implementation="auto"):
    """o_BxTxHxP of `retention` by the tiled parallel form, however long; where there are no kernels, by XLA's chunks."""
    arrays = _checked(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gamma_H, resets_BxT)
    return _tiled(_choice(implementation, arrays), *arrays)


def _checked(q, k, v, g, resets) -> tuple:
    """As arrays, of shapes that belong together."""
    q, k, v, g = (*map(jnp.asarray, (q, k, v)), jnp.asarray(g, jnp.float32))
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"retention: q {q.shape}, k {k.shape} and v {v.shape} do not belong together")
    if g.shape != (H := q.shape[2:3]):
        raise ValueError(f"retention: log_gamma_H is {g.shape} and must be {H}")
    if resets is not None and jnp.shape(resets) != q.shape[:2]:
        raise ValueError(f"retention: resets_BxT is {jnp.shape(resets)} and must be {q.shape[:2]}")
    return q, k, v, g, None if resets is None else jnp.asarray(resets, bool)


def _choice(implementation: str, arrays) -> str:
    dtypes = [x.dtype for x in arrays[:3]]
    takes = len(set(dtypes)) == 1 and dtypes[0] in (jnp.bfloat16, jnp.float32)
    obstacle = None if takes else f"q, k, v: dtypes {', '.join(map(str, dtypes))} are not one of bfloat16, float32"
    return backend.choose("retention", implementation, obstacle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(implementation: str, q, k, v, g, resets):
    return _forward(implementation, q, k, v, g, resets)[0]


def _forward(implementation, q, k, v, g, resets):
    def chunks(q, k, v, g, resets):
        return scalar_decay_xla.forward(q, k, v, *settled(v, q.shape[-1], g), resets)[0]

    return backend.dispatch(implementation, retention_pallas.forward, chunks, q, k, v, g, resets), (q, k, v, g, resets)


def _backward(implementation, residuals, do):
    *_, g, resets = residuals

    def chunks(q, k, v, g, resets, do):
        decay, weight, h = settled(v, q.shape[-1], g)
        return scalar_decay_xla.backward(q, k, v, decay, weight, h, resets, do, jnp.zeros_like(h), rows=False)[:3]

    gradients = backend.dispatch(implementation, retention_pallas.backward, chunks, *residuals, do)
    no_gradient = None if resets is None else np.zeros(resets.shape, jax.dtypes.float0)
    return *gradients, jnp.zeros_like(g), no_gradient


_tiled.defvjp(_forward, _backward)


def retention_parallel(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gamma_H, resets_BxT=None):
    """The definition, T x T: o_BxTxHxP in fp32. With resets a token sees its own document alone."""
    T = q_BxTxHxK.shape[1]
    q, k, v = (x.astype(jnp.float32) for x in (q_BxTxHxK, k_BxTxHxK, v_BxTxHxP))
    distance_TxT = jnp.arange(T)[:, None] - jnp.arange(T)
    seen_BxTxT = (distance_TxT >= 0)[None]
    if resets_BxT is not None:
        document_BxT = jnp.cumsum(resets_BxT, axis=1)
        seen_BxTxT &= document_BxT[:, :, None] == document_BxT[:, None]
    power_HxTxT = jnp.asarray(log_gamma_H)[:, None, None] * jnp.maximum(distance_TxT, 0)
    D_BxHxTxT = jnp.where(seen_BxTxT[:, None], jnp.exp(power_HxTxT), 0)
    scores_BxHxTxT = jnp.einsum("bnhk,bmhk->bhnm", q, k, precision="highest") * D_BxHxTxT
    return jnp.einsum("bhnm,bmhp->bnhp", scores_BxHxTxT, v, precision="highest")
