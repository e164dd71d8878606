"""Weights in bf16 that still learn: a sum is rounded up as often as it is nearer to the upper neighbour.

An update is mostly smaller than half the distance between two bf16 numbers (2^-9 of the weight), so rounding to the nearest
would leave the weight where it was. Rounded at random, its expected value is the sum itself, as without rounding.
"""

import jax
import jax.numpy as jnp


def apply_updates(params, updates, key):
    """params + updates, like optax.apply_updates; bf16 weights are rounded stochastically.

    Args:
      key: a key of this step alone; each leaf takes its own from it.
    """
    leaves, tree = jax.tree.flatten(params)

    def add(i, p, u):
        if p.dtype != jnp.bfloat16:
            return (p + u).astype(p.dtype)
        return to_bfloat16(p.astype(jnp.float32) + u.astype(jnp.float32), jax.random.fold_in(key, i))

    pairs = zip(leaves, tree.flatten_up_to(updates), strict=True)
    return tree.unflatten([add(i, p, u) for i, (p, u) in enumerate(pairs)])


def to_bfloat16(x, key):
    """fp32 -> one of the two bf16 neighbours, the nearer the likelier; what bf16 holds exactly stays, inf and NaN too."""
    # bf16 is the upper half of fp32, and magnitudes are ordered as their bits are: 16 random bits carry into the upper half
    # with a probability of lower half / 2^16. Beyond the largest number that makes infinity, as rounding does.
    random = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + random) >> 16
    rounded = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), x.astype(jnp.bfloat16), rounded)  # the carry could make a number of a NaN
