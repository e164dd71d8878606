"""Time in segments, one after the other: what keeps the XLA forms of recurrences from having all of it in memory at once."""

import jax
import jax.numpy as jnp


def walk(step, carry, arrays, L: int, count: int, extra=None, reverse=False):
    """scan of step(carry, the arrays' segment of L tokens, extra's entry) over the segments; results end to end."""
    T = jax.tree.leaves(arrays)[0].shape[1]
    if count == 1:
        return step(carry, arrays, None if extra is None else extra[0])
    pad = lambda x: jnp.pad(x, [(0, 0), (0, L * count - T)] + [(0, 0)] * (x.ndim - 2))
    arrays = jax.tree.map(pad, arrays)

    def of_segment(carry, this):
        i, extra = this
        return step(carry, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * L, L, 1), arrays), extra)

    carry, ys = jax.lax.scan(of_segment, carry, (jnp.arange(count), extra), reverse=reverse)
    return carry, jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :T], ys)
