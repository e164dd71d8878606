"""For tests of numbers: a `jit` that compiles a tiny model in 1 s instead of 6 to 12, as XLA:CPU does not optimise in it."""

import functools
import re

import jax
import numpy as np

UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = functools.partial(jax.jit, compiler_options=UNOPTIMISED)


def relative_error(got, want):
    """Largest difference, in units of the largest element wanted."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape
    # `max` of several errors would pass over one that is not a number
    assert not np.isnan(got).any() and not np.isnan(want).any(), "not a number"
    return float(np.abs(got - want).max() / np.abs(want).max())


def shapes(program) -> set[tuple[int, ...]]:
    """Shapes of all floating-point arrays in the text of a jaxpr or of compiled HLO."""
    found = re.findall(r"\b(?:bf16|f16|f32|f64)\[([\d,]+)\]", str(program))
    return {tuple(int(n) for n in shape.strip(",").split(",")) for shape in found}
