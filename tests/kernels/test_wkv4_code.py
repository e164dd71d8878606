"""The machine code of RWKV-4's kernels: compiled for cards that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels.wkv4 import wkv4

NAMES = {f"wkv4_{name}" for name in ("forward", "states", "backward")}


def check_code(card, B, T, D, resets):
    spec = jax.ShapeDtypeStruct
    weight, tokens = spec((D,), jnp.float32), spec((B, T, D), jnp.bfloat16)
    mask = np.zeros((B, T), bool) if resets else None
    loss = lambda *arrays: wkv4(*arrays, resets_BxT=mask)[0].astype(jnp.float32).sum()
    args = [weight, weight, tokens, tokens]
    proof.check_machine_code(jax.value_and_grad(loss, (0, 1, 2, 3)), args, card, NAMES, False)


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code(card):
    check_code(card, 8, 1024, 768, resets=True)


@pytest.mark.slow
def test_machine_code_without_documents_and_of_ragged_length():
    check_code("rtx4070", 2, 1000, 200, resets=False)
