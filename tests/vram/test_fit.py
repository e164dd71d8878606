"""The search: order of preference, few compilations, and one on real programs."""

import dataclasses
import types

import pytest

from jaxvram.models.autoencoder import AutoencoderConfig
from jaxvram.models.dit import DiTConfig
from jaxvram.vram import fit as fits
from jaxvram.vram import plan
from jaxvram.vram.cards import CARDS, CONTEXT_BYTES
from tests.vram import toy
from tests.vram.toy import B, D, L

FLOPS = {"none": 100, "dots": 110, "full": 133, "nested": 166}
BYTES = {"none": 100, "dots": 60, "full": 20, "nested": 12}  # a row


def card(usable):
    return dataclasses.replace(CARDS["rtx4070"], capacity_bytes=usable + CONTEXT_BYTES, memory_fraction=1.0)


@pytest.fixture
def search(monkeypatch):
    """`search(usable bytes, batch)` with a compiler that knows FLOPS and BYTES: a second tree of gradients costs 50."""

    @dataclasses.dataclass
    class Answer:
        peak_bytes: int
        matmul_flops: int

    def compile_for(card, fn, args, donate_argnums):
        microbatch, remat, batch = fn
        return Answer(microbatch * BYTES[remat] + (50 if microbatch < batch else 0), FLOPS[remat])

    monkeypatch.setattr(fits, "compile_for", compile_for)
    monkeypatch.setattr(fits, "_flops", lambda program: FLOPS[program.fn[1]])

    def run(usable, batch=64):
        return fits.find_fit(lambda m, r: plan.Program((m, r, batch)), batch, card(usable))

    return run


def test_a_roomy_card_takes_everything_at_once(search):
    found = search(10_000)
    assert (found.best.microbatch, found.best.remat) == (64, "none")
    assert len(found.trials) == 1


def test_fewest_recomputed_flops_come_before_a_large_microbatch(search):
    found = search(1000)
    assert (found.best.microbatch, found.best.remat) == (8, "none")  # 16 rows would be 1650 bytes
    assert found.override == "--config.train.microbatch_size=8 --config.model.remat=none"
    assert [trial.microbatch for trial in found.trials] == [64, 1, 8, 16]


def test_a_hopeless_remat_costs_two_compilations(search):
    found = search(75)
    assert (found.best.microbatch, found.best.remat) == (1, "full")
    assert [(t.microbatch, t.remat) for t in found.trials[:4]] == [(64, "none"), (1, "none"), (64, "dots"), (1, "dots")]


def test_the_whole_batch_may_fit_where_half_of_it_does_not(search):
    found = search(100, batch=1)
    assert (found.best.microbatch, found.best.remat) == (1, "none")
    found = search(425, batch=4)  # 2 rows and the second tree of gradients: 250; the whole: 400
    assert (found.best.microbatch, found.best.remat) == (4, "none")


@pytest.mark.parametrize("usable", [80, 160, 333, 1000, 2500, 6449, 6450])
def test_nothing_better_is_overlooked(search, usable):
    def peak(microbatch, remat):
        return microbatch * BYTES[remat] + (50 if microbatch < 64 else 0)

    every = [(FLOPS[r], -m, r) for r in FLOPS for m in (1, 2, 4, 8, 16, 32, 64) if peak(m, r) <= usable]
    flops, microbatch, remat = min(every)
    found = search(usable)
    assert (found.best.matmul_flops, -found.best.microbatch, found.best.remat) == (flops, microbatch, remat)


def test_when_nothing_fits_it_says_so(search):
    found = search(40)
    assert found.best is None
    text = fits.text(found)
    assert "nothing fits" in text and "microbatch 1 with remat nested" in text and "adafactor" in text
    assert "--config" not in text


def test_the_table_shows_what_was_tried(search):
    text = fits.text(search(1000))
    lines = text.splitlines()
    assert len([line for line in lines if "too much" in line]) >= 2
    assert "<- the fastest that fits" in next(line for line in lines if line.split()[:2] == ["8", "none"])
    assert lines[-1] == "--config.train.microbatch_size=8 --config.model.remat=none"
    assert "+33% FLOPs" in fits.text(search(75))


def test_a_model_of_few_blocks_has_fewer_remats(monkeypatch):
    monkeypatch.setattr(fits, "find_fit", lambda build, batch_size, card, remats, progress: remats)
    of = lambda cfg: types.SimpleNamespace(model=cfg, train=types.SimpleNamespace(batch_size=1))
    assert fits.fit_recipe(of(AutoencoderConfig()), None, None) == ("none", "full")
    assert fits.fit_recipe(of(DiTConfig()), None, None) == fits.REMATS


def test_on_real_programs(card_of):
    """Without remat the toy keeps L layers of activations, with it one input a layer and recomputes a product in four."""
    build = lambda microbatch, remat: toy.train_program(remat, microbatch=microbatch * B // 2)
    saved = 4 * L * B * D
    roomy = fits.find_fit(build, 2, card_of(10**9), remats=("full", "none"))
    assert [(trial.microbatch, trial.remat) for trial in roomy.trials] == [(2, "none")]
    tight = fits.find_fit(build, 2, card_of(roomy.best.peak_bytes - saved // 4), remats=("full", "none"))
    assert tight.best.peak_bytes <= roomy.best.peak_bytes - saved // 4
    assert tight.best.matmul_flops >= roomy.best.matmul_flops
    assert (tight.best.microbatch, tight.best.remat) != (2, "none")
