"""NF4: bit for bit what bitsandbytes makes, by golden file always, live where installed; products with it, and gradients."""

import functools
import importlib.util
import tracemalloc

import jax
import jax.numpy as jnp
import make_nf4
import numpy as np
import pytest
import quick
from proof import CARDS, Case, check_machine_code, check_numerics, check_transforms, rms_error

from jaxvram.kernels import nf4, nf4_pallas
from jaxvram.kernels.nf4 import dequantize, nf4_linear, nf4_linear_reference, quantize
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

PARTS = ("codes", "absmax", "scales", "offset")


@functools.cache
def golden():
    return dict(np.load(make_nf4.FILE))


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_array_equal(got, want)


def in_numpy(w):
    return quantize(w, np)


@pytest.mark.parametrize("quantizer", [in_numpy, jax.jit(quantize)], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", make_nf4.SHAPES)
def test_golden(name, quantizer):
    w = make_nf4.array(name)
    got = quantizer(w)
    for part in PARTS:
        same_bits(getattr(got, part), golden()[f"{name}/{part}"])
    values = jax.jit(lambda q: dequantize(q, w.shape, jnp.float32))(got)
    same_bits(values, golden()[f"{name}/values"])


@pytest.mark.parametrize("xp", [np, jnp])
def test_golden_of_the_8_bit_map(xp):
    convert = functools.partial(nf4._dynamic_codes, xp=xp)
    codes, scales = (jax.jit(convert) if xp is jnp else convert)(make_nf4.groups().reshape(-1))
    same_bits(np.reshape(codes, (-1, 256)), golden()["groups/codes"])
    same_bits(scales, golden()["groups/scales"])


@pytest.mark.parametrize("length", make_nf4.LENGTHS)
def test_golden_means(length):
    """Plain sums, or another order, are off by a bit in about every other."""
    want = golden()["means"][make_nf4.LENGTHS.index(length)]
    x = make_nf4.addends(length)
    same_bits(nf4._mean_as_torch(x, np), want)
    same_bits(jax.jit(lambda x: nf4._mean_as_torch(x, jnp))(x), want)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
def test_live():
    """The golden file is what its script makes; and a larger array, of more than one of NumPy's pieces, is equal too."""
    live = make_nf4.oracle()
    assert live.keys() == golden().keys()
    for name, value in live.items():
        same_bits(value, golden()[name])
    import bitsandbytes.functional as bnb
    import torch

    w = np.random.RandomState(5).normal(0, 0.03, (2200, 1010)).astype(np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, the mean of so many blocks is added up in another order
    codes, state = bnb.quantize_4bit(torch.tensor(w), blocksize=64, quant_type="nf4", compress_statistics=True)
    torch.set_num_threads(threads)
    mine = in_numpy(w)
    for got, want in zip(
        (mine.codes, mine.absmax, mine.scales, mine.offset, dequantize(mine, w.shape, jnp.float32)),
        (codes.squeeze(-1), state.absmax, state.state2.absmax, state.offset, bnb.dequantize_4bit(codes, state)),
        strict=True,
    ):
        same_bits(got, want.numpy())


def test_bfloat16_is_the_fp32_value_rounded():
    q = in_numpy(make_nf4.array("two_scales"))
    shape = make_nf4.SHAPES["two_scales"]
    same_bits(dequantize(q, shape, jnp.bfloat16), dequantize(q, shape, jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(640, 576), (1500, 100)])
def test_numpy_in_pieces(shape, monkeypatch):
    """Pieces are whole blocks, whatever the rows' length; a transposed array is read as its shape says, and not copied."""
    monkeypatch.setattr(nf4, "CHUNK", 1 << 14)
    w = np.random.RandomState(2).normal(size=shape[::-1]).astype(np.float32).T
    want = quantize(jnp.asarray(w))
    tracemalloc.start()
    got = in_numpy(w)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    jax.tree.map(same_bits, got, want)
    assert peak < 0.6 * w.nbytes


def test_sizes():
    """4.127 bits a weight."""
    spec = nf4.abstract((4096, 11008))
    bits = sum(8 * x.size * x.dtype.itemsize for x in jax.tree.leaves(spec)) / (4096 * 11008)
    assert bits == pytest.approx(4.12695, abs=1e-4)
    got = in_numpy(make_nf4.array("two_scales"))
    assert nf4.abstract((140, 130)) == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), got)


def test_what_does_not_belong_together():
    with pytest.raises(ValueError, match=r"shape \(3, 5\) has an odd number of weights"):
        in_numpy(np.ones((3, 5), np.float32))
    q = in_numpy(np.ones((4, 32), np.float32))
    with pytest.raises(ValueError, match=r"not of an array of shape \(4, 64\)"):
        dequantize(q, (4, 64), jnp.float32)
    with pytest.raises(ValueError, match=r"x \(2, 64\) and \(64,\) codes do not belong to \(4, 64\) weights"):
        nf4_linear(jnp.ones((2, 64)), q, 4)
    with pytest.raises(ValueError, match="'pallas' cannot be had: D=32 is not a multiple of 64"):
        nf4_linear(jnp.ones((2, 32)), q, 4, implementation="pallas")


def case(N, F, D, lead=()):
    w = np.random.RandomState(3).normal(0, D**-0.5, (F, D)).astype(np.float32)
    q = in_numpy(w)
    return Case(
        make=lambda random, dtype: (jnp.asarray(random.normal(size=(*lead, N, D)), dtype),),
        call=lambda implementation, x: nf4_linear(x, q, F, implementation=implementation),
        reference=lambda x: nf4_linear_reference(x, q, F),
    )


# whole tiles; one row; rows, columns and D that end within a tile; several blocks of rows; a walk in parts
SHAPES = [(16, 64, 128), (1, 40, 64), (21, 70, 320), (150, 33, 192), (3, 600, 1024)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_definition(implementation, shape, dtype):
    check_numerics(case(*shape), dtype, implementation)


def test_walks_are_split():
    """Else the case above that is for it would not be."""
    assert nf4_pallas.forward_plan(3, 600, 1024, 4)[1] > 1 and nf4_pallas.backward_plan(3, 600, 1024, 4)[1] > 1


def test_leading_axes_and_uneven_rows():
    """On XLA, D that is no multiple of 64: a block goes on in the next row."""
    check_numerics(case(3, 10, 50, lead=(2,)), jnp.float32, "auto")


def test_transforms():
    check_transforms(case(5, 40, 128))


def test_backward_keeps_the_codes_alone():
    F, D = 64, 128
    q = jax.tree.map(jnp.asarray, in_numpy(np.random.RandomState(0).normal(size=(F, D)).astype(np.float32)))
    _, pull = jax.vjp(lambda x: nf4_linear(x, q, F), jnp.ones((32, D), jnp.bfloat16))
    assert sum(x.nbytes for x in jax.tree.leaves(pull)) == F * D // 2 + F * D // 64 + 4 * (F * D // 16384 + 1) + 4


def test_codes_are_constants():
    F, D = 40, 128
    q = in_numpy(np.random.RandomState(0).normal(size=(F, D)).astype(np.float32))
    grads = jax.grad(lambda q: nf4_linear(jnp.ones((3, D)), q, F).sum(), allow_int=True)(q)
    assert not np.any(grads.scales) and not np.any(grads.offset)


def test_weights_are_made_twice_not_kept():
    """Of 6 layers without a loop, one W lives at a time, on XLA's path on a GPU."""
    D, layers = 1024, 6

    def loss(x, qs):
        for q in qs:
            x = jnp.tanh(nf4_linear(x, q, D, implementation="xla"))
        return x.sum()

    args = jax.ShapeDtypeStruct((128, D), jnp.float32), [nf4.abstract((D, D))] * layers
    assert compile_for(cards.find("rtx4070"), jax.grad(loss), args).temporary_bytes < 3 * 4 * D * D


def test_auto_counts_bytes():
    """A kernel for few rows of a weight that is worth it; XLA's for many, and for tiny ones."""
    moves_less = functools.partial(nf4.kernel_moves_less, itemsize=2)
    assert moves_less(1, 4096, 4096) and moves_less(16, 4096, 11008) and moves_less(64, 11008, 4096)
    assert not moves_less(65, 4096, 4096) and not moves_less(2048, 11008, 4096) and not moves_less(64, 64, 64)
    by_kernel, by_xla = nf4._bytes(1, 4096, 4096, 2)
    assert by_kernel / 4096**2 == pytest.approx(0.64, abs=0.05) and by_xla / 4096**2 == pytest.approx(4.516, abs=0.01)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("rows", [1, 64])
def test_machine_code(card, rows):
    """Llama-2-7B's way into its MLP: of one token, and of 64; forward and backward."""
    F, D = 11008, 4096
    args = jax.ShapeDtypeStruct((rows, D), jnp.bfloat16), nf4.abstract((F, D))
    loss = lambda x, q: nf4_linear(x, q, F).astype(jnp.float32).sum()
    names = {"nf4_linear_forward", "nf4_linear_backward"}
    check_machine_code(jax.value_and_grad(loss), args, card, names, tensor_cores=True)


def test_machine_code_of_uneven_shapes():
    """Masks everywhere, in fp32."""
    F, D = 576 + 8, 576
    args = jax.ShapeDtypeStruct((20, D), jnp.float32), nf4.abstract((F, D))
    loss = lambda x, q: nf4_linear(x, q, F, implementation="pallas").sum()
    names = {"nf4_linear_forward", "nf4_linear_backward"}
    check_machine_code(jax.value_and_grad(loss), args, "rtx4070", names, tensor_cores=False)


def test_rows_too_many_for_the_kernel_are_xlas():
    q = in_numpy(np.random.RandomState(0).normal(size=(64, 64)).astype(np.float32))
    x = np.random.RandomState(1).normal(size=(100, 64)).astype(np.float32)
    program = quick.jit(lambda x: nf4_linear(x, q, 64)).lower(x).as_text()
    assert "triton" not in program
    assert rms_error(nf4_linear(x, q, 64), nf4_linear_reference(x, q, 64)) < 1e-6
