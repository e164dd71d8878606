"""Everything that knows of Pallas' Triton lowering: how a kernel is called, dispatched, read from and bounded.

Triton is the one Pallas path with tensor cores on Ada and Ampere in JAX 0.10 to 0.12; named through its compiler
parameters, it means the same in all three. It takes arrays whose sizes are powers of two, in every operation: kernels
read whole tiles, by `load` with a mask where a tile hangs over the edge.
"""

import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

IMPLEMENTATIONS = ("auto", "pallas", "xla", "interpret")
HIDDEN = -1e30  # a score or logit that does not count; not -inf: a row of nothing else stays finite
START = -1e29  # a running maximum before the first: far enough above HIDDEN that 2^(HIDDEN - START) is 0
LOG2_E = math.log2(math.e)  # kernels take powers of two, which the hardware has
LEAST_SHARED_MEMORY = 101_376  # bytes a block may have on sm_86, sm_89 and sm_120, the leanest of our cards

with warnings.catch_warnings():  # JAX >= 0.11 announces its end, and has no other for Ada yet
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton as pltriton

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work: rows and columns of its inner product's result, warps a block, loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


def call(kernel: Callable, *, grid, in_specs, out_specs, out_shape, tile: Tile, interpret: bool, name: str) -> Callable:
    """`pl.pallas_call` through Triton, or interpreted."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltriton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"pallas_{name}",  # so that a profile, and vram/ptx.py, know it as ours
    )


def choose(op: str, implementation: str, obstacle: str | None) -> str:
    """The implementation that runs: what was asked for, or 'xla' where 'auto' meets an obstacle (said once).

    Args:
      op: its name, for messages.
      implementation: auto | pallas | xla | interpret.
      obstacle: which argument the kernels don't take, and why; None: they take all.
    Raises:
      ValueError: the implementation is unknown, or was named and has an obstacle.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation={implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if obstacle is None or implementation == "xla":
        return implementation
    if implementation != "auto":
        raise ValueError(f"{op}: implementation={implementation!r} cannot be had: {obstacle}")
    _say_once(f"{op}: no kernel for this call, XLA computes it: {obstacle}")
    return "xla"


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def dispatch(implementation: str, kernel: Callable, xla: Callable, *arrays):
    """kernel(*arrays, interpret=...) or xla(*arrays), of equal results.

    'auto' leaves it to the lowering: a program lowered for CUDA holds the kernel alone, also when that happens on a machine
    without a GPU; any other platform gets XLA.
    """
    compiled = functools.partial(kernel, interpret=False)
    if implementation == "auto":
        return lax.platform_dependent(*arrays, cuda=compiled, default=xla)
    return {"pallas": compiled, "interpret": functools.partial(kernel, interpret=True), "xla": xla}[implementation](*arrays)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n; at least 16, which tensor cores ask for."""
    return max(16, 1 << (n - 1).bit_length())


def load(ref, *, mask=None):
    """What `ref` shows, 0 where the mask is false. No mask: all of it lies inside."""
    return pltriton.load(ref, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store(ref, value, *, mask=None) -> None:
    pltriton.store(ref, value.astype(ref.dtype), mask=mask)


def dot(a, b, *, trans_a=False, trans_b=False):
    """a . b with fp32 sums: on tensor cores in bf16; fp32 inputs are multiplied as fp32, and not as tf32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return pltriton.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)


def stages_that_fit(stage_bytes: int, fixed_bytes: int, stages: int) -> int:
    """The most loads in flight, up to `stages`, with which a block stays within LEAST_SHARED_MEMORY; at least one.

    Args:
      stage_bytes: of the tiles that a loop's round loads.
      fixed_bytes: of the tiles that stay.
    """
    return max(1, min(stages, (LEAST_SHARED_MEMORY - fixed_bytes) // max(stage_bytes, 1)))


def barrier() -> None:
    """All threads of a block have come here, and see what any of them wrote to memory. Interpret mode has none."""
    pltriton.debug_barrier()
