"""The causal convolution as Pallas kernels: a program has a tile of tokens and channels, and reads its W shifted windows.

Neighbouring windows differ by a row, so that all but the first reading come from the cache. Backward makes what went into
silu again, and writes the gradient of that; the shifted sum that is left for the gradient of x is one fusion of XLA's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import Tile

TILE = Tile(16, 64, 4, 1)


class _Inputs:
    """x with its tail in front, and what tells documents apart, of one sequence and a tile of channels."""

    def __init__(self, x_ref, tail_ref, seen_ref, columns, W: int):
        self.x_ref, self.tail_ref, self.seen_ref, self.columns, self.W = x_ref, tail_ref, seen_ref, columns, W
        (self.T, self.E), self.V = x_ref.shape, W - 1

    def at(self, ref, rows, inside):
        """Rows of ref, one by one; those that don't count point to the first."""
        columns = jnp.where(self.columns < self.E, self.columns, 0)[None, :]
        mask = inside[:, None] & (self.columns < self.E)[None, :]
        return backend.load(ref.at[jnp.where(inside, rows, 0)[:, None], columns], mask=mask)

    def _document(self, rows):
        inside = (rows >= -self.V) & (rows < self.T)
        return backend.load(self.seen_ref.at[jnp.where(inside, rows + self.V, 0)], mask=inside)

    def window(self, tokens, w: int):
        """The input that kernel_w meets at each token, fp32; 0 where there is none, or it is of another document."""
        rows = tokens - self.V + w
        x = self.at(self.x_ref, rows, (rows >= 0) & (rows < self.T)).astype(jnp.float32)
        x += self.at(self.tail_ref, rows + self.V, (rows < 0) & (rows >= -self.V)).astype(jnp.float32)
        if self.seen_ref is None or w == self.V:
            return x
        return jnp.where((self._document(rows) == self._document(tokens))[:, None], x, 0.0)


def _before_silu(inputs: _Inputs, tokens, kernel, bias):
    return sum(inputs.window(tokens, w) * kernel[w] for w in range(inputs.W)) + bias


def _parameters(kernel_ref, bias_ref, at, columns, W: int):
    """Rows of one, fp32."""
    inside = (columns < bias_ref.shape[1])[None, :]
    row = lambda ref, w: backend.load(ref.at[pl.ds(w, 1), at], mask=inside).astype(jnp.float32)
    return [row(kernel_ref, w) for w in range(W)], row(bias_ref, 0)


def _split(refs, documents: bool):
    return (refs[0], refs[1:]) if documents else (None, refs)


def _forward_kernel(x_ref, tail_ref, kernel_ref, bias_ref, *refs, W, documents):
    seen_ref, (y_ref,) = _split(refs, documents)
    slices, (tokens, columns) = _place()
    kernel, bias = _parameters(kernel_ref, bias_ref, slices[1], columns, W)
    c = _before_silu(_Inputs(x_ref, tail_ref, seen_ref, columns, W), tokens, kernel, bias)
    _store(y_ref, slices, (tokens, columns), jax.nn.silu(c))


def _place():
    """(slices, indices) of this program's tokens and channels."""
    start, first = pl.program_id(1) * TILE.rows, pl.program_id(2) * TILE.columns
    slices = pl.ds(start, TILE.rows), pl.ds(first, TILE.columns)
    return slices, (start + jnp.arange(TILE.rows), first + jnp.arange(TILE.columns))


def _store(ref, slices, indices, value):
    rows, columns = indices
    mask = (rows < ref.shape[0])[:, None] & (columns < ref.shape[1])[None, :]
    backend.store(ref.at[slices], value, mask=mask)


def _backward_kernel(x_ref, tail_ref, kernel_ref, bias_ref, dy_ref, *refs, W, documents):
    seen_ref, (dc_ref, sums_ref) = _split(refs, documents)
    slices, (tokens, columns) = _place()
    kernel, bias = _parameters(kernel_ref, bias_ref, slices[1], columns, W)
    inputs = _Inputs(x_ref, tail_ref, seen_ref, columns, W)
    c = _before_silu(inputs, tokens, kernel, bias)
    s = jax.nn.sigmoid(c)
    dc = inputs.at(dy_ref, tokens, tokens < inputs.T).astype(jnp.float32) * s * (1 + c * (1 - s))
    _store(dc_ref, slices, (tokens, columns), dc)
    inside = (columns < inputs.E)[None, :]
    products = (dc * inputs.window(tokens, w) if w < W else dc for w in range(W + 1))
    for w, product in enumerate(products):
        backend.store(sums_ref.at[pl.ds(w, 1), slices[1]], product.sum(axis=0)[None, :], mask=inside)


def _call(kernel, name, x_BxTxE, tail, kernel_WxE, bias_E, seen, more, out_specs, out_shape, interpret):
    B, T, E = x_BxTxE.shape
    row = lambda a: pl.BlockSpec((None, *a.shape[1:]), lambda b, t, e: (b,) + (0,) * (a.ndim - 1))
    whole = lambda a: pl.BlockSpec(a.shape, lambda b, t, e: (0,) * a.ndim)
    arrays = [x_BxTxE, tail, kernel_WxE, bias_E[None], *more] + ([] if seen is None else [seen])
    specs = [row(x_BxTxE), row(tail), whole(kernel_WxE), whole(bias_E[None]), *map(row, arrays[4:])]
    return backend.call(
        functools.partial(kernel, W=kernel_WxE.shape[0], documents=seen is not None),
        grid=(B, pl.cdiv(T, TILE.rows), pl.cdiv(E, TILE.columns)), in_specs=specs, out_specs=out_specs,
        out_shape=out_shape, tile=TILE, interpret=interpret, name=f"causal_conv_{name}",
    )(*arrays)  # fmt: skip


def forward(x_BxTxE, tail_BxVxE, kernel_WxE, bias_E, seen_BxVT, *, interpret: bool):
    """y_BxTxE in the dtype of x."""
    _, T, E = x_BxTxE.shape
    out = pl.BlockSpec((None, T, E), lambda b, t, e: (b, 0, 0))
    shape = jax.ShapeDtypeStruct(x_BxTxE.shape, x_BxTxE.dtype)
    return _call(
        _forward_kernel, "forward", x_BxTxE, tail_BxVxE, kernel_WxE, bias_E, seen_BxVT, [], out, shape, interpret
    )


def backward(x_BxTxE, tail_BxVxE, kernel_WxE, bias_E, seen_BxVT, dy_BxTxE, *, interpret: bool):
    """(gradient of what went into silu in the dtype of x, dkernel, dbias). Tokens are summed by tile, tiles by XLA."""
    (B, T, E), W = x_BxTxE.shape, kernel_WxE.shape[0]
    tiles = pl.cdiv(T, TILE.rows)
    specs = [
        pl.BlockSpec((None, T, E), lambda b, t, e: (b, 0, 0)),
        pl.BlockSpec((None, None, W + 1, E), lambda b, t, e: (b, t, 0, 0)),
    ]
    shapes = [
        jax.ShapeDtypeStruct(x_BxTxE.shape, x_BxTxE.dtype),
        jax.ShapeDtypeStruct((B, tiles, W + 1, E), jnp.float32),
    ]
    dc, sums = _call(
        _backward_kernel, "backward", x_BxTxE, tail_BxVxE, kernel_WxE, bias_E, seen_BxVT, [dy_BxTxE], specs, shapes,
        interpret,
    )  # fmt: skip
    sums = sums.sum((0, 1))
    return dc, sums[:W].astype(kernel_WxE.dtype), sums[W].astype(bias_E.dtype)
