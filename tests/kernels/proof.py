"""What every kernel must pass; a kernel's own test file gives the cases (see docs/kernels.md).

Numerics in interpret mode, forward and every gradient, against the definition in fp32, under jit, vmap, scan and remat; and
what the compiler for a card that is not there says of the machine code.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

RMS_ERROR = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.bfloat16): 5e-3}  # of what fp32 gives


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `make(rng, dtype)` gives the arrays to differentiate by, in that order; the rest is bound in `call`."""

    make: Callable  # (np.random.RandomState, dtype) -> tuple of arrays
    call: Callable  # (implementation, *arrays) -> array or tuple of arrays
    reference: Callable  # (*arrays) -> the same


def rms_error(got, want) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.sqrt(((got - want) ** 2).mean() / max((want**2).mean(), 1e-30)))


def value_and_gradients(f, arrays, jit=jax.jit):
    """f(*arrays) and the pull-back of a fixed random cotangent, all in one compiled program."""

    def run(*arrays):
        out, pull = jax.vjp(f, *arrays)
        leaves, tree = jax.tree.flatten(out)
        weights = [np.random.RandomState(7 + i).normal(0, 1, x.shape).astype(np.float32) for i, x in enumerate(leaves)]
        cotangent = jax.tree.unflatten(tree, [jnp.asarray(w, x.dtype) for w, x in zip(weights, leaves, strict=True)])
        return (*leaves, *pull(cotangent))

    return jit(run)(*arrays)


def check_numerics(case: Case, dtype, implementation="interpret", bound=None) -> None:
    arrays = case.make(np.random.RandomState(0), dtype)
    got = value_and_gradients(functools.partial(case.call, implementation), arrays)
    want = value_and_gradients(case.reference, [x.astype(jnp.float32) for x in arrays])
    errors = [rms_error(g, w) for g, w in zip(got, want, strict=True)]
    assert max(errors) < (bound or RMS_ERROR[jnp.dtype(dtype)]), errors


def check_transforms(case: Case) -> None:
    """A loss of the kernel's result, and its gradient, the same under every transformation that a model applies to it."""
    arrays = case.make(np.random.RandomState(1), jnp.float32)
    loss = lambda f: lambda *arrays: sum(jnp.sin(x).sum() for x in jax.tree.leaves(f(*arrays)))
    every = tuple(range(len(arrays)))
    grad = lambda f: jax.value_and_grad(loss(f), every)
    interpret = functools.partial(case.call, "interpret")
    want = jax.jit(grad(case.reference))(*arrays)
    pairs = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arrays)
    want_half = jax.jit(grad(case.reference))(*jax.tree.map(lambda x: 0.5 * x, arrays))

    def scanned(*arrays):
        add = lambda total, _: (total + loss(jax.checkpoint(interpret))(*arrays), None)
        return jax.lax.scan(add, 0.0, None, length=2)[0]

    got = jax.jit(jax.vmap(grad(interpret)))(*pairs)
    twice = jax.jit(jax.value_and_grad(scanned, every))(*arrays)
    for mine, theirs in (
        (jax.tree.map(lambda x: x[0], got), want),
        (jax.tree.map(lambda x: x[1], got), want_half),
        (jax.tree.map(lambda x: x / 2, twice), want),
    ):
        for g, w in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            assert rms_error(g, w) < 2e-5


def check_machine_code(fn, args, card_name: str, names: set[str], tensor_cores: bool) -> None:
    """Compiled for `card_name`: these kernels and no other path, no spills, shared memory that fits, mma where asked."""
    card = cards.find(card_name)
    compiled = compile_for(card, fn, args, kernels=True)
    assert {kernel.name.removeprefix("pallas_").split("__")[0] for kernel in compiled.kernels} == names
    for kernel in compiled.kernels:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.shared_bytes <= card.shared_memory_per_block and kernel.blocks_per_multiprocessor(card) >= 1, kernel
        assert (kernel.tensor_core_instructions > 0) == tensor_cores, kernel
    opcodes = {instruction.opcode for instruction in compiled.module.instructions.values()}
    assert "conditional" not in opcodes, "the choice was left to run time"


CARDS = [pytest.param("rtx4070", id="sm_89"), pytest.param("rtx3060", id="sm_86"), pytest.param("h100", id="sm_90")]
