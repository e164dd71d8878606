"""Ternary weights: packing exact over every byte's codes and bit for bit Hugging Face's; the integers of a product exact in
every form of it; gradients straight through."""

import functools
import itertools

import golden_file
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import quick
from proof import CARDS, Case, check_machine_code, check_numerics, check_transforms

from jaxvram.kernels import bit_linear as bit_linear_file
from jaxvram.kernels import bit_linear_pallas, ternary
from jaxvram.kernels.bit_linear import (
    bit_linear,
    bit_linear_reference,
    integer_product,
    mixed,
    packed_linear,
    packed_product,
    quantize_rows,
)
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

STORAGE = ternary.STORAGE
shape_of = jax.ShapeDtypeStruct


def some_codes(F, D, seed=0):
    return np.random.RandomState(seed).randint(-1, 2, (F, D)).astype(np.int8)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("xp", [np, jnp])
def test_every_byte_comes_back(storage, xp):
    """All 3^4 (3^5) combinations of codes, one a column."""
    codes = np.array(list(itertools.product((-1, 0, 1), repeat=ternary.CODES[storage])), np.int8).T
    packed = ternary.pack(xp.asarray(codes), storage, xp)
    assert packed.shape == (1, 3 ** len(codes)) and packed.dtype == np.uint8
    assert len(set(np.asarray(packed)[0].tolist())) == 3 ** len(codes)
    np.testing.assert_array_equal(ternary.unpack(packed, len(codes), storage, xp), codes)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("F", [1, 3, 4, 5, 6, 17, 20])
def test_rows_that_fill_no_byte(storage, F):
    codes = some_codes(F, 7)
    packed = ternary.pack(codes, storage, np)
    assert packed.shape == (-(-F // ternary.CODES[storage]), 7)
    np.testing.assert_array_equal(ternary.unpack(packed, F, storage, np), codes)


@parity.needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("F", [5, 8, 12, 19])
def test_hugging_faces_bits(F):
    golden_file.quiet_torch()
    import torch
    from transformers.integrations import bitnet

    codes = some_codes(F, 6)
    theirs = bitnet.pack_weights(torch.tensor(codes).float())
    np.testing.assert_array_equal(ternary.pack(codes, "2bit", np), theirs.numpy())
    unpacked = bitnet.unpack_weights(theirs, torch.int8).numpy()
    np.testing.assert_array_equal(ternary.unpack(theirs.numpy(), F, "2bit", np), unpacked[:F])


def test_codes_are_the_definition():
    """Half of the scale goes to the even code, and what is nothing has a scale all the same."""
    w = np.array([[0.5, -0.5, 1.5, -1.5], [1.0, -1.0, 1.0, -1.0]], np.float32)  # mean |w| = 1
    for xp in (np, jnp):
        codes, scale = ternary.codes_of(xp.asarray(w), xp)
        assert scale == 1 and codes.dtype == np.int8
        np.testing.assert_array_equal(codes, [[0, 0, 1, -1], [1, -1, 1, -1]])
        codes, scale = ternary.codes_of(xp.zeros((2, 2), xp.float32), xp)
        assert not codes.any() and scale == np.float32(1e-5)


def test_codes_of_rows_are_the_definition():
    x = np.array([[127.0, 0.5, 1.5, -2.5, -127.0], [0, 0, 0, 0, 0]], np.float32)
    codes, worth = quantize_rows(x)
    np.testing.assert_array_equal(codes, [[127, 0, 2, -2, -127], [0] * 5])
    np.testing.assert_allclose(worth, [[1], [1e-5 / 127]], rtol=1e-6)


def test_what_does_not_belong_together():
    with pytest.raises(ValueError, match="not codes of -1, 0 and 1, but go from -1 to 2"):
        ternary.pack(np.array([[2, -1]], np.int8), "2bit", np)
    with pytest.raises(ValueError, match=r"x \(2, 8\) and \(2, 4\) bytes in 2bit do not belong to \(8, 8\) weights"):
        packed_linear(jnp.ones((2, 8)), jnp.zeros((2, 4), jnp.uint8), 1.0, 8, "2bit")
    with pytest.raises(ValueError, match=r"does not end in D=4"):
        bit_linear(jnp.ones((2, 8)), jnp.ones((8, 4)))


def test_two_ways_to_the_same_integers():
    """The largest sums there are: int32 and fp32 agree to the last one."""
    D = 4096
    a = np.full((2, D), -128, np.int8)
    a[1, ::2] = 127
    b = np.where(np.arange(D) % 3 == np.arange(3)[:, None], 1, -1).astype(np.int8)
    want = a.astype(np.int64) @ b.T.astype(np.int64)
    np.testing.assert_array_equal(integer_product(a, b), want)
    np.testing.assert_array_equal(bit_linear_file._in_integers(a, b), want)


def training_case(N, F, D, lead=()):
    """x and W without a number near a border between two codes, where fp32's last bit decides."""
    return Case(
        make=lambda random, dtype: (
            jnp.asarray(random.normal(size=(*lead, N, D)), dtype),
            jnp.asarray(random.choice([-1.7, -0.2, 0.1, 1.4], (F, D)) + random.uniform(-0.05, 0.05, (F, D)), dtype),
        ),
        call=lambda _, x, w: bit_linear(x, w),
        reference=bit_linear_reference,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(16, 32, 24), (5, 7, 33)], ids=str)
def test_training(shape, dtype):
    check_numerics(training_case(*shape), dtype)


def test_training_leading_axes_and_transforms():
    check_numerics(training_case(3, 10, 20, lead=(2,)), jnp.float32)
    check_transforms(training_case(3, 10, 20))


def numpys(x_NxD, w_FxD, g_NxF):
    """y, dx and dW in fp64, from the paper's text."""
    x, w, g = (a.astype(np.float64) for a in (x_NxD, w_FxD, g_NxF))
    i = 127 / np.maximum(np.abs(x).max(1, keepdims=True), 1e-5)
    q, s = np.clip(np.rint(x * i), -128, 127), max(np.abs(w).mean(), 1e-5)
    c = np.clip(np.rint(w / s), -1, 1)
    return (q @ c.T) * s / i, g @ (s * c), g.T @ (q / i)


def test_numpys_derivation():
    random = np.random.RandomState(3)
    x, w, g = (random.normal(size=shape).astype(np.float32) for shape in ((9, 40), (24, 40), (9, 24)))
    y, pull = jax.vjp(bit_linear, x, w)
    for got, want in zip((y, *pull(jnp.asarray(g))), numpys(x, w, g), strict=True):
        assert quick.relative_error(got, want) < 1e-6


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_mix_is_between_full_precision_and_ternary(mix):
    """And its gradient goes straight through at every point of the way."""
    random = np.random.RandomState(4)
    x, w = (random.normal(size=shape).astype(np.float32) for shape in ((3, 16), (8, 16)))
    (mixed_x, mixed_w), pull = jax.vjp(lambda x, w: mixed(x, w, mix), x, w)
    rounded = numpys(np.eye(16, dtype=np.float32), w, np.zeros((16, 8)))[0].T
    np.testing.assert_allclose(mixed_w, w + mix * (rounded - w), atol=1e-6)
    assert (np.abs(mixed_x - x).max() > 1e-4) == (mix > 0)
    for got in pull((jnp.ones_like(x), jnp.ones_like(w))):
        np.testing.assert_array_equal(got, np.ones(got.shape))
    if mix == 1:
        np.testing.assert_allclose(mixed_x @ mixed_w.T, bit_linear(x, w), atol=1e-5)


def test_backward_keeps_a_byte_a_number():
    """int8 codes and a scale a token; of W the parameter alone, also where a scan stacks what it keeps."""
    N, D, L = 32, 64, 3

    def layers(x, w_L):
        return jax.lax.scan(lambda x, w: (bit_linear(x, w), None), x, w_L)[0]

    kept = jax.eval_shape(
        lambda x, w: jax.vjp(layers, x, w)[1], shape_of((N, D), jnp.bfloat16), shape_of((L, D, D), jnp.float32)
    )
    sizes = sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(kept) if leaf.size)
    assert sizes == [((L, N, 1), "float32"), ((L, N, D), "int8"), ((L, D, D), "float32")]


def test_what_is_not_asked_for_is_not_kept():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    by_x = jax.eval_shape(lambda x: jax.vjp(lambda x: bit_linear(x, w), x)[1], x)
    by_w = jax.eval_shape(lambda w: jax.vjp(lambda w: bit_linear(x, w), w)[1], w)
    dtypes = lambda kept: sorted(str(leaf.dtype) for leaf in jax.tree.leaves(kept) if leaf.size)
    assert dtypes(by_x) == ["float32"] and dtypes(by_w) == ["float32", "int8"]


# rows and columns that fill a tile, one token, tiles that hang over every edge, several blocks of rows, a walk in parts
SHAPES = [(16, 640, 256), (1, 60, 64), (21, 70, 200), (100, 33, 130), (3, 260, 1100)]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_integers_are_exact(shape, storage):
    N, F, D = shape
    codes, x = some_codes(F, D), np.random.RandomState(1).randint(-128, 128, (N, D)).astype(np.int8)
    packed, want = ternary.pack(codes, storage, np), x.astype(np.int64) @ codes.T.astype(np.int64)
    for implementation in ("xla", "interpret"):
        run = jax.jit(functools.partial(packed_product, implementation, F, storage))
        np.testing.assert_array_equal(run(x, packed), want)


def test_walks_are_split():
    """Else the case above that is for it would not be."""
    assert bit_linear_pallas.plan(3, 65, 1100)[1] > 1 and bit_linear_pallas.plan(2048, 800, 3200)[1] == 1


def packed_case(N, F, D, storage):
    codes = some_codes(F, D)
    packed, scale = ternary.pack(codes, storage, np), jnp.float32(0.03)
    w_FxD = jnp.asarray(0.03 * codes.astype(np.float32))

    def reference(x_NxD):  # rounds x alone: W is what it is
        rounded = x_NxD + jax.lax.stop_gradient(mixed(x_NxD, w_FxD, 1.0)[0] - x_NxD)
        return jnp.dot(rounded, w_FxD.T, precision="highest")

    return Case(
        make=lambda random, dtype: (jnp.asarray(random.normal(size=(N, D)), dtype),),
        call=lambda implementation, x: packed_linear(x, packed, scale, F, storage, implementation),
        reference=reference,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("implementation", ["xla", "interpret", "auto"])
def test_packed_product_and_gradient(implementation, storage, dtype):
    check_numerics(packed_case(5, 41, 70, storage), dtype, implementation)


def test_packed_transforms():
    check_transforms(packed_case(5, 40, 64, "base3"))


def test_packed_is_what_was_trained():
    """Bit for bit: of the weights that bit_linear rounds, the codes and their scale give the same numbers."""
    random = np.random.RandomState(5)
    x, w = random.normal(size=(6, 48)).astype(np.float32), random.normal(size=(30, 48)).astype(np.float32)
    codes, scale = jax.jit(ternary.codes_of)(w)  # NumPy adds up in another order: the last bit of its mean is another
    want = jax.jit(bit_linear)(x, w)
    for storage in STORAGE:
        packed = ternary.pack(codes, storage)
        for implementation in ("xla", "interpret"):
            run = jax.jit(functools.partial(packed_linear, features=30, storage=storage, implementation=implementation))
            np.testing.assert_array_equal(run(x, packed, scale), want)


def test_packed_keeps_nothing_of_x():
    packed = jnp.zeros((16, 64), jnp.uint8)
    kept = jax.eval_shape(
        lambda x: jax.vjp(lambda x: packed_linear(x, packed, 1.0, 64, "2bit"), x)[1], shape_of((32, 64), jnp.bfloat16)
    )
    assert all(leaf.dtype == jnp.uint8 or leaf.size <= 1 for leaf in jax.tree.leaves(kept))


def test_rows_too_many_for_the_kernel_are_xlas():
    packed = jnp.zeros((16, 64), jnp.uint8)
    program = lambda rows: str(jax.make_jaxpr(lambda x: packed_linear(x, packed, 1.0, 64, "2bit"))(jnp.ones((rows, 64))))
    assert "pallas_call" in program(64) and "pallas_call" not in program(65)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rows", [1, 64])
def test_machine_code(card, storage, rows):
    """The way into the MLP of the 3B: of one token, and of 64."""
    F, D = 8640, 3200
    args = (
        shape_of((rows, D), jnp.bfloat16),
        shape_of((ternary.packed_rows(F, storage), D), jnp.uint8),
        shape_of((), jnp.float32),
    )
    run = functools.partial(packed_linear, features=F, storage=storage)
    check_machine_code(run, args, card, {f"packed_linear_{storage}"}, tensor_cores=True)


@pytest.mark.parametrize("card", CARDS)
def test_the_trained_product_is_of_integers(card):
    """In the program for a card, the forward product is of int8 with sums of int32, the two behind it of bf16."""
    args = shape_of((256, 128), jnp.bfloat16), shape_of((384, 128), jnp.float32)
    loss = lambda x, w: jnp.square(bit_linear(x, w).astype(jnp.float32)).sum()
    found = compile_for(cards.find(card), jax.value_and_grad(loss, (0, 1)), args).module.instructions
    dots = [(*(found[o].shape.dtype for o in i.operands), i.shape.dtype) for i in found.values() if i.opcode == "dot"]
    assert [dot for dot in dots if "s8" in dot] == [("s8", "s8", "s32")]
    assert [dot[:2] for dot in dots if "s8" not in dot] == [("bf16", "bf16")] * 2
