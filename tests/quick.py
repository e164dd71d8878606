"""`jit` for tests of numbers: XLA:CPU compiles a tiny model in 1 s instead of 6 to 12 when it does not optimise."""

import functools

import jax
import numpy as np

UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = functools.partial(jax.jit, compiler_options=UNOPTIMISED)


def relative_error(got, want):
    """Largest difference, in units of the largest element wanted."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())
