"""Tokens by chunks of C, for the recurrences of wkv6 and wkv7: side by side, and which documents they belong to."""

import jax.numpy as jnp


def padded(x_BxTx, n: int, C: int):
    """n chunks, of which the last one ends in zeros: tokens that change nothing. Masks in kernels would cost registers."""
    return jnp.pad(x_BxTx, [(0, 0), (0, n * C - x_BxTx.shape[1])] + [(0, 0)] * (x_BxTx.ndim - 2))


def side_by_side(x_BxTxHxN, n: int, C: int):
    """(B, H, n, C, N) in fp32."""
    B, _, H, N = x_BxTxHxN.shape
    return padded(x_BxTxHxN.astype(jnp.float32), n, C).reshape(B, n, C, H, N).transpose(0, 3, 1, 2, 4)


def masks(resets_BxT, n: int, C: int):
    """Which tokens of a chunk see each other, which see the state before it and which the one behind; (B, 1, n, C, .)."""
    if resets_BxT is None:
        return jnp.ones((C, C), bool), jnp.ones((C, 1), bool), jnp.ones((C, 1), bool)
    document = side_by_side(resets_BxT[..., None, None], n, C).cumsum(3)
    return document == document.swapaxes(3, 4), document == 0, document == document[..., -1:, :]


def document_counts(resets_BxL, C: int):
    """How many documents have begun in a token's chunk, with the token, for kernels."""
    return resets_BxL.reshape(len(resets_BxL), -1, C).cumsum(2, dtype=jnp.int32).reshape(resets_BxL.shape)


def documents(refs, outputs: int):
    """Of the last references that a kernel has: (that of document counts or None, those of the outputs)."""
    return (refs[0] if len(refs) > outputs else None), refs[-outputs:]
