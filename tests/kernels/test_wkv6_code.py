"""The machine code of RWKV-5's and 6's kernels: compiled for cards that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels.wkv6 import wkv6

NAMES = {f"wkv6_{name}" for name in ("pairs", "forward", "states", "gradients")}


def check_code(card, B, T, H, N=64, resets=False, constant=False):
    spec = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    x, u = spec(B, T, H, N), spec(H, N, dtype=jnp.float32)
    args = [x, u if constant else spec(B, T, H, N, dtype=jnp.float32), x, x, u]
    mask = np.zeros((B, T), bool) if resets else None
    loss = lambda *arrays: wkv6(*arrays, resets_BxT=mask)[0].astype(jnp.float32).sum()
    proof.check_machine_code(jax.value_and_grad(loss, tuple(range(5))), args, card, NAMES, True)


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code(card):
    check_code(card, 8, 1024, 12, resets=True)


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code_of_a_constant_decay(card):
    check_code(card, 8, 1024, 12, resets=True, constant=True)


@pytest.mark.slow
@pytest.mark.parametrize("constant", [False, True])
def test_machine_code_without_documents_and_of_ragged_length(constant):
    check_code("rtx4070", 2, 1000, 4, constant=constant)


@pytest.mark.slow
@pytest.mark.parametrize("N", [16, 32])
def test_machine_code_of_small_heads(N):
    check_code("rtx4070", 2, 1000, 4, N, resets=True)
