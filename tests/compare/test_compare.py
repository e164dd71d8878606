"""Our half of a comparison: what PyTorch's is asked, what becomes of its answers, and what fits at the most."""

import io
import itertools
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from matplotlib import image
from parity import needs_transformers

from jaxvram import modes, recipe
from jaxvram.compare import picture, pytorch_side, search, sides, table
from jaxvram.errors import UserError
from jaxvram.main import main
from jaxvram.models import MODELS, name_of
from jaxvram.vram import cards
from jaxvram.vram.figures import COLOURS

CONFIGS = sorted(pathlib.Path(__file__).parents[2].glob("configs/*.py"))
RTX4070 = cards.find("rtx4070")
GIB = 2**30


@pytest.fixture(scope="module")
def requested():
    """The twin's own reading of requests."""
    folder = str(pytorch_side.SCRIPT.parent)
    sys.path.insert(0, folder)
    yield pytest.importorskip("requested")
    sys.path.remove(folder)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_can_be_asked_for(requested, path):
    built = recipe.build(*recipe.load(str(path)))
    cfg = modes.make_task(built, with_data=False).model.cfg
    if path.stem in ("grok", "rwkv5", "rwkv6"):
        with pytest.raises(UserError, match=f"no twin of {name_of(cfg)} in PyTorch is known: "):
            pytorch_side.request_of(built, cfg)
        return
    request = json.loads(json.dumps(pytorch_side.request_of(built, cfg)))
    parsed = requested.parse(request)
    assert parsed.step.rows == (built.train.microbatch_size or built.train.batch_size)
    size = "n_layer" if hasattr(cfg, "n_layer") else "width"  # an autoencoder and a U-Net have levels
    assert parsed.step.ema == (built.train.ema_decay > 0) and parsed.model.items() >= {size: getattr(cfg, size)}.items()
    for name in parsed.variants:
        requested.check_variant(parsed, name)  # none is asked for that the model has not


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("grok:8x124m", {}, r"none that trains with model.renormalise=False \(Grok-1 was never in it\)"),
        ("rwkv6:tiny", {}, r"there are those of gpt2, llama, bitnet"),
        ("mixtral_upcycle:whole", {"model.router": "sigmoid"}, r"none that trains with model.router=sigmoid"),
        ("mixtral_upcycle:routers", {"finetune.method": "lora"}, r"none with finetune.method=lora"),
        ("bitnet:3b", {}, r"through model.weights=base3 no gradient passes"),
        ("bitnet:700m", {"model.anneal_steps": 9}, r"without model.anneal_steps"),
        ("bitnet:700m", {"model.anneal_steps": 0}, None),
        ("mixtral_upcycle:routers", {}, None),
    ],
)
def test_what_has_no_twin_is_told_why(name, changes, why):
    name, _, variant = name.partition(":")
    config, *about = recipe.load(f"{CONFIGS[0].parent / name}.py:{variant}")
    config.update_from_flattened_dict(changes)
    built = recipe.build(config, *about)
    if why is None:
        assert pytorch_side.request_of(built, built.model)["variants"] == pytorch_side.VARIANTS
        return
    with pytest.raises(UserError, match=why):
        pytorch_side.request_of(built, built.model)


def test_both_halves_know_the_same_models(requested):
    assert requested.KINDS == pytorch_side.TWINS and set(requested.KINDS) <= set(MODELS)


def record(eight_bit=None, **torch_sides):
    """Two GiB of ours, or with the optimizer in 8 bits as many as that, beside what is given."""
    side = lambda gib: {"peak_bytes": gib * GIB, "owners": {"parameters": GIB, "logits and loss": (gib - 1) * GIB}}
    theirs = {name: side(x) if isinstance(x, int) else {"refused": x} for name, x in torch_sides.items()}
    return {
        "recipe": "gpt2", "variant": "124m", "card": "rtx4070", "gpu": RTX4070.description, "way": "planned",
        "usable_bytes": RTX4070.usable_bytes, "versions": {"jax": "1", "torch": "2"},
        "parameters": {"all": 9, "trained": 9, "difference": "a row more", "extra": 2, "ours": {"all": 7, "trained": 7}},
        "step": {"batch_size": 8, "microbatch_size": 4, "tokens": 1024},
        "sides": {sides.OURS: side(2)} | ({sides.OURS_8BIT: side(eight_bit)} if eight_bit else {}) | theirs,
    }  # fmt: skip


def test_the_table_says_peaks_ratios_and_bills():
    said = table.text(record(eager=16, flash=5, compile="measure it"))
    assert "4 x 1024 at a time" in said and "a row more" in said and "jax 1, torch 2" in said
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert "0.12 of it  does not fit" in lines["PyTorch eager"] and "0.40 of it" in lines["PyTorch flash"]
    assert lines["PyTorch compile"].endswith("measure it")
    assert "(flash, its leanest; " in said
    assert lines["logits and loss"].split()[-2:] == ["1.00", "4.00"] and "workspace" not in lines
    assert "7 parameters in ours, 9 in PyTorch's: a row more" in said and "nobody knows" not in said


def test_each_is_beside_ours_with_the_same_optimizer():
    both = record(eight_bit=1, **{"flash": 5, "flash+8bit": 4})
    said = table.text(both)
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert "0.40 of it" in lines["PyTorch flash"] and "0.25 of it" in lines["PyTorch flash+8bit"]
    assert lines["jaxvram+8bit"].split()[1:] == ["1.00", "GiB"]
    assert lines["logits and loss"].split()[-2:] == ["0.00", "3.00"]  # the bills of the two leanest
    best = {eight_bit: sides.best_of_torch(both, eight_bit) for eight_bit in (None, False, True)}
    assert best == {None: "flash+8bit", False: "flash", True: "flash+8bit"}


def test_parameters_that_nobody_can_explain_are_told():
    odd = record(flash=5)
    odd["parameters"]["all"] += 1
    assert sides.unexplained(odd) == 1 and "nobody knows why PyTorch's has +1" in table.text(odd)


def test_without_an_answer_ours_stands_alone():
    alone = record(eager="no compiler")
    assert sides.best_of_torch(alone) is None
    assert "leanest" not in table.text(alone) and picture.png(alone).startswith(b"\x89PNG")


def test_the_picture_is_as_long_as_the_peaks():
    """Rows of pixels with as much of the logits' colour as each side has GiB of them: 1, 15 and 4."""
    pixels = image.imread(io.BytesIO(picture.png(record(eager=16, flash=5))))[..., :3]
    colour = [int(COLOURS["logits and loss"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    bars = pixels[:, : int(0.81 * pixels.shape[1])]  # without the legend
    lengths = (np.abs(bars - colour).max(-1) < 0.01).sum(1)
    # what is written over a bar, and the card's line, take a few pixels of it
    ours, eager, flash = (max(rows) for begins, rows in itertools.groupby(lengths, key=bool) if begins)
    assert eager / ours == pytest.approx(15, rel=0.05) and flash / ours == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("usable", [0, 99, 100, 101, 5_000, 10**9])
@pytest.mark.parametrize("peak_of", [lambda n: 100 + 7 * n, lambda n: 100 + n * n, lambda n: 100 * -(-n // 64)])
def test_the_largest_that_fits(peak_of, usable):
    """Straight, curved and by steps: the same as trying all, with few looks."""
    largest, points = search.find_largest(peak_of, usable, unit=8, most=4096)
    fitting = [n for n in range(8, 4097, 8) if peak_of(n) <= usable]
    assert largest == max(fitting, default=0)
    assert len(points) <= 20 and all(peak_of(n) == peak for n, peak in points.items())


def test_a_search_asks_both_sides(monkeypatch, tiny_recipe):
    """Ours needs a GiB a sequence and PyTorch three; a variant that it has not is told with the reason."""
    asked = []

    def ask(request, python):
        asked.append(request["step"])
        (name,) = request["variants"]
        if name == "flash":
            return {"variants": {name: {"refused": "no flash here"}}}
        return {"variants": {name: {"peak_bytes": 3 * GIB * request["step"]["batch_size"]}}}

    plan = lambda recipe, task, card: {"peak_bytes": GIB * recipe.train.batch_size}
    monkeypatch.setattr(pytorch_side, "ask", ask)
    monkeypatch.setattr(sides, "plan_ours", plan)
    found = search.search(tiny_recipe(), lambda recipe: modes.make_task(recipe, with_data=False), "batch", RTX4070)
    assert found["sides"][sides.OURS]["largest"] == 10 and found["sides"]["eager"]["largest"] == 3
    assert found["sides"]["flash"] == {"refused": "no flash here"}
    assert all(step["microbatch_size"] == 0 for step in asked)
    said = search.text(found)
    lines = {line.split("  ")[0]: line.split()[-3:] for line in said.splitlines()}
    assert lines["jaxvram"] == ["10", "10.00", "GiB"] and lines["PyTorch flash"] == ["no", "flash", "here"]
    assert picture.curve(found).startswith(b"\x89PNG")


def test_images_have_no_context():
    built = recipe.build(*recipe.load(str(CONFIGS[0].parent / "dit.py")))
    with pytest.raises(UserError, match=r"--search=context: a dit has no context"):
        search.search(built, lambda recipe: modes.make_task(recipe, with_data=False), "context", RTX4070)


def python_that_says(tmp_path, error, status=2):
    """An interpreter that fails without reading the request."""
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\necho '{error}' >&2\nexit {status}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("error: PYTHON has no torch: PYTHON -m pip install torch", r"has no torch.*apart from JAX: .*--torch-python=TORCH"),
        ("error: there is no compiler", r"PyTorch's side: there is no compiler$"),
        ("Segmentation fault", r"PyTorch's side: Segmentation fault$"),
        ("", r"PyTorch's side: it ended without a word$"),
    ],
)
def test_what_goes_wrong_on_the_other_side(tmp_path, error, message):
    with pytest.raises(UserError, match=message):
        pytorch_side.ask({"way": "planned"}, python_that_says(tmp_path, error))


def test_a_python_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--torch-python=.*/none does not start"):
        pytorch_side.ask({"way": "planned"}, str(tmp_path / "none"))


def test_an_unknown_search(capsys):
    assert main(["launch.py", f"--config={CONFIGS[0]}", "--mode=compare", "--search=width"]) == 2
    assert "--search=width is unknown" in capsys.readouterr().err


@pytest.mark.slow
@needs_transformers
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_recipe_from_end_to_end(tmp_path, capsys):
    """A GPT-2 of 1,000 parameters, both sides; the bills add up."""
    config = f"--config={CONFIGS[0].parent / 'nanogpt_shakespeare.py'}:tiny"
    assert main(["launch.py", config, "--mode=compare", "--card=rtx4070", f"--workdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "PyTorch flash+checkpoint" in said
    found = json.loads((tmp_path / "compare.json").read_text())
    for side in found["sides"].values():
        assert sum(side["owners"].values()) == side["peak_bytes"] > 0
    assert found["sides"]["flash+checkpoint"]["peak_bytes"] < found["sides"]["eager"]["peak_bytes"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
