"""Rows sorted by group, each group with a matrix of its own: y_n = x_n W_e, e the group of row n (arXiv:2211.15841).

Left to XLA for CUDA (`jax.lax.ragged_dot`, JAX 0.10), x is written out E times over, each copy zero outside of its group,
and all of it is multiplied by all matrices: 2 E N D bytes, E times the FLOPs; for the gradients 2 E N (D + F) bytes. Here
groups are cut into tiles of rows, none of which crosses a border, and a tile meets one matrix:

    tiles    ceil(size_e / R) of each group, at most N / R + E in all: that many programs, of which some may be idle
    forward  y = x W_e a tile;  dx = dy W_e^T likewise;  dW_e = sum over the rows of e of x_n^T dy_n, a program a tile of W_e

Bytes: x, W and y once each, but for tiles; backward keeps x, W and E numbers, and makes nothing but its results.
"""

import functools

import jax
import jax.numpy as jnp

from jaxvram.kernels import backend, grouped_matmul_pallas, grouped_matmul_xla


def grouped_matmul_reference(x_NxD, w_ExDxF, sizes_E):
    """The definition: every row times every matrix, of which one counts."""
    ends_E, row_N = jnp.cumsum(sizes_E), jnp.arange(x_NxD.shape[0])

    def add(y_NxF, of_group):
        w_DxF, end, size = of_group
        mine_N = (row_N >= end - size) & (row_N < end)
        return y_NxF + jnp.where(mine_N[:, None], x_NxD @ w_DxF, 0), None

    zeros = jnp.zeros((x_NxD.shape[0], w_ExDxF.shape[2]), x_NxD.dtype)
    return jax.lax.scan(add, zeros, (w_ExDxF, ends_E, sizes_E))[0]


def grouped_matmul(x_NxD, w_ExDxF, sizes_E, *, implementation: str = "auto"):
    """y_NxF in the dtype of x, sums in fp32.

    Args:
      x_NxD: rows, those of group 0 first, then those of group 1, ...
      w_ExDxF: a matrix for each group, in the dtype of x.
      sizes_E: int32, how many rows each group has; they add up to N, and may be 0.
      implementation: as `attention` has it.
    Raises:
      ValueError: shapes or dtypes that do not belong together, or a named implementation that does not take them.
    """
    (N, D), (E, inner, F) = x_NxD.shape, w_ExDxF.shape
    if inner != D or sizes_E.shape != (E,):
        raise ValueError(f"grouped_matmul: x {x_NxD.shape}, w {w_ExDxF.shape}, sizes {sizes_E.shape} do not belong together")
    if x_NxD.dtype != w_ExDxF.dtype:
        raise ValueError(f"grouped_matmul: x is {x_NxD.dtype} and w {w_ExDxF.dtype}; cast one")
    obstacle = None
    if x_NxD.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        obstacle = f"x: dtype {x_NxD.dtype} is not one of bfloat16, float16, float32"
    elif max(E * D * F, N * max(D, F)) >= 2**31:
        obstacle = f"w: {E} x {D} x {F} numbers, or {N} rows, are more than an int32 counts"
    choice = backend.choose("grouped_matmul", implementation, obstacle)
    return _grouped(choice, x_NxD, w_ExDxF, sizes_E.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(implementation, x_NxD, w_ExDxF, sizes_E):
    return _product(implementation, x_NxD, w_ExDxF, sizes_E, False)


def _product(implementation, x_NxD, w_ExDxF, sizes_E, transposed: bool):
    """x_n W_e, or x_n W_e^T."""
    modules = grouped_matmul_pallas, grouped_matmul_xla
    paths = (functools.partial(module.product, transposed=transposed) for module in modules)
    return backend.dispatch(implementation, *paths, x_NxD, w_ExDxF, sizes_E)


def _forward(implementation, x, w, sizes_E):
    """Keeps x for the gradient of W and W for that of x, each only where that gradient is asked for (layers/linear.py)."""
    kept = x.value if w.perturbed else None, w.value if x.perturbed else None, sizes_E.value
    return _grouped(implementation, x.value, w.value, sizes_E.value), kept


def _backward(implementation, residuals, dy_NxF):
    x_NxD, w_ExDxF, sizes_E = residuals
    if isinstance(dy_NxF, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    dx_NxD = dw_ExDxF = None
    if x_NxD is not None:
        paths = grouped_matmul_pallas.gradient, grouped_matmul_xla.gradient
        dw_ExDxF = backend.dispatch(implementation, *paths, x_NxD, dy_NxF, sizes_E)
    if w_ExDxF is not None:
        if dw_ExDxF is not None:  # first, after which x can go
            dw_ExDxF, dy_NxF = jax.lax.optimization_barrier((dw_ExDxF, dy_NxF))
        dx_NxD = _product(implementation, dy_NxF, w_ExDxF, sizes_E, True)
    return dx_NxD, dw_ExDxF, None


_grouped.defvjp(_forward, _backward, symbolic_zeros=True)
