"""Long sequences in segments, one after the other: what is made on the way is as large as that of a segment."""

import jax
import jax.numpy as jnp


def equal_segments(chunks: int, most: int) -> tuple[int, int]:
    """(chunks of a segment, number of segments), with `most` chunks in one at the most.

    Equal ones, if need be up to twice as many: for a shorter last one all arrays would be copied and padded.
    """
    least = -(-chunks // max(1, most))
    count = next((n for n in range(least, 2 * least) if chunks % n == 0), least)
    return -(-chunks // count), count


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


def walk_back(last_of, gradients_of, arrays, h, do_BxTxHxP, dh, L: int, count: int):
    """(gradients of the arrays, that of h). A first walk keeps the state before each segment.

    Args:
      last_of: (a segment's arrays, the state before it) -> the state behind it.
      gradients_of: (a segment's arrays, the state before it, its do, the gradient of the state behind it) ->
        (its gradients, the gradient of the state before it).
    """
    before = h[None]
    if count > 1:
        _, before = walk(lambda h, arrays, _: (last_of(arrays, h), h[:, None]), h, arrays, L, count)
        before = jnp.moveaxis(before, 1, 0)

    def step(dh, both, h):
        gradients, dh = gradients_of(both[0], h, both[1], dh)
        return dh, gradients

    dh, gradients = walk(step, dh, (arrays, do_BxTxHxP), L, count, before, reverse=True)
    return gradients, dh
