"""A card to compile for: skips where the planner (the `plan` extra) is not installed."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxvram.errors import UserError
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for


@pytest.fixture(scope="session")
def rtx4070():
    card = cards.find("rtx4070")
    try:
        compile_for(card, lambda x: x + 1, (jax.ShapeDtypeStruct((8,), jnp.float32),))
    except UserError as error:
        if "Install it" in str(error):
            pytest.skip(f"the planner is not installed: {error}")
        raise
    return card


@pytest.fixture(scope="session")
def card_of(rtx4070):
    """`card_of(usable_bytes)`: an RTX 4070 with that much to use."""

    def make(usable_bytes: int) -> cards.Card:
        card = dataclasses.replace(rtx4070, capacity_bytes=usable_bytes + cards.CONTEXT_BYTES, memory_fraction=1.0)
        assert card.usable_bytes == usable_bytes
        return card

    return make
