"""Products of sorted rows with a matrix for each group: against a loop over groups, ragged sizes, the machine code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest
import quick

from jaxvram.kernels import grouped_matmul as kernel
from jaxvram.kernels.grouped_matmul_xla import tile_count, tiles
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

NAMES = {"grouped_matmul_forward", "grouped_matmul_transposed", "grouped_matmul_gradient"}
SIZES = {  # of groups: none, one row, several tiles, all in one
    "ragged": (37, 0, 1, 90, 5),
    "one group has all": (0, 70, 0),
    "tiles fit": (32, 64, 32, 0),
    "few rows": (1, 0, 0, 0, 2, 0, 0, 1),
}


def case(sizes, D=40, F=72):
    sizes_E = jnp.array(sizes, jnp.int32)

    def make(rng, dtype):
        shapes = (sum(sizes), D), (len(sizes), D, F)
        return tuple(jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in shapes)

    call = lambda implementation, x, w: kernel.grouped_matmul(x, w, sizes_E, implementation=implementation)
    return proof.Case(make, call, lambda x, w: kernel.grouped_matmul_reference(x, w, sizes_E))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_definition_is_a_loop_over_groups(sizes):
    x, w = case(sizes).make(np.random.RandomState(0), np.float32)
    ends = np.cumsum(sizes)
    of_group = zip(np.split(np.asarray(x, np.float64), ends[:-1]), np.asarray(w, np.float64), strict=True)
    parts = [rows @ matrix for rows, matrix in of_group]
    assert proof.rms_error(case(sizes).reference(x, w), np.concatenate(parts)) < 1e-6


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_equals_the_definition(sizes, implementation):
    proof.check_numerics(case(sizes), jnp.float32, implementation)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_bf16(implementation):
    proof.check_numerics(case(SIZES["ragged"]), jnp.bfloat16, implementation)


def test_under_jit_vmap_scan_and_remat():
    proof.check_transforms(case(SIZES["ragged"]))


def test_tiles_cover_every_row_once_and_cross_no_border():
    N, E, random = 100, 5, np.random.RandomState(0)
    for rows in (1, 8, 64):
        cut = quick.jit(functools.partial(tiles, N=N, rows=rows))
        for _ in range(5):
            sizes, covered = random.multinomial(N, random.dirichlet([0.3] * E)).astype(np.int32), []
            found, group_N = np.asarray(cut(sizes)), np.repeat(np.arange(E), sizes)
            assert len(found) == tile_count(N, E, rows)
            for group, first, end in found:
                mine = np.arange(first, min(first + rows, end))
                assert (group_N[mine] == group).all()
                covered += mine.tolist()
            assert covered == list(range(N))


def test_no_gradient_is_made_that_nobody_asks_for():
    """Frozen experts: x is not kept for them."""
    sizes = jnp.array(SIZES["ragged"], jnp.int32)
    x, w = case(SIZES["ragged"]).make(np.random.RandomState(0), jnp.float32)
    kept = lambda by: jax.eval_shape(
        lambda: jax.vjp(lambda y: kernel.grouped_matmul(*((y, w) if by == 0 else (x, y)), sizes), (x, w)[by])[1]
    )
    shapes = lambda by: {leaf.shape for leaf in jax.tree.leaves(kept(by))}
    assert x.shape not in shapes(0) and w.shape in shapes(0)
    assert x.shape in shapes(1) and w.shape not in shapes(1)


def test_what_makes_no_sense_is_told():
    x, w = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5))
    with pytest.raises(ValueError, match="do not belong together"):
        kernel.grouped_matmul(x, w, jnp.array([4]))
    with pytest.raises(ValueError, match="cast one"):
        kernel.grouped_matmul(x.astype(jnp.bfloat16), w, jnp.array([2, 2]))
    with pytest.raises(ValueError, match="'pallas' cannot be had: w: "):
        specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 2**15), (2**4, 2**15, 2**13))]
        product = functools.partial(kernel.grouped_matmul, implementation="pallas")
        jax.eval_shape(product, *specs, jax.ShapeDtypeStruct((2**4,), jnp.int32))


def code_of(N, D, F, E, dtype):
    spec = jax.ShapeDtypeStruct
    loss = lambda x, w, sizes: kernel.grouped_matmul(x, w, sizes).astype(jnp.float32).sum()
    return jax.value_and_grad(loss, (0, 1)), (spec((N, D), dtype), spec((E, D, F), dtype), spec((E,), jnp.int32))


SHAPES = {"grok": (16384, 768, 2048, 8), "odd": (1000, 200, 328, 5), "mixtral": (4096, 4096, 14336, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_machine_code(shape, card):
    proof.check_machine_code(*code_of(*SHAPES[shape], jnp.bfloat16), card, NAMES, True)


@pytest.mark.slow
def test_machine_code_in_fp32_and_for_few_rows():
    proof.check_machine_code(*code_of(500, 128, 256, 4, jnp.float32), "rtx4070", NAMES, False)
    fn, args = (lambda *a: kernel.grouped_matmul(*a)), code_of(2, 768, 2048, 8, jnp.bfloat16)[1]
    proof.check_machine_code(fn, args, "rtx4070", {"grouped_matmul_forward"}, True)


@pytest.mark.slow
def test_nothing_on_the_card_grows_with_the_number_of_experts():
    """As `jax.lax.ragged_dot` does: that it is spared is what the kernel is for."""
    temporary = {}
    for E in (4, 16):
        fn, args = code_of(2048, 256, 512, E, jnp.bfloat16)
        temporary[E] = compile_for(cards.find("rtx4070"), fn, args).temporary_bytes
        ragged = jax.grad(lambda x, w, s: jax.lax.ragged_dot(x, w, s).astype(jnp.float32).sum(), (0, 1))
        assert compile_for(cards.find("rtx4070"), ragged, args).temporary_bytes > 2 * E * 2048 * 512
    assert temporary[16] < temporary[4] + 4 * 12 * 256 * 512 + 2**20
