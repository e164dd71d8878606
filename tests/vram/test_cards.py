"""Names, the table, what is kept in reserve, the card of this machine; every card compiles."""

import types

import jax.numpy as jnp
import pytest

from jaxvram.errors import UserError
from jaxvram.kernels.backend import LEAST_SHARED_MEMORY
from jaxvram.vram import cards
from jaxvram.vram.cards import CARDS, GIB
from jaxvram.vram.compile import compile_for
from tests.vram.toy import spec

ASKED_FOR = {
    "rtx3060", "rtx4060", "rtx4060ti16g", "rtx4070", "rtx4080", "rtx3090", "rtx4090", "rtx5070", "rtx5090", "a100-40g",
    "a100-80g", "l4", "h100", "h200",
}  # fmt: skip


@pytest.mark.parametrize("name", ["rtx4070", "RTX 4070", "NVIDIA GeForce RTX 4070", "geforce rtx4070"])
def test_a_card_is_found_by_the_names_people_use(name):
    assert cards.find(name) is CARDS["rtx4070"]


def test_an_unknown_card_is_an_error_that_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'rtx4070'.*a100-40g"):
        cards.find("rtx4071")


def test_the_table_lists_every_card():
    assert set(CARDS) == ASKED_FOR
    lines = cards.table().splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(CARDS)
    assert "11.63 GiB" in next(line for line in lines if line.startswith("rtx4070"))


def test_kernels_are_made_for_the_leanest_card():
    assert min(card.shared_memory_per_block for card in CARDS.values()) == LEAST_SHARED_MEMORY


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_the_figures_of_a_card_agree_with_each_other(card):
    # Tensor cores do 256 (Ampere and later GeForce), 512 (L4), 1024 (A100) or 2048 (Hopper) bf16 multiply-adds a clock.
    per_clock = card.tensor_tflops * 1e12 / (2 * card.multiprocessors * card.clock_ghz * 1e9)
    assert min(abs(per_clock / known - 1) for known in (256, 512, 1024, 2048)) < 0.09  # H100's rate is below its boost
    assert cards.CONTEXT_BYTES <= card.reserved_bytes < 0.09 * card.capacity_bytes + cards.CONTEXT_BYTES / 50
    assert card.usable_bytes + card.reserved_bytes == card.capacity_bytes


def test_a_plan_never_promises_what_the_allocator_may_not_take():
    for card in CARDS.values():
        assert card.usable_bytes <= cards.MEMORY_FRACTION * card.capacity_bytes + 1


@pytest.mark.parametrize(
    "capability, per_block",
    [((8, 6), 101_376), ((8, 9), 101_376), ((12, 0), 101_376), ((8, 0), 166_912), ((9, 0), 232_448)],
)
def test_shared_memory_a_block(capability, per_block):
    assert {c.shared_memory_per_block for c in CARDS.values() if c.compute_capability == capability} == {per_block}


def _device(kind, gib, fraction, capability="8.9", cores=46):
    return types.SimpleNamespace(
        device_kind=kind,
        compute_capability=capability,
        core_count=cores,
        memory_stats=lambda: {"bytes_limit": round(gib * fraction * GIB)},
    )


def test_the_gpu_of_this_machine(monkeypatch):
    monkeypatch.setattr(cards, "local_device", lambda: None)
    assert cards.local_card() is None

    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setattr(cards, "local_device", lambda: _device("NVIDIA GeForce RTX 4070", 11.6, 0.5))
    card = cards.local_card()
    assert card.name == "rtx4070"
    assert card.capacity_bytes == pytest.approx(11.6 * GIB, abs=4)
    assert card.usable_bytes == pytest.approx(5.8 * GIB, abs=4)  # what this process' allocator may take

    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.setattr(cards, "local_device", lambda: _device("NVIDIA GeForce RTX 3080", 9.8, 0.75, "8.6", 68))
    card = cards.local_card()
    assert (card.name, card.description, card.multiprocessors) == ("local", "NVIDIA GeForce RTX 3080", 68)
    assert card.compute_capability == (8, 6)
    assert card.capacity_bytes == pytest.approx(9.8 * GIB, abs=4)


@pytest.mark.parametrize("kind", ["NVIDIA GeForce RTX 4070 Ti", "NVIDIA GeForce RTX 4060 Ti"])
def test_a_card_that_only_resembles_one_in_the_table_is_described_by_itself(monkeypatch, kind):
    monkeypatch.setattr(cards, "local_device", lambda: _device(kind, 7.63, 0.75, cores=34))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    card = cards.local_card()
    assert (card.name, card.description, card.multiprocessors) == ("local", kind, 34)
    assert card.capacity_bytes == pytest.approx(7.63 * GIB, abs=4)


def test_a_laptops_card_keeps_its_own_size(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    monkeypatch.setattr(
        cards, "local_device", lambda: _device("NVIDIA GeForce RTX 4070 Laptop GPU", 7.63, 0.9, cores=36)
    )
    card = cards.local_card()
    assert (card.name, card.multiprocessors) == ("local", 36)
    assert card.capacity_bytes == pytest.approx(7.63 * GIB, abs=4)


def _compiles(card):
    compiled = compile_for(
        card, lambda x, y: jnp.tanh(x @ y), (spec(64, 128, dtype=jnp.bfloat16), spec(128, 32, dtype=jnp.bfloat16))
    )
    assert compiled.argument_bytes == 2 * (64 * 128 + 128 * 32)
    assert compiled.output_bytes == 2 * 64 * 32


@pytest.mark.parametrize("name", ["rtx3060", "rtx5070", "a100-40g", "h100"])
def test_every_architecture_compiles(rtx4070, name):
    _compiles(CARDS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CARDS) - {"rtx3060", "rtx5070", "a100-40g", "h100"}))
def test_every_other_card_compiles(rtx4070, name):
    _compiles(CARDS[name])
