"""Retention (Sun et al. 2023, arXiv:2307.08621): o_n = sum over m <= n of gamma^(n - m) (q_n . k_m) v_m, gamma by head.

Three forms, of one value:
  parallel   O = ((Q K^T) * D) V, D_nm = gamma^(n - m) for n >= m, else 0         `retention_parallel`, the definition
  recurrent  h_n = gamma h_(n-1) + v_n k_n^T;  o_n = h_n q_n                       `scalar_decay_reference`
  chunkwise  within a chunk the first, between chunks the second                  `scalar_decay`, what runs
The second is the first with the sum over m kept: h_n = sum over m <= n of gamma^(n - m) v_m k_m^T. For the third, cut that
sum at the chunk's start s: what came before it is gamma^(n - s + 1) h_(s-1), with no need to know its tokens.

There is no tiled kernel of the parallel form, whose products grow with T: T (5 K + 4 P) FLOPs a token and head, forward and
backward, a fifth less at T = 2048 where gamma^(n - m) < 2^-24 lets blocks be skipped (524 tokens away in head 0, 1,057 in
head 1). At 4 x 2048 and the medium size, that is 2.8 ms a layer at an RTX 4070's tensor peak; the chunks' bytes take 2.4 ms
of its bus. All recipes train at that length. For shorter ones it would pay: 0.9 ms at 16 x 512, where the matrices of a
layer take 10.7 ms (docs/retnet.md).
"""

import jax.numpy as jnp
import numpy as np


def log_gammas(heads: int) -> np.ndarray:
    """log(1 - 2^(-5 - h)), (H,) fp32. From 1 - gamma: gamma itself is 1 in fp32 from head 20 on."""
    return np.log1p(-(2.0 ** (-5 - np.arange(heads)))).astype(np.float32)


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
