"""Floating-point operations of the matrix products in a traced program: what a step costs before anything runs."""

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_flops(closed: ClosedJaxpr) -> int:
    """2 M N K of every matrix product and convolution, times the length of the loops round it.

    Recomputation under remat is in the traced backward pass and so in the count. Of branches the most expensive counts; a
    `while` without a known number of turns counts once.
    """
    return _of(closed.jaxpr)


def _of(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(out) * math.prod(kernel) // out_channels
    inner = [_of(jaxpr) for jaxpr in _jaxprs_in(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "pallas_call":
        return math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int)) * sum(inner)
    return sum(inner)


def _jaxprs_in(params: dict):
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
        if isinstance(leaf, ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, Jaxpr):
            yield leaf
