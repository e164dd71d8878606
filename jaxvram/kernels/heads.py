"""What wkv6.py and wkv7.py share: recurrences of heads, each with a state of values x keys, computed by chunks of tokens.

A module that computes one has `forward(*arrays, s_BxHxNxN, resets_BxT)` -> (y_BxTxHxN, the last state), and `backward` with
the gradients of those two as further arguments -> the gradients of all but the resets. That of the kernels takes `interpret`
as well and has HEADS, the sizes of heads that it takes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import backend

FEW = 16  # tokens below which 'auto' is XLA, which takes them one by one


def call(op, kernels, xla, arrays, multiplied, s_BxHxNxN, resets_BxT, implementation):
    """(y_BxTxHxN, the last state), differentiable in all but the resets. Kept for the backward pass are the inputs alone.

    Args:
      op: its name, for messages.
      kernels, xla: the modules.
      arrays: what they read beside state and resets, all that belongs together; the first is r_BxTxHxN.
      multiplied: name -> array, of those of which products are made in their dtype.
      s_BxHxNxN, resets_BxT, implementation: as wkv6 and wkv7 have them.
    """
    (B, T, H, N), dtype = arrays[0].shape, arrays[0].dtype
    check_shapes(op, s_BxHxNxN=(s_BxHxNxN, (B, H, N, N)), resets_BxT=(resets_BxT, (B, T)))
    s = None if s_BxHxNxN is None else jnp.asarray(s_BxHxNxN, jnp.float32)
    resets = None if resets_BxT is None else jnp.asarray(resets_BxT, bool)
    if implementation == "auto" and (T < FEW or dtype == jnp.float32):
        implementation = "xla"
    choice = backend.choose(op, implementation, _obstacle(implementation, kernels.HEADS, N, multiplied))
    return _call(choice, kernels, xla, arrays, s, resets)


def check_shapes(op, **wanted) -> None:
    """Raises a ValueError unless each (array or None, shape) has that shape."""
    for name, (array, shape) in wanted.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{op}: {name} is {jnp.shape(array)} and must be {shape}")


def _obstacle(implementation, heads, N, multiplied) -> str | None:
    """Why the kernels don't take a call. In fp32 they would be slow and spill; interpreted, they show that they're right."""
    dtypes = {x.dtype for x in multiplied.values()}
    if N not in heads:
        return f"a head of {N} is none of {', '.join(map(str, heads))}"
    if dtypes != {jnp.dtype(jnp.bfloat16)} and (implementation != "interpret" or dtypes != {jnp.dtype(jnp.float32)}):
        given = ", ".join(str(x.dtype) for x in multiplied.values())
        return f"{', '.join(multiplied)}: dtypes {given} are not all bfloat16"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _call(implementation, kernels, xla, arrays, s, resets):
    return _forward(implementation, kernels, xla, arrays, s, resets)[0]


def _settled(arrays, s):
    """The state in full. Made here, and not before: a state of zeros need not be kept."""
    B, _, H, N = arrays[0].shape
    return jnp.zeros((B, H, N, N), jnp.float32) if s is None else s


def _forward(implementation, kernels, xla, arrays, s, resets):
    full = (*arrays, _settled(arrays, s), resets)
    return backend.dispatch(implementation, kernels.forward, xla.forward, *full), (arrays, s, resets)


def _backward(implementation, kernels, xla, residuals, cotangents):
    arrays, s, resets = residuals
    full = (*arrays, _settled(arrays, s), resets, *cotangents)
    *gradients, ds = backend.dispatch(implementation, kernels.backward, xla.backward, *full)
    no_gradient = None if resets is None else np.zeros(resets.shape, jax.dtypes.float0)
    return tuple(gradients), None if s is None else ds, no_gradient


_call.defvjp(_forward, _backward)
