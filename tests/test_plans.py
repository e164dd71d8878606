"""Every recipe, in every variant, plans within the budget that its header states for a 12 GB card."""

import dataclasses
import math
import pathlib
import re

import pytest

from jaxvram import modes, recipe
from jaxvram.vram import cards
from jaxvram.vram import plan as planner
from jaxvram.vram.compile import compile_for

CONFIGS = sorted(pathlib.Path(__file__).parents[1].glob("configs/*.py"))


def budgets(path):
    """{variant: GiB} from the rows of a recipe's header."""
    header = path.read_text().split('"""')[1]
    return {name: float(gib) for name, gib in re.findall(r"^  ([\w.]+) .*? ([\d.]+) GiB", header, re.M)}


def told(path):
    """{variant: GiB} from the recipe's row in the README's table, of the variants that have a figure there."""
    readme = (path.parents[1] / "README.md").read_text()
    row = re.search(rf"^\| `{path.name}` \|.*$", readme, re.M)[0]
    return {name: float(gib) for name, gib in re.findall(r"`([\w.]+)` (?:\([^)]*\) )?(\d+\.\d+)", row)}


def names(path):
    """The variants of a recipe."""
    return re.search(r"^VARIANTS = \((.*?)\)", path.read_text(), re.M)[1].replace('"', "").replace(",", " ").split()


# Ten minutes and 10 GB to compile, 686 arrays each with an update of its own: planned by hand, as its header says.
BY_HAND = {"stable_diffusion": ("sd1_full",)}
RECIPES = [(path, name) for path in CONFIGS for name in names(path) if name not in BY_HAND.get(path.stem, ())]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "variant"), RECIPES, ids=lambda x: getattr(x, "stem", x))
def test_the_train_step_plans_within_the_headers_budget(path, variant):
    card = cards.find("rtx4070")
    built = recipe.build(*recipe.load(f"{path}:{variant}"))
    train = planner.programs(built, modes.make_task(built, with_data=False))["train"]
    compiled = compile_for(card, train.fn, train.args, train.donate_argnums)
    peak, budget = compiled.peak_bytes / 2**30, budgets(path)[variant]
    assert peak <= budget, f"plans at {peak:.2f} GiB; the header says {budget}"
    assert peak >= 0.7 * budget - 0.1, f"plans at {peak:.2f} GiB; the header's {budget} tells nobody much"
    assert compiled.peak_bytes <= card.usable_bytes
    assert told(path).get(variant, peak) == pytest.approx(peak, abs=0.02, rel=0.01), f"plans at {peak:.2f} GiB"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_readme_tells_of_every_recipe(path):
    """Else what is compared above could be nothing."""
    assert names(path)[0] in told(path) and set(told(path)) <= set(names(path))


# GPT-2 124M, fp32 AdamW: what the kernels are for. (batch, T, remat, unrolled, GiB at the most)
PROMISES = {
    "8 x 1024": (8, 1024, "full", False, 2.3),
    "one long sequence": (1, 8192, "full", False, 2.4),
    "without remat": (16, 1024, "none", True, 8.0),
    "without remat, scanned": (16, 1024, "none", False, 8.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES)
def test_the_kernels_keep_what_they_promise(promise):
    batch, T, remat, unroll, limit = PROMISES[promise]
    built = recipe.build(*recipe.load(f"{CONFIGS[0].parent / 'gpt2.py'}:124m"))
    built = dataclasses.replace(
        built,
        train=dataclasses.replace(built.train, batch_size=batch, microbatch_size=0),
        model=dataclasses.replace(built.model, block_size=T, remat=remat, unroll_layers=unroll),
    )
    train = planner.programs(built, modes.make_task(built, with_data=False))["train"]
    compiled = compile_for(cards.find("rtx4070"), train.fn, train.args, train.donate_argnums, kernels=not unroll)
    assert compiled.peak_bytes <= limit * 2**30
    assert all(kernel.spill_bytes == 0 for kernel in compiled.kernels)
    if not unroll:
        names = {kernel.name.removeprefix("pallas_").split("__")[0] for kernel in compiled.kernels}
        assert names == {
            "flash_attention_forward", "flash_attention_backward_kv", "flash_attention_backward_q",
            "linear_cross_entropy_statistics", "linear_cross_entropy_dlogits",
        }  # fmt: skip
    shapes = {dims for i in compiled.module.instructions.values() for dims in dims_of(i.shape)}
    assert max(map(math.prod, shapes)) < batch * T * built.model.vocab_size, "something is as large as the logits"
    assert not any(dims[-2:] == (T, T) for dims in shapes), "there are scores of all by all"


# DiT, bf16 compute, fp32 weights and their average on the card. (variant, batch at once, GiB at the most)
DENOISERS = {"b2 at 64": ("b2", 64, 3.4), "l2 at 32": ("l2", 32, 9.4), "xl2 at 16": ("xl2", 16, 9.4)}


@pytest.mark.slow
@pytest.mark.parametrize("which", DENOISERS)
def test_denoisers_fit(which):
    variant, batch, limit = DENOISERS[which]
    built = recipe.build(*recipe.load(f"{CONFIGS[0].parent / 'dit.py'}:{variant}"))
    built = dataclasses.replace(built, train=dataclasses.replace(built.train, batch_size=batch, microbatch_size=0))
    assert built.train.ema_decay > 0 and built.model.param_dtype == "float32"
    train = planner.programs(built, modes.make_task(built, with_data=False))["train"]
    card = cards.find("rtx4070")
    compiled = compile_for(card, train.fn, train.args, train.donate_argnums, kernels=True)
    assert compiled.peak_bytes <= min(limit * 2**30, card.usable_bytes)
    assert compiled.kernels and all(kernel.spill_bytes == 0 for kernel in compiled.kernels)
    T = built.model.tokens
    shapes = {dims for i in compiled.module.instructions.values() for dims in dims_of(i.shape)}
    assert not any(dims[-2:] == (T, T) for dims in shapes), "there are scores of all by all"


# 130M, fp32 AdamW at once: (sequences, T, tokens at a time or 0, GiB at the most); at 8 x 2048 Mamba-2 needs less than Mamba
RECURRENT = {
    ("mamba", "8 x 2048"): (8, 2048, 0, 3.7),
    ("mamba2", "8 x 2048"): (8, 2048, 0, 3.62),
    ("mamba", "64k"): (1, 65536, 0, 8.6),
    ("mamba2", "64k"): (1, 65536, 0, 8.8),
    ("mamba", "64k by chunks"): (1, 65536, 2048, 2.7),
    ("mamba2", "64k by chunks"): (1, 65536, 2048, 3.2),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "which"), RECURRENT)
def test_recurrent_models_fit(name, which):
    batch, T, chunk_length, limit = RECURRENT[name, which]
    built, compiled = train_step(name, "130m", batch, T, chunk_length)
    assert compiled.peak_bytes <= limit * 2**30
    assert all(kernel.spill_bytes == 0 for kernel in compiled.kernels)
    names = {kernel.name.removeprefix("pallas_").split("__")[0] for kernel in compiled.kernels}
    scan = {"mamba": "selective_scan_", "mamba2": "scalar_decay_"}[name]
    assert {f"{scan}forward", "causal_conv_forward", "causal_conv_backward"} <= names
    cfg = built.model
    shapes = {dims for i in compiled.module.instructions.values() for dims in dims_of(i.shape)}
    assert max(map(math.prod, shapes)) < batch * T * cfg.d_inner * 16, "there are states of every step"


# RetNet medium, 203 M parameters and 103 M in table and head, fp32 AdamW at once: as RECURRENT
RETNET = {"4 x 2048": (4, 2048, 0, 5.5), "64k by chunks": (1, 65536, 2048, 6.9)}


@pytest.mark.slow
@pytest.mark.parametrize("which", RETNET)
def test_retnet_medium_fits(which):
    batch, T, chunk_length, limit = RETNET[which]
    compiled = train_step("retnet", "medium", batch, T, chunk_length)[1]
    assert compiled.peak_bytes <= limit * 2**30
    assert compiled.kernels and all(kernel.spill_bytes == 0 for kernel in compiled.kernels)
    shapes = {dims for i in compiled.module.instructions.values() for dims in dims_of(i.shape)}
    assert not any(dims[-2:] == (T, T) for dims in shapes), "there are scores of all by all"


def train_step(name, variant, batch, T, chunk_length):
    """(recipe, its train step compiled for an RTX 4070), all sequences at once."""
    built = recipe.build(*recipe.load(f"{CONFIGS[0].parent / name}.py:{variant}"))
    built = dataclasses.replace(
        built,
        train=dataclasses.replace(built.train, batch_size=batch, microbatch_size=0),
        model=dataclasses.replace(built.model, block_size=T),
        task=dataclasses.replace(built.task, chunk_length=chunk_length),
    )
    train = planner.programs(built, modes.make_task(built, with_data=False))["train"]
    return built, compile_for(cards.find("rtx4070"), train.fn, train.args, train.donate_argnums, kernels=True)


def dims_of(shape):
    """Dimensions of an array, or of each in a tuple."""
    return [dims for part in shape.parts for dims in dims_of(part)] if shape.parts else [shape.dims]
