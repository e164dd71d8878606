"""The causal convolution: equal to its definition and to PyTorch's, forward and every gradient; keeps its inputs alone."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from proof import CARDS, Case, check_machine_code, check_transforms
from quick import relative_error

from jaxvram.kernels.causal_conv import causal_conv, causal_conv_reference

B, T, E = 2, 13, 5


def arrays(W=4, dtype=np.float32):
    random = np.random.RandomState(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    x, tail = (jnp.asarray(draw(*shape), dtype) for shape in ((B, T, E), (B, W - 1, E)))
    return x, draw(W, E), draw(E), tail


def all_of(f, args):
    """Results, and gradients of their sines by all arguments."""
    total = lambda *a: sum(jnp.sin(x.astype(jnp.float32)).sum() for x in f(*a))
    return jax.tree.leaves((quick.jit(f)(*args), quick.jit(jax.grad(total, tuple(range(len(args)))))(*args)))


@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("resets_at", [None, (), (0,), (1, 2, 9), (12,)], ids=str)
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_definition(W, resets_at, with_tail, implementation):
    resets = None
    if resets_at is not None:
        resets = np.zeros((B, T), bool)
        resets[1, list(resets_at)] = True
    args = arrays(W) if with_tail else arrays(W)[:3]
    call = lambda f: lambda x, k, b, tail=None: f(x, k, b, tail, resets)
    conv = functools.partial(causal_conv, implementation=implementation)
    for got, want in zip(all_of(call(conv), args), all_of(call(causal_conv_reference), args), strict=True):
        assert relative_error(got, want) < 2e-6


def test_bfloat16():
    args = arrays(dtype=jnp.bfloat16)
    got = all_of(lambda *a: causal_conv(*a), args)
    want = all_of(lambda *a: causal_conv(*a), [jnp.asarray(a, jnp.float32) for a in args])
    assert got[0].dtype == got[1].dtype == jnp.bfloat16
    assert max(relative_error(g, w) for g, w in zip(got, want, strict=True)) < 0.01


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 12])
def test_cut_and_carried_on(cut):
    x, kernel, bias, tail = arrays()
    resets = np.zeros((B, T), bool)
    resets[0, 3] = resets[1, cut - 1] = True
    want, want_tail = causal_conv(x, kernel, bias, tail, resets)
    first, between = causal_conv(x[:, :cut], kernel, bias, tail, resets[:, :cut])
    second, last = causal_conv(x[:, cut:], kernel, bias, between, resets[:, cut:])
    np.testing.assert_allclose(np.concatenate([first, second], 1), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(last, want_tail)


def test_backward_keeps_the_inputs_alone():
    """sizeof(x) a token and channel; V more inputs before the first."""
    x, kernel, bias, tail = arrays(dtype=jnp.bfloat16)
    _, pull = jax.vjp(lambda x, k, b, tail: causal_conv(x, k, b, tail)[0], x, kernel, bias, tail)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if leaf.ndim == 3)
    assert kept == 2 * B * (T + 3) * E


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_torch():
    import torch

    x, kernel, bias, _ = arrays()
    conv = torch.nn.functional.conv1d(
        torch.tensor(np.asarray(x)).mT, torch.tensor(kernel.T[:, None]), torch.tensor(bias), padding=3, groups=E
    )[..., :T]
    np.testing.assert_allclose(causal_conv(x, kernel, bias)[0], torch.nn.functional.silu(conv).mT.numpy(), atol=1e-5)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("documents", [False, True])
def test_machine_code(card, documents):
    """Mamba-130M's, forward and backward."""
    spec = jax.ShapeDtypeStruct
    x, resets = spec((8, 2048, 1536), jnp.bfloat16), spec((8, 2048), jnp.bool_)
    args = (x, spec((4, 1536), jnp.float32), spec((1536,), jnp.float32), spec((8, 3, 1536), jnp.bfloat16), resets)

    def loss(x, kernel, bias, tail, resets):
        return causal_conv(x, kernel, bias, tail, resets if documents else None)[0].astype(jnp.float32).sum()

    names = {"causal_conv_forward", "causal_conv_backward"}
    check_machine_code(jax.value_and_grad(loss, (0, 1, 2, 3)), args, card, names, tensor_cores=False)


def test_transforms():
    """Under jit, vmap, scan and remat."""
    resets = np.zeros((B, T), bool)
    resets[0, 4] = True
    check_transforms(Case(
        make=lambda random, dtype: arrays(dtype=dtype),
        call=lambda implementation, *a: causal_conv(*a, resets_BxT=resets, implementation=implementation),
        reference=lambda *a: causal_conv_reference(*a, resets_BxT=resets),
    ))  # fmt: skip


@pytest.mark.parametrize("length", [1, 2, 3, 70])
def test_lengths_round_a_tile(length):
    """Shorter than the convolution, and longer than a program's tile."""
    random = np.random.RandomState(3)
    x, tail = (random.normal(size=(1, n, E)).astype(np.float32) for n in (length, 3))
    _, kernel, bias, _ = arrays()
    interpret = functools.partial(causal_conv, implementation="interpret")
    for got, want in zip(
        all_of(interpret, (x, kernel, bias, tail)), all_of(causal_conv_reference, (x, kernel, bias, tail)), strict=True
    ):
        assert relative_error(got, want) < 2e-6


def test_what_does_not_belong_together():
    x, kernel, bias, _ = arrays()
    with pytest.raises(ValueError, match=r"causal_conv: x \(2, 13, 5\), kernel \(4, 5\) and bias \(4,\)"):
        causal_conv(x, kernel, bias[:4])
