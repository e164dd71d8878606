"""The machine code of RWKV-7's kernels: compiled for cards that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels.wkv7 import wkv7
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

NAMES = {f"wkv7_{name}" for name in ("forward", "states", "states_back", "gradients", "gradients_of_removal")}


def check_code(card, B, T, H, resets):
    spec = lambda dtype: jax.ShapeDtypeStruct((B, T, H, 64), dtype)
    args = [spec(jnp.float32 if i == 1 else jnp.bfloat16) for i in range(6)]
    mask = np.zeros((B, T), bool) if resets else None
    loss = lambda *arrays: wkv7(*arrays, resets_BxT=mask)[0].astype(jnp.float32).sum()
    proof.check_machine_code(jax.value_and_grad(loss, tuple(range(6))), args, card, NAMES, True)


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code(card):
    check_code(card, 16, 512, 12, resets=True)


@pytest.mark.slow
def test_machine_code_without_documents_and_of_ragged_length():
    check_code("rtx4070", 2, 1000, 4, resets=False)


@pytest.mark.slow
def test_what_a_layer_makes_on_its_way_does_not_grow_with_length():
    """The peak is arguments, results, and what does not depend on T: a y and its gradient, and a segment's rest."""
    rest = {}
    for T in (16_384, 65_536):
        spec = lambda dtype, T=T: jax.ShapeDtypeStruct((1, T, 12, 64), dtype)
        args = [spec(jnp.float32 if i == 1 else jnp.bfloat16) for i in range(6)]
        loss = lambda *arrays: wkv7(*arrays)[0].astype(jnp.float32).sum()
        compiled = compile_for(cards.find("rtx4070"), jax.grad(loss, tuple(range(6))), args)
        rest[T] = compiled.peak_bytes - T * 768 * (2 * 14 + 2 * 2)
    assert rest[16_384] < 320 * 2**20 and rest[65_536] < 1.1 * rest[16_384], rest
