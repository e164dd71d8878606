"""RWKV's token shift: a channel of a layer's input is partly that of the token before."""

import jax.numpy as jnp


def token_shift(x_BxTxD, last_BxD, resets_BxT):
    """(every token's predecessor less itself, the last token).

    Args:
      last_BxD: the token before the first; None: zeros.
      resets_BxT: bool; where true a document begins, and what comes before counts as zero.
    """
    before_BxTxD = jnp.pad(x_BxTxD[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if last_BxD is not None:
        before_BxTxD = before_BxTxD.at[:, 0].set(last_BxD)
    if resets_BxT is not None:
        before_BxTxD = jnp.where(resets_BxT[..., None], 0, before_BxTxD)
    return before_BxTxD - x_BxTxD, x_BxTxD[:, -1]


def mixture(x_BxTxD, delta_BxTxD, share_D):
    """Every channel with its share of the token before, of which `delta` is `token_shift`'s; in the dtype of x."""
    return (x_BxTxD + delta_BxTxD * share_D).astype(x_BxTxD.dtype)
