"""FLOPs of matrix products, counted by hand."""

import jax
import jax.numpy as jnp

from jaxvram.vram.flops import matmul_flops
from tests.vram.toy import spec


def count(fn, *args):
    return matmul_flops(jax.make_jaxpr(fn)(*args))


def test_products_and_batches_of_products():
    assert count(lambda a, b: a @ b, spec(3, 5), spec(5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), spec(4, 3, 5), spec(4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert count(lambda a: a + a, spec(3, 5)) == 0


def test_convolutions():
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME")
    assert count(convolve, spec(2, 3, 8, 8), spec(6, 3, 5, 5)) == 2 * (2 * 6 * 8 * 8) * 3 * 5 * 5


def test_a_scan_counts_every_turn_and_a_cond_its_dearest_branch():
    scanned = lambda x, w: jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0]
    assert count(scanned, spec(2, 5), spec(11, 5, 5)) == 11 * 2 * 2 * 5 * 5
    either = lambda p, x, w: jax.lax.cond(p, lambda: x @ w, lambda: x @ w @ w)
    assert count(either, spec(dtype=bool), spec(2, 5), spec(5, 5)) == 2 * (2 * 2 * 5 * 5)


def test_nested_jit_and_custom_derivatives_count():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    one = 2 * 2 * 5 * 5
    assert count(lambda x, w: jax.jit(product)(x, w), spec(2, 5), spec(5, 5)) == one
    gradients = jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1))
    assert count(gradients, spec(2, 5), spec(5, 5)) == 3 * one


def test_recomputation_under_remat_counts():
    layer = lambda x, w: jnp.tanh(jnp.tanh(x @ w[0]) @ w[1])
    loss = lambda layer: lambda x, w: jax.lax.scan(lambda c, w: (layer(c, w), None), x, w)[0].sum()
    args, one = (spec(8, 5), spec(6, 2, 5, 5)), 2 * 8 * 5 * 5
    plain = count(jax.grad(loss(layer), argnums=1), *args)
    remat = count(jax.grad(loss(jax.checkpoint(layer)), argnums=1), *args)
    assert plain == 6 * 2 * 3 * one  # forward; d x and d w backward
    assert remat == plain + 6 * 2 * one  # both products of a layer again
