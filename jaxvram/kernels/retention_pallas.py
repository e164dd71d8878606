"""Retention's parallel form as one Pallas kernel, which is its whole backward pass as well. With gamma^|i - j| as weights,

  product(x, y, z)              out_i = sum over j <= i of gamma^(i - j) (x_i . y_j) z_j
  product(x, y, z, later=True)  out_i = sum over j >= i of gamma^(j - i) (x_i . y_j) z_j
  o = product(q, k, v);  dq = product(do, v, k);  dk = product(v, do, q, later=True);  dv = product(k, q, do, later=True).

A program has a block of rows i of one head. It walks along blocks of j, and the sum stays in registers; no score leaves it.

Skipped is a block that lies in other documents alone, and one whose nearest token has a weight below 2^-REACH_BITS: beyond
the head's reach. All that a row leaves out weighs less than 2^-24 of S = 1 / (1 - gamma), the weights of an endless row: the
sum of gamma^d over d >= n is gamma^n S. That is what fp32 rounds off. Rows of gradients have the same weights.

FLOPs: 2 (K + P) a pair of tokens in each of the four, of all of them 4 (K + P) (T + 64) a token and head before skipping.
Bytes: x, y, z and out once, if the cache holds a head's x, y and z: 16 (K + P) a token and head in bf16 for the four.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import HIDDEN, LOG2_E, Tile
from jaxvram.kernels.scalar_decay_tiles import Span, block_of, load, store

REACH_BITS = 24
WIDEST = {2: 512, 4: 256}  # by bytes an element: columns of z whose sums one program has registers for


def tile_for(x_BxTxHxW, z_BxTxHxP) -> Tile:
    """Square. Found by compiling for sm_89, with documents and with ragged lengths: no spills."""
    W, P = x_BxTxHxW.shape[3], z_BxTxHxP.shape[3]
    if z_BxTxHxP.dtype == jnp.float32:
        C = 16 if P > 128 and W <= 64 else 32  # few keys are no loop, but one wide piece of code
        return Tile(C, C, 8 if P > 64 else 4, 1)
    if P <= 128 and W in (16, 32, 64, 128):
        return Tile(64, 64, 4, 2)
    # 8 warps repeat no work: where a sum is wider than it has rows, Triton gives each of them some columns of all rows.
    return Tile(64, 64, 8, 2 if _width(P, 2) > 256 else 3)


def _width(P: int, itemsize: int) -> int:
    """Columns of z a program."""
    widest = WIDEST[itemsize]
    return backend.power_of_two(P) if P <= widest else widest // 2


def reach(log_gamma_H, T: int):
    """Largest distance with a weight of at least 2^-REACH_BITS, (H,) int32; at most T."""
    array = np if isinstance(log_gamma_H, np.ndarray) else jnp
    tokens_H = REACH_BITS / array.maximum(-LOG2_E * log_gamma_H, REACH_BITS / T)
    return array.floor(tokens_H).astype(array.int32)


def pairs(log_gamma_H: np.ndarray, T: int, C: int) -> int:
    """Pairs of blocks of C tokens that all heads visit, without documents."""
    row_n, reach_Hx1 = np.arange(pl.cdiv(T, C)), reach(log_gamma_H, T)[:, None]
    return int((row_n - np.maximum(row_n * C - reach_Hx1, 0) // C + 1).sum())


def _blocks(own, C: int, T: int, reach, bound_ref, later: bool):
    """(first, end) of the blocks that block `own` sees. bound_ref: the farthest token that each token sees, or None."""
    edge = own * C + (C - 1 if later else 0)  # the row that sees farthest
    farthest = jnp.minimum(edge + reach, T - 1) if later else jnp.maximum(edge - reach, 0)
    if bound_ref is not None:
        bound = bound_ref[jnp.minimum(edge, T - 1)]
        farthest = jnp.minimum(farthest, bound) if later else jnp.maximum(farthest, bound)
    return (own, farthest // C + 1) if later else (farthest // C, own + 1)


def _kernel(log_gamma_ref, reach_ref, x_ref, y_ref, z_ref, *refs, tile, shape, later):
    *bound_refs, out_ref = refs
    (T, W, P), C, bound_ref = shape, tile.rows, bound_refs[0] if bound_refs else None
    width = _width(P, z_ref.dtype.itemsize)
    groups, blocks = pl.cdiv(P, width), pl.cdiv(T, C)
    head, n = pl.program_id(1), pl.program_id(0) // groups
    own = n if later else blocks - 1 - n  # the longest walk first
    rows, values = Span(own * C, C, T), Span(pl.program_id(0) % groups * width, width, P)
    i_C = rows.start + jnp.arange(C)
    sign_log2_gamma = log_gamma_ref[head] * (-LOG2_E if later else LOG2_E)
    bound_C = None if bound_ref is None else backend.load(bound_ref.at[rows.at], mask=i_C < T if T % C else None)

    def of_block(c, out_CxP):
        columns = Span(c * C, C, T)
        j_C = columns.start + jnp.arange(C)

        def of_keys(n, scores_CxC):
            key = block_of(n, W)
            return scores_CxC + backend.dot(load(x_ref, rows, key), load(y_ref, columns, key), trans_b=True)

        scores_CxC = jax.lax.fori_loop(0, pl.cdiv(W, 64), of_keys, jnp.zeros((C, C), jnp.float32))
        i_Cx1, j_1xC = i_C[:, None], j_C[None, :]
        seen_CxC = j_1xC >= i_Cx1 if later else j_1xC <= i_Cx1
        if bound_C is not None:
            seen_CxC &= j_1xC <= bound_C[:, None] if later else j_1xC >= bound_C[:, None]
        exponent_CxC = (i_Cx1.astype(jnp.float32) - j_1xC.astype(jnp.float32)) * sign_log2_gamma
        scores_CxC *= jnp.exp2(jnp.where(seen_CxC, exponent_CxC, HIDDEN))
        return out_CxP + backend.dot(scores_CxC.astype(z_ref.dtype), load(z_ref, columns, values))

    first, end = _blocks(own, C, T, reach_ref[head], bound_ref, later)
    out_CxP = jax.lax.fori_loop(first, end, of_block, jnp.zeros((C, width), jnp.float32))
    store(out_ref, rows, values, out_CxP)


def product(x_BxTxHxW, y_BxTxHxW, z_BxTxHxP, log_gamma_H, bound_BxT=None, *, later=False, interpret: bool, name: str):
    """out_BxTxHxP in the dtype of z. bound_BxT: the first (for `later` the last) token of each token's document, int32."""
    (B, T, H, W), P = x_BxTxHxW.shape, z_BxTxHxP.shape[3]
    tile = tile_for(x_BxTxHxW, z_BxTxHxP)
    of_head = lambda width: pl.BlockSpec((None, T, None, width), lambda i, h, b: (b, 0, h, 0))
    all_heads, tokens = pl.BlockSpec((H,), lambda i, h, b: (0,)), pl.BlockSpec((None, T), lambda i, h, b: (b, 0))
    bounds = () if bound_BxT is None else (bound_BxT,)
    return backend.call(
        functools.partial(_kernel, tile=tile, shape=(T, W, P), later=later),
        grid=(pl.cdiv(T, tile.rows) * pl.cdiv(P, _width(P, z_BxTxHxP.dtype.itemsize)), H, B),
        in_specs=[all_heads, all_heads, of_head(W), of_head(W), of_head(P), *[tokens] * len(bounds)],
        out_specs=of_head(P),
        out_shape=jax.ShapeDtypeStruct(z_BxTxHxP.shape, z_BxTxHxP.dtype),
        tile=tile, interpret=interpret, name=f"retention_{name}",
    )(log_gamma_H, reach(log_gamma_H, T), x_BxTxHxW, y_BxTxHxW, z_BxTxHxP, *bounds)  # fmt: skip


def _bounds(resets_BxT):
    """(first, last) token of each token's document, int32; None without any."""
    if resets_BxT is None:
        return None, None
    T = resets_BxT.shape[1]
    first_BxT = jax.lax.cummax(jnp.where(resets_BxT, jnp.arange(T, dtype=jnp.int32), 0), axis=1)
    next_BxT = jax.lax.cummin(jnp.where(resets_BxT, jnp.arange(T, dtype=jnp.int32), T), axis=1, reverse=True)
    return first_BxT, jnp.pad(next_BxT[:, 1:], ((0, 0), (0, 1)), constant_values=T) - 1


def forward(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gamma_H, resets_BxT, *, interpret: bool):
    """o_BxTxHxP in the dtype of v."""
    first_BxT, _ = _bounds(resets_BxT)
    return product(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gamma_H, first_BxT, interpret=interpret, name="forward")


def backward(q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, log_gamma_H, resets_BxT, do_BxTxHxP, *, interpret: bool):
    """Gradients of q, k, v, in their dtype."""
    q, k, v, do, (first_BxT, last_BxT) = q_BxTxHxK, k_BxTxHxK, v_BxTxHxP, do_BxTxHxP, _bounds(resets_BxT)
    dq = product(do, v, k, log_gamma_H, first_BxT, interpret=interpret, name="dq")
    dk = product(v, do, q, log_gamma_H, last_BxT, later=True, interpret=interpret, name="dk")
    dv = product(k, q, do, log_gamma_H, last_BxT, later=True, interpret=interpret, name="dv")
    return dq, dk, dv
