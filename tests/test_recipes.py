"""Every recipe loads in every variant, says in its header how it is run, and its `tiny` learns."""

import ast
import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from jaxvram import recipe as recipes
from jaxvram.convert import text_encoder
from jaxvram.errors import UserError
from jaxvram.main import main
from jaxvram.models.gpt2 import GPT2Config
from jaxvram.models.text_encoder import SmallTextConfig, SmallTextEncoder
from jaxvram.tasks.autoencoder import AutoencodingConfig
from jaxvram.tasks.diffusion import DiffusionConfig
from jaxvram.tasks.language import LanguageConfig
from jaxvram.train import metrics
from jaxvram.train.optimizer import OptimizerConfig

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def variants(file):
    tree = ast.parse(file.read_text())
    assigned = {t.id: node.value for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}
    return ast.literal_eval(assigned["VARIANTS"])


CASES = [pytest.param(file, variant, id=f"{file.stem}:{variant}") for file in FILES for variant in variants(file)]


def build(file, variant):
    return recipes.build(*recipes.load(f"{file}:{variant}"))


def test_there_are_recipes_and_each_has_a_tiny():
    assert len(FILES) >= 4 and all(variants(file)[-1] == "tiny" for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_header_says_how_and_what(file):
    header = ast.get_docstring(ast.parse(file.read_text()), clean=False)
    assert f"python launch.py --config=configs/{file.name}" in header
    rows = [line.split() for line in header.splitlines() if line.startswith("  ")]
    columns = next(row for row in rows if row[0] == "variant")
    assert {"card", "planned", "peak"} <= set(columns) and {"expect"} <= set(columns)
    for variant in variants(file):
        row = next((row for row in rows if row[0] == variant), None)
        assert row, f"no row for {variant}"
        assert re.search(r"\d GiB", " ".join(row)), f"the row of {variant} states no planned peak"


@pytest.mark.parametrize("file, variant", CASES)
def test_loads_is_locked_builds_and_comes_back_from_json(file, variant):
    config, name, chosen = recipes.load(f"{file}:{variant}")
    assert (name, chosen) == (file.stem, variant)
    with pytest.raises(AttributeError):
        config.model.nonsuch = 1
    recipe = recipes.build(config, name, variant)
    assert recipe.train.microbatches >= 1
    as_json = json.loads(json.dumps(recipe.as_dict()))
    again, _, _ = recipes.load(f"{file}:{variant}")
    with again.unlocked():
        for section in recipes.SECTIONS:
            again[section].update(as_json[section])
    assert recipes.build(again, name, variant) == recipe


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_auto_is_tiny_here_and_the_first_for_a_card(file):
    assert recipes.load(str(file))[2] == recipes.load(f"{file}:auto")[2] == "tiny"
    assert recipes.load(str(file), for_card=True)[2] == variants(file)[0]


def test_a_run_on_fineweb_has_the_tokens_that_its_header_promises():
    """With fewer shards it would go round the same ones again and again."""
    file = next(file for file in FILES if file.stem == "gpt2")
    for variant in ("124m", "medium", "large"):
        built = recipes.build(*recipes.load(f"{file}:{variant}"))
        assert built.data.fineweb_shards * 1e8 >= built.train.steps * built.train.batch_size * built.model.block_size


def test_fields_are_checked():
    config, name, variant = recipes.load(str(ROOT / "configs/mingpt_sort.py"))

    def built(section, **fields):
        changed = config.copy_and_resolve_references().unlock()
        changed[section].update(fields)
        return lambda: recipes.build(changed, name, variant)

    for section, fields, message in (
        ("model", {"n_haed": 3}, "model.n_haed is no field of GPT2Config; did you mean 'n_head'"),
        ("train", {"guard": {"windw": 3}}, "train.guard.windw is no field of GuardConfig; did you mean 'window'"),
        (
            "optimizer",
            {"groups": {"linear": {"decay": 0.1}}},
            "optimizer.groups.linear.decay is no field of ParamGroup",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            built(section, **fields)()
    broken = config.copy_and_resolve_references().unlock()
    broken.model = dict(broken.model.to_dict(), n_head="three")
    with pytest.raises(UserError, match=r"model\.n_head='three' is a str; it must be a int"):
        recipes.build(broken, name, variant)
    assert built("optimizer", learning_rate=1)().optimizer.learning_rate == 1.0
    with pytest.raises(TypeError, match="unknown sections"):
        recipes.new(model=GPT2Config(), optimiser=OptimizerConfig())


def test_a_recipe_is_made_of_the_defaults_and_what_it_sets():
    config = recipes.new(model=GPT2Config(n_layer=3))
    recipe = recipes.build(config, "x", "y")
    assert recipe.model == GPT2Config(n_layer=3)
    for section, cls in recipes.sections_of("gpt2").items():
        assert section == "model" or getattr(recipe, section) == cls()
        assert dataclasses.is_dataclass(getattr(recipe, section))


def prepare_pictures(recipe) -> list[str]:
    """A cache of latents and of captions' features, both by encoders that nobody trained; what to tell a run of it."""
    cfg = SmallTextConfig(length=recipe.model.context_length, n_layer=1, n_embd=recipe.model.context_dim)
    tokens_BxS = jnp.zeros((1, cfg.length), jnp.int32)
    text_encoder.save(SmallTextEncoder(cfg).init(jax.random.key(0), tokens_BxS)["params"], cfg, "text_encoder")
    encoders = ["--autoencoder=random", "--text_encoder=text_encoder"]
    pictures = ["--input=shapes", f"--image_size={8 * recipe.model.image_size}", "--count=64"]
    assert main(["launch.py", "--mode=prepare", *pictures, *encoders, "--out=cache"]) == 0
    return ["--config.data.path=cache"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tiny_learns(file, tmp_path, monkeypatch, capsys, no_report, request):
    """Thirty steps of it, with little evaluation."""
    if file.stem != "gpt2":  # whose 50,257 rows need the optimiser
        request.getfixturevalue("quick_compile")
    monkeypatch.chdir(tmp_path)
    prepared = prepare_pictures(build(file, "tiny")) if file.stem in ("pixart", "stable_diffusion") else []
    of_task = {
        LanguageConfig: [
            "--config.sample.max_new_tokens=8", "--config.task.score_problems=8", "--config.data.download=False"
        ],
        DiffusionConfig: ["--config.sample.steps=2", "--config.task.score_samples=0"],
        AutoencodingConfig: ["--config.task.score_images=0", "--config.train.batch_size=4"],
    }[type(build(file, "tiny").task)]  # fmt: skip
    arguments = [
        *of_task, "--config.train.steps=30", "--config.train.log_every=1", "--config.eval.every=0",
        "--config.eval.batches=2",
        "--config.sample.num_samples=1",
        "--config.optimizer.warmup_steps=5", "--config.checkpoint.best=False",
        "--workdir=run",
    ]  # fmt: skip
    assert main(["launch.py", f"--config={file}:tiny", *prepared, *arguments]) == 0
    losses = [line["loss"] for line in metrics.read("run") if "split" not in line]
    assert len(losses) == 30
    first, last = sum(losses[:3]) / 3, sum(losses[-5:]) / 5
    assert last < 0.85 * first, (first, last)
    assert metrics.read("run")[-1]["loss"] < 0.85 * first  # held out
