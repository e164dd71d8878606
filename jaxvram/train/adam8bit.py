"""Adam whose moments are 8-bit codes: 2.03 bytes of state a parameter, not 8 (Dettmers et al. 2022, arXiv:2110.02861).

A moment is cut into blocks of 256 along the flattened array. A block is stored as its largest magnitude in fp32 and, for
each element, the index of the entry of a *dynamic map* that is nearest to element / magnitude. The map has seven decades;
each has twice as many entries as the one below, so small elements keep their size and large ones are precise.

Codes are computed, not looked up, and moments are computed twice: for their blocks' largest magnitudes, then for step and
codes. So the compiler makes two kernels of an array's update, in place, and no moment is ever in memory in fp32.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvram.kernels.dynamic_map import DECADES, dynamic_map

BLOCK = 256
SMALLEST = 4096  # elements; what has fewer stays in fp32, as in bitsandbytes


def _thresholds(signed: bool) -> np.ndarray:
    """Code c is the nearest to what lies above c of these 255 and not above the next."""
    values = dynamic_map(signed)
    middles = (values[:-1] + values[1:]) / np.float32(2)
    if not signed:
        # A second moment that was ever positive stays so. Rounded to 0 beside a first moment that was not, it would make
        # the next update as large as first moment / eps.
        middles[0] = np.finfo(np.float32).tiny
    return middles


THRESHOLDS = {signed: _thresholds(signed) for signed in (True, False)}


class ScaleByAdam8bitState(NamedTuple):
    """Trees like that of the parameters.

    Where the last axis is a multiple of 256, codes have the shape of their parameter and magnitudes that shape with the
    last axis divided by 256, so the rules of train/sharding.py cut them as they cut the parameter. Else both are flat.
    """

    count: jax.Array  # int32, updates so far
    mu: Any  # codes (uint8) of the first moment; of a small array the moment itself (fp32)
    mu_absmax: Any  # largest magnitude of each block (fp32); of a small array MaskedNode
    nu: Any  # likewise the second moment
    nu_absmax: Any


def scale_by_adam_8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """optax.scale_by_adam with its moments in 8 bits; updates are fp32 whatever the gradients are."""

    def init(params):
        type_of = lambda p: jnp.uint8 if _is_large(p) else jnp.float32
        moments = lambda: jax.tree.map(lambda p: jnp.zeros(_code_shape(p), type_of(p)), params)
        scales = lambda: jax.tree.map(
            lambda p: jnp.zeros(_absmax_shape(p), jnp.float32) if _is_large(p) else optax.MaskedNode(), params
        )
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), moments(), scales(), moments(), scales())

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        # 1 - b^count; as a difference it would lose five digits of 1 - 0.999.
        corrections = [-jnp.expm1(count * (math.log(b) if b else -math.inf)) for b in (b1, b2)]
        leaves, tree = jax.tree.flatten(grads)
        direction = lambda mu, nu: (mu / corrections[0]) / (jnp.sqrt(nu / corrections[1]) + eps)
        factors = tuple(map(jnp.float32, (b1, 1 - b1, b2, 1 - b2)))
        olds = zip(*(tree.flatten_up_to(part) for part in state[1:]), strict=True)

        def of_leaf(g, *old):
            large, g_xN = _is_large(g), (to_blocks(g) if _is_large(g) else g).astype(jnp.float32)

            def moments(mu, mu_absmax, nu, nu_absmax, factors=factors):
                if large:
                    mu, nu = dequantise(mu, mu_absmax, True), dequantise(nu, nu_absmax, False)
                keep_1, add_1, keep_2, add_2 = factors
                return keep_1 * mu + add_1 * g_xN, keep_2 * nu + add_2 * g_xN * g_xN

            mu_xN, nu_xN = moments(*old)
            if not large:
                return direction(mu_xN, nu_xN), mu_xN, old[1], nu_xN, old[3]
            absmax = tuple(jnp.abs(x_xN).max(-1) for x_xN in (mu_xN, nu_xN))

            def anew(*after):
                """Computed again, so that no fp32 is kept: to the compiler from other operands, or it would compute once."""
                operands, scalars, _ = jax.lax.optimization_barrier((old, factors, after))
                return moments(*operands, scalars)

            mu_xN, nu_xN = anew(*absmax)
            mu, nu = quantise(mu_xN, absmax[0], old[0].shape, True), quantise(nu_xN, absmax[1], old[2].shape, False)
            if old[0].size != g.size:  # one kernel writes arrays of one shape: the step is another's
                mu_xN, nu_xN = anew(absmax[0])
            step = direction(mu_xN, nu_xN).reshape(-1)[: g.size].reshape(g.shape)
            return step, mu, absmax[0], nu, absmax[1]

        done = [of_leaf(g, *old) for g, old in zip(leaves, olds, strict=True)]
        steps, *new = (tree.unflatten(part) for part in zip(*done, strict=True)) if done else (grads, *state[1:])
        return steps, ScaleByAdam8bitState(count, *new)

    return optax.GradientTransformation(init, update)


def quantise(x_xN, absmax, shape: tuple[int, ...], signed: bool):
    """Codes of this shape of blocks (..., 256), whose largest magnitudes are absmax."""
    # One division a block. Below the smallest normal number its inverse would overflow.
    return nearest_code(x_xN * (1 / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))[..., None], signed).reshape(shape)


def nearest_code(x, signed: bool):
    """uint8. By arithmetic: a search in a table is a dozen kernels with fp32 arrays between them."""
    thresholds, zero, decade_0 = THRESHOLDS[signed], 127 if signed else 0, 0 if signed else 1
    size = jnp.abs(x)
    # Codes counted from that of 0 (unsigned: from 1) are like floats: n = 2^decade to 2n - 1 are the parts of a decade.
    # Nowhere here or below is there a 0.0: XLA would merge it with the zeros in which gradients begin, and keep those.
    n, slope = 2.0**decade_0 / 2, 1.0
    for decade in range(DECADES):
        first = 2 ** (decade_0 + decade)
        above = size > float(thresholds[zero + first - 1 - decade_0])
        n = jnp.where(above, float(first), n)
        slope = jnp.where(above, first / 0.9 * 10.0 ** (DECADES - 1 - decade), slope)
    code = jnp.clip(jnp.floor(size * slope + n * (8 / 9)), n, 2 * n - 1) - decade_0
    code = zero + jnp.where(x < float(thresholds[zero - 1]), -code, code) if signed else code
    return (code + (x > float(thresholds[-1]))).astype(jnp.uint8)


def dequantise(codes, absmax, signed: bool):
    """Blocks (..., 256) in fp32."""
    return value(codes, signed).reshape(*absmax.shape, BLOCK) * absmax[..., None]


def value(codes, signed: bool):
    """dynamic_map(signed)[codes], but for rounding; by arithmetic, since XLA would keep what it looks up."""
    zero, decade_0 = (127, 0) if signed else (-1, 1)
    count = jnp.abs(codes.astype(jnp.float32) - zero)
    slope = 2.0**-20  # of code 0 alone; it gives 0 without rounding
    offset = -(decade_0 + 0.5) * slope
    for decade in range(DECADES):
        first, top = 2.0 ** (decade_0 + decade), 10.0 ** (decade - DECADES + 1)
        offset = jnp.where(count >= first, -0.8 * top, offset)
        slope = jnp.where(count >= first, 0.9 * top / first, slope)
    size = (count + 0.5) * slope + offset  # 0.1 + 0.9 (count - first + 0.5) / first of the decade's top
    size = jnp.where(codes < zero, -size, size) if signed else size
    return jnp.where(codes == 255, 1.0, size)


def to_blocks(x):
    """(..., 256); zeros fill up the last block."""
    if _even(x.shape):
        return x.reshape(*x.shape[:-1], -1, BLOCK)
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _is_large(p) -> bool:
    return p.size >= SMALLEST


def _even(shape: tuple[int, ...]) -> bool:
    return shape[-1] % BLOCK == 0


def _absmax_shape(p) -> tuple[int, ...]:
    return (*p.shape[:-1], p.shape[-1] // BLOCK) if _even(p.shape) else (-(-p.size // BLOCK),)


def _code_shape(p) -> tuple[int, ...]:
    return p.shape if not _is_large(p) or _even(p.shape) else (-(-p.size // BLOCK) * BLOCK,)
