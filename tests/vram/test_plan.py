"""plan.json, the table, the picture, and the three programs of a recipe."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from jaxvram.errors import UserError
from jaxvram.vram import cards, figures, plan
from tests.vram import toy
from tests.vram.toy import spec

SIZES = {"argument_bytes", "temporary_bytes", "output_bytes", "aliased_bytes", "peak_bytes"}


@pytest.fixture(scope="module")
def toy_plan(rtx4070):
    programs = {"init": plan.Program(toy.init_params), "train": toy.train_program()}
    return plan.make_plan(programs, rtx4070)


@pytest.fixture(scope="module")
def too_large(rtx4070):
    """24 GiB of arguments for a card of 12: compiled all the same."""
    double = plan.Program(lambda state: {"w": 2 * state["w"]}, ({"w": spec(6 * 2**30)},), (0,))
    return plan.make_plan({"init": plan.Program(lambda: jnp.zeros(8)), "train": double}, rtx4070)


def test_the_keys_of_plan_json(toy_plan):
    assert {"card", "capacity_bytes", "reserved_bytes", "init", "train"} <= set(toy_plan)
    assert toy_plan["card"] == "rtx4070"
    for phase in ("init", "train"):
        part = toy_plan[phase]
        assert set(part) >= SIZES | {"fits", "largest", "owners"}
        assert part["peak_bytes"] == (
            part["argument_bytes"] + part["temporary_bytes"] + part["output_bytes"] - part["aliased_bytes"]
        )
        assert part["fits"] is True
        assert sum(part["owners"].values()) == part["peak_bytes"]
        assert all(set(buffer) >= {"name", "bytes", "shape", "source"} for buffer in part["largest"])
    assert plan.phases(toy_plan) == ["init", "train"]


def test_it_is_written_as_json_and_as_a_picture(toy_plan, tmp_path):
    json_path, png_path = plan.write(toy_plan, tmp_path / "runs" / "toy")
    assert json.loads(json_path.read_text()) == toy_plan
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["plan.json", "plan.png"]
    pixels = image.imread(png_path)
    assert pixels.shape[1] == 1800
    for owner in ("parameters", "optimizer state", "gradients"):
        assert _share_of(pixels, figures.COLOURS[owner]) > 0.001, f"{owner} is not in the picture"
    assert _share_of(pixels, figures.COLOURS["cache"]) == 0  # this plan has none


def _share_of(pixels, colour):
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (np.abs(pixels[..., :3] - rgb).max(-1) < 0.01).mean()


def test_every_owner_has_a_colour_of_its_own():
    from jaxvram.vram.bill import OWNERS

    assert list(figures.COLOURS) == list(OWNERS)
    assert len(set(figures.COLOURS.values())) == len(OWNERS)


def test_what_does_not_fit_is_said(too_large):
    assert too_large["train"]["fits"] is False and too_large["init"]["fits"] is True
    assert too_large["train"]["peak_bytes"] >= 24 * 2**30
    text = plan.text(too_large, "python launch.py --config=x.py --mode=fit")
    line = next(line for line in text.splitlines() if line.startswith("train"))
    assert "DOES NOT FIT (by 13.30 GiB)" in line
    assert text.splitlines()[-1].endswith("python launch.py --config=x.py --mode=fit")
    assert "FITS" in next(line for line in text.splitlines() if line.startswith("init"))
    assert _share_of(image.imread(io.BytesIO(figures.png(too_large))), figures.BAD) > 0.0003


def test_the_table_shows_sizes_owners_and_lines(toy_plan):
    text = plan.text(toy_plan)
    assert "11.63 GiB, of which 0.93 GiB in reserve" in text and "10.70 GiB to use" in text
    assert "DOES NOT FIT" not in text and "--mode=fit" not in text
    assert "gradient of params/" in text
    assert "toy.py:" in text and "argument\n" not in text  # only what the program makes
    assert "the peak of train: saved activations" in text and "optimizer state 3.3 MiB" in text


def test_sampling_beside_a_state_that_leaves_no_room(toy_plan):
    usable = toy_plan["capacity_bytes"] - toy_plan["reserved_bytes"]
    sample = dict(toy_plan["init"], argument_bytes=0, peak_bytes=usable - 1)
    assert "sampling during training" in plan.text(toy_plan | {"sample": sample})
    sample["peak_bytes"] = usable - toy_plan["init"]["output_bytes"]
    assert "sampling during training" not in plan.text(toy_plan | {"sample": sample})


def test_choosing_a_card(monkeypatch):
    assert plan.choose_card("l4").name == "l4"
    monkeypatch.setattr(cards, "local_card", lambda: None)
    with pytest.raises(UserError, match=r"--card=rtx4070.*--card=list"):
        plan.choose_card(None)
    monkeypatch.setattr(cards, "local_card", lambda: cards.find("rtx3060"))
    assert plan.choose_card(None).name == "rtx3060"


def test_the_three_programs_of_a_recipe(tiny_recipe, make_task):
    recipe = tiny_recipe(sample={"num_samples": 3})
    task = make_task(recipe)
    programs = plan.programs(recipe, task)
    assert list(programs) == ["init", "train", "sample"]
    state, batch = programs["train"].args
    assert jax.tree.structure(jax.eval_shape(programs["init"].fn)) == jax.tree.structure(state)
    assert programs["train"].donate_argnums == (0,)
    assert batch["tokens"].shape == (8, 7)
    assert programs["sample"].args[1].shape == (16, 4)  # the problems that an evaluation scores
    task.source = None  # a plan needs no data; a prompt has at most as many tokens as characters
    recipe = tiny_recipe(sample={"prompt": "01210121", "num_samples": 1})
    task.sample = recipe.sample
    assert plan.programs(recipe, task)["sample"].args[1].shape == (1, 7)  # and no more than the context


def test_the_train_step_of_a_recipe(rtx4070, tiny_recipe, make_task):
    """The very step that training runs, its state donated, its buffers named by parameters and lines of the model."""
    recipe = tiny_recipe(model={"dropout": 0.0})
    train = plan.programs(recipe, make_task(recipe))["train"]
    made = plan.make_plan({"train": train}, rtx4070)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(train.args[0]))
    assert made["train"]["aliased_bytes"] == state_bytes
    names = {buffer["name"] for buffer in made["train"]["largest"]}
    assert any(name.startswith("params/h/") for name in names) and any("/mu/" in name for name in names)
    sources = {b["source"].split(":")[0] for b in made["train"]["largest"]}
    assert any(source.startswith("jaxvram/layers/") for source in sources)
    assert all(not source.startswith("jaxvram/vram/") for source in sources)


@pytest.mark.slow
def test_sampling_of_a_recipe(rtx4070, tiny_recipe, make_task):
    recipe = tiny_recipe(model={"dropout": 0.0})
    programs = plan.programs(recipe, make_task(recipe))
    made = plan.make_plan({name: programs[name] for name in ("init", "sample")}, rtx4070)
    assert made["init"]["output_bytes"] > 3 * made["sample"]["argument_bytes"] > 0  # Adam's state is thrice the weights
    cache_bytes = 2 * 2 * 16 * 7 * 8 * 4  # k and v, layers, problems, positions, channels, fp32
    assert made["sample"]["temporary_bytes"] >= cache_bytes
