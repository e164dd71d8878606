"""Weights of four bits, bit for bit as bitsandbytes has them, and products with them (QLoRA, arXiv:2305.14314).

  w_i = VALUES[code_i] absmax_{i // 64};  absmax_j = MAP[absmax code_j] scale_{j // 256} + offset;  y = x W^T, dx = dy W

64 weights in a row of the flattened (out, in) array share an absmax, 256 of those a scale: 4 + 8 / 64 + 32 / 16384 = 4.127
bits, 0.516 bytes, a weight. Kept for the backward pass are these alone: not x (the codes are not trained), not W.

Bytes that a product of N rows moves, for a weight: XLA's path reads the codes, writes W in the dtype of x and reads it for
the product: 0.516 + 2 + 2 = 4.52 in bf16. The kernel decodes on chip: half a byte of codes for every block of rows, and the
absmax, which XLA decodes before (a table of 256 is no register's), written once and read as often: 0.016 + 0.063 + blocks
(0.5 + 0.063), with what x, y and partial sums add (`_bytes`). 'auto' is the kernel if that is fewer and one block holds all
rows, as in decoding: every other block would decode again, some 20 instructions a weight, and not wait for the bus.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxvram.kernels import backend, nf4_pallas
from jaxvram.kernels.dynamic_map import dynamic_map

BLOCK, GROUP = 64, 256  # weights to an absmax, these to a scale
VALUES = np.array(nf4_pallas.VALUES, np.float32)
BOUNDS = (VALUES[:-1] + VALUES[1:]) / np.float32(2)  # a weight on a bound gets the lower code
CHUNK = 1 << 18  # weights that NumPy quantises at a time
TINY = np.finfo(np.float32).tiny  # 1 / this is finite


class NF4(flax.struct.PyTreeNode):
    """A quantised W_FxD; `abstract` has the sizes. Leaves may be stacked along a first axis, of layers."""

    codes: jax.Array  # uint8, two a byte, the first in the high nibble
    absmax: jax.Array  # uint8, codes of MAP
    scales: jax.Array  # fp32, of GROUP absmax each
    offset: jax.Array  # fp32, (): the mean absmax


def abstract(shape: tuple[int, ...]) -> NF4:
    """What `quantize` gives for an array of this shape, as shapes and dtypes."""
    count = math.prod(shape)
    if count % 2 or not count:
        raise ValueError(f"nf4: an array of shape {shape} has an odd number of weights, or none; two share a byte")
    blocks = -(-count // BLOCK)
    spec = jax.ShapeDtypeStruct
    return NF4(
        spec((count // 2,), jnp.uint8), spec((blocks,), jnp.uint8), spec((-(-blocks // GROUP),), jnp.float32),
        spec((), jnp.float32),
    )  # fmt: skip


MAP = dynamic_map(signed=True)
# On a CPU bitsandbytes looks a value's code up by its place on a grid of 2^16, not by the value itself.
GRID = np.float32(-1) + np.float32(2) * np.arange(1 << 16, dtype=np.float32) / np.float32((1 << 16) - 1)
CODE_AT = np.searchsorted((MAP[:-1] + MAP[1:]) / np.float32(2), GRID).astype(np.uint8)


def quantize(w_FxD, xp=jnp) -> NF4:
    """The NF4 of an array: codes, scales and offset bit for bit as bitsandbytes 0.50 makes them on a CPU.

    Where PyTorch adds the mean of 32,768 absmax or more on several cores (torch.set_num_threads), its last bit is another.

    Args:
      w_FxD: of any floating dtype. Row-major whatever its strides.
      xp: `jnp`, or `np` for hosts: the same bits, a few rows at a time, so that memory beside w is small.
    Raises:
      ValueError: an odd number of weights.
    """
    abstract(w_FxD.shape)
    pieces = [w_FxD] if xp is jnp else _pieces(w_FxD)
    codes, absmax = zip(*(_codes(xp.asarray(piece).reshape(-1).astype(xp.float32), xp) for piece in pieces), strict=True)
    absmax = xp.concatenate(absmax)
    offset = _mean_as_torch(absmax, xp)
    absmax_codes, scales = _dynamic_codes(absmax - offset, xp)
    return NF4(xp.concatenate(codes), absmax_codes, scales, offset)


def _pieces(w):
    """Whole rows of w, whole blocks of weights (but at the end), about CHUNK weights."""
    width = math.prod(w.shape[1:])
    unit = BLOCK // math.gcd(BLOCK, width)
    rows = unit * max(1, CHUNK // (unit * width))
    return (w[start : start + rows] for start in range(0, w.shape[0], rows))


def _codes(w, xp):
    """(packed codes, absmax) of a flat fp32 array. bitsandbytes divides in the last, shorter block, and only there."""
    full = w.size - w.size % BLOCK
    blocks, rest = w[:full].reshape(-1, BLOCK), w[full:]
    absmax = xp.abs(blocks).max(axis=1)
    scaled = (blocks * (1 / xp.maximum(absmax, TINY))[:, None]).reshape(-1)
    if rest.size:
        last = xp.abs(rest).max()
        scaled = xp.concatenate([scaled, _divide(rest, xp.maximum(last, TINY), xp)])
        absmax = xp.concatenate([absmax, last[None]])
    codes = xp.zeros(scaled.shape, xp.uint8)
    for bound in BOUNDS:
        codes = codes + (scaled > bound)
    return (codes[::2] << 4) | codes[1::2], absmax


def _dynamic_codes(x, xp):
    """(codes of MAP, scales) of a flat fp32 array; codes of a group of zeros are 0."""
    groups = xp.pad(x, (0, -x.size % GROUP)).reshape(-1, GROUP)
    scales = xp.abs(groups).max(axis=1)
    scaled = xp.clip(groups * (1 / xp.where(scales == 0, 1, scales))[:, None], -1, 1)
    place = (scaled + 1) * np.float32(0.5) * np.float32((1 << 16) - 1) + np.float32(0.5)  # an FMA changes no code
    codes = xp.asarray(CODE_AT)[place.astype(xp.int32)]
    return xp.where((scales == 0)[:, None], xp.uint8(0), codes).reshape(-1)[: x.size], scales


def _mean_as_torch(x, xp):
    """With PyTorch's order of additions on one core, on which the last bit of the mean, and so every value, depends.

    32 running sums side by side, each in a cascade of four levels: 16 of one are one of the next (from 16 million on, more).
    """
    lanes, rows = (8 if x.size >= 8 else 1), 4
    wide = x.size // (lanes * rows)
    at_NxL = x[: wide * lanes * rows].reshape(wide, lanes * rows)
    levels = []
    for _ in range(3):
        whole = len(at_NxL) // 16 * 16
        levels.append(_running_sum(at_NxL[whole:], xp))
        at_NxL = _running_sum(at_NxL[:whole].reshape(-1, 16, lanes * rows).swapaxes(0, 1), xp)
    levels.append(_running_sum(at_NxL, xp))
    first, *others = functools.reduce(xp.add, levels).reshape(rows, lanes)
    rest = x[wide * lanes * rows :]
    vectors, scalars = rest[: rest.size // lanes * lanes].reshape(-1, lanes), rest[rest.size // lanes * lanes :]
    sums = functools.reduce(xp.add, [first, *vectors, *others])
    return _divide(functools.reduce(xp.add, [xp.float32(0), *scalars, *sums]), np.float32(x.size), xp)


def _divide(x, y, xp):
    """x / y, rounded once: where XLA sees that y is one number, it multiplies by the inverse of that."""
    return x / (lax.optimization_barrier(jnp.broadcast_to(y, x.shape)) if xp is jnp else y)


def _running_sum(x, xp):
    """Over the first axis, one after the other."""
    return functools.reduce(xp.add, x, xp.zeros(x.shape[1:], xp.float32))


def decode_absmax(nf4: NF4):
    """The absmax of every block, fp32."""
    blocks, groups = nf4.absmax.size, nf4.scales.size
    scales = jnp.broadcast_to(nf4.scales[:, None], (groups, GROUP)).reshape(-1)[:blocks]
    scaled = jnp.asarray(MAP)[nf4.absmax] * scales
    # |MAP| <= 1, so this changes nothing; but it stands between product and sum, which one FMA would round otherwise
    return jnp.clip(scaled, -scales, scales) + nf4.offset


def _values(codes):
    """fp32 VALUES of the last four bits of int32 codes: a choice a bit, between the bits of two floats.

    Not jnp.where: it makes arrays of its constants, and those, the same in every layer, scan would make before its loop
    and keep for the backward pass. Nor a table: XLA's gather is slower than its arithmetic.
    """
    level = [int(bits) for bits in VALUES.view(np.int32)]
    for bit in range(4):
        mask = -((codes >> bit) & 1)
        level = [(mask & (low ^ high)) ^ low for low, high in zip(level[::2], level[1::2], strict=True)]
    return lax.bitcast_convert_type(level[0], jnp.float32)


def dequantize(nf4: NF4, shape: tuple[int, ...], dtype):
    """The array; in fp32 equal to bitsandbytes' bit for bit, in another dtype that rounded."""
    if abstract(shape) != jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), nf4):
        raise ValueError(f"nf4: these leaves are not of an array of shape {shape}: {jax.tree.map(jnp.shape, nf4)}")
    # Two nibbles by a shift along an axis of two, not by a stack: XLA would write down what it stacks, in fp32.
    codes = nf4.codes.astype(jnp.int32)[:, None] >> jnp.array([4, 0])
    values, absmax = _values(codes).reshape(-1), decode_absmax(nf4)
    if values.size % BLOCK:
        each = jnp.broadcast_to(absmax[:, None], (absmax.size, BLOCK)).reshape(-1)[: values.size]
        return (values * each).reshape(shape).astype(dtype)
    return (values.reshape(-1, BLOCK) * absmax[:, None]).reshape(shape).astype(dtype)


def nf4_linear_reference(x_xD, nf4: NF4, features: int):
    """The definition, in fp32."""
    w_FxD = dequantize(nf4, (features, x_xD.shape[-1]), jnp.float32)
    return jnp.einsum("...d,fd->...f", x_xD.astype(jnp.float32), w_FxD, precision=lax.Precision.HIGHEST)


def nf4_linear(x_xD, nf4: NF4, features: int, implementation="auto"):
    """x W^T with fp32 sums, W rounded to the dtype of x. Differentiable by x; codes, scales and offset are constants.

    Args:
      x_xD: bf16 or fp32, any leading axes.
      nf4: of W_FxD.
      features: F.
      implementation: 'auto': a Pallas kernel where lowered for CUDA and where it moves fewer bytes, else XLA; 'pallas',
        'xla' or 'interpret': that one. Kernels take D in multiples of 64, a block of one absmax in one row.
    Returns:
      y_xF in the dtype of x
    """
    D = x_xD.shape[-1]
    if nf4.codes.shape != (features * D // 2,) or features * D % 2:
        shapes = f"x {x_xD.shape} and {nf4.codes.shape} codes"
        raise ValueError(f"nf4_linear: {shapes} do not belong to ({features}, {D}) weights")
    obstacle = None if D % BLOCK == 0 else f"D={D} is not a multiple of {BLOCK}"
    choice = backend.choose("nf4_linear", implementation, obstacle)
    x_NxD = x_xD.reshape(-1, D)
    if choice == "auto" and not kernel_moves_less(x_NxD.shape[0], features, D, x_xD.dtype.itemsize):
        choice = "xla"
    return _linear(choice, features, x_NxD, nf4).reshape(*x_xD.shape[:-1], features)


def kernel_moves_less(N: int, F: int, D: int, itemsize: int) -> bool:
    """Whether 'auto' is the kernel: fewer bytes forward, with one block of rows."""
    by_kernel, by_xla = _bytes(N, F, D, itemsize)
    return N <= nf4_pallas.MOST_ROWS and by_kernel < by_xla


def _bytes(N: int, F: int, D: int, itemsize: int) -> tuple[int, int]:
    """(by the kernel, by XLA): bytes that y = x W^T moves."""
    codes, absmax, x, y = F * D // 2, F * D // BLOCK, N * D * itemsize, N * F * itemsize
    tile, splits = nf4_pallas.forward_plan(N, F, D, itemsize)
    blocks = -(-N // tile.rows)
    partial_sums = 2 * 4 * N * F * splits if splits > 1 else 0
    weights = absmax + 4 * absmax + blocks * (codes + 4 * absmax)
    return weights + 3 * x + partial_sums + y, codes + absmax + 2 * F * D * itemsize + x + y  # 3: x is parted before


def _xla_forward(features, x_NxD, nf4):
    w_FxD = dequantize(nf4, (features, x_NxD.shape[1]), x_NxD.dtype)
    return lax.dot_general(x_NxD, w_FxD, (((1,), (1,)), ((), ())))


def _xla_backward(features, dy_NxF, nf4):
    w_FxD = dequantize(nf4, (features, 2 * nf4.codes.size // features), dy_NxF.dtype)
    return dy_NxF @ w_FxD


def _kernel(of, features):
    def run(rows, nf4, *, interpret):
        return of(rows, nf4.codes.reshape(features, -1), decode_absmax(nf4).reshape(features, -1), interpret=interpret)

    return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(implementation, features, x_NxD, nf4):
    xla = functools.partial(_xla_forward, features)
    return backend.dispatch(implementation, _kernel(nf4_pallas.forward, features), xla, x_NxD, nf4)


def _forward(implementation, features, x_NxD, nf4):
    return _linear(implementation, features, x_NxD, nf4), nf4


def _backward(implementation, features, nf4, dy_NxF):
    # Without it, XLA would find W made twice, and keep the forward pass's until now.
    nf4, dy_NxF = lax.optimization_barrier((nf4, dy_NxF))
    xla = functools.partial(_xla_backward, features)
    dx_NxD = backend.dispatch(implementation, _kernel(nf4_pallas.backward, features), xla, dy_NxF, nf4)
    return dx_NxD, None


_linear.defvjp(_forward, _backward)
