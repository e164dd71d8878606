"""Runs of mixtures from the command line: the balance loss is what evens loads out; routers alone are trained and saved."""

import json
import pathlib

import jax
import numpy as np
import pytest

from jaxvram import recipe
from jaxvram.errors import UserError
from jaxvram.finetune.adapted import adapted
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.main import main
from jaxvram.models import build
from jaxvram.models.gpt2 import GPT2Config
from jaxvram.modes import make_task
from jaxvram.train import metrics
from jaxvram.train.optimizer import path_name
from jaxvram.train.program import make_functions

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
QUICK = ["--config.eval.every=0", "--config.eval.batches=2", "--config.checkpoint.best=False", "--config.train.log_every=1",
         "--config.sample.max_new_tokens=4", "--config.sample.num_samples=1"]  # fmt: skip


def peak(workdir):
    """The busiest expert of any layer on the validation split, in units of the mean."""
    load_LxE = np.array(metrics.read(workdir)[-1]["router_load"])
    return float(load_LxE.max() * load_LxE.shape[1])


@pytest.mark.slow
def test_the_balance_loss_evens_loads_out(tmp_path, monkeypatch, no_report):
    """All of `tiny`, with its loss and without."""
    monkeypatch.chdir(tmp_path)
    for name, factor in (("with", "0.01"), ("without", "0.0")):
        arguments = [f"--config.model.balance_loss={factor}", f"--workdir={name}", "--config.checkpoint.best=False"]
        assert main(["launch.py", f"--config={CONFIGS / 'grok.py'}:tiny", *arguments]) == 0
    assert peak("with") < 1.5 and peak("without") > 2.5


def test_routers_alone_are_trained_and_saved(tmp_path, monkeypatch, quick_compile, no_report):
    """A frozen base from a folder: what a run trains, and a checkpoint holds, are the routers; an export has all."""
    monkeypatch.chdir(tmp_path)
    config = f"--config={CONFIGS / 'mixtral_upcycle.py'}:tiny"
    small = [f"--config.model.{field}" for field in ("n_layer=1", "n_inner=32", "block_size=64")]
    small.append("--config.data.name=text")
    tuned = [config, *small, *QUICK, "--config.finetune.method=router"]
    assert main(["launch.py", config, *small, *QUICK, "--config.train.steps=1", "--workdir=base"]) == 0
    assert main(["launch.py", config, *small, "--mode=export", "--workdir=base", "--out=dense", "--checkpoint=latest"]) == 0
    vocab = json.loads((tmp_path / "dense" / "config.json").read_text())["vocab_size"]
    tuned += [f"--config.model.vocab_size={vocab}", "--config.train.init_from=dense", "--workdir=run"]
    assert main(["launch.py", *tuned, "--config.train.steps=2"]) == 0
    assert main(["launch.py", *tuned, "--config.train.steps=2", "--mode=export", "--out=out", "--checkpoint=latest"]) == 0
    from safetensors.numpy import load_file

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    changed = {name.split(".")[-2] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"gate"}


def test_of_a_frozen_mixture_the_routers_alone_are_trained_state():
    built = recipe.build(*recipe.load(f"{CONFIGS / 'mixtral_upcycle.py'}:smol"))
    target = jax.eval_shape(make_functions(built, make_task(built, with_data=False)).init)
    assert {path_name(path) for path, _ in jax.tree.leaves_with_path(target.params)} == {"layers/moe/router/kernel"}
    assert "experts" in target.frozen["layers"]["moe"] and target.frozen["layers"]["moe"].keys() == {"experts"}
    moments = {x.shape for x in jax.tree.leaves(target.opt_state) if x.shape}
    assert moments == {(30, 576, 4)}


def test_a_model_without_routers_has_none_to_train():
    with pytest.raises(UserError, match="this model has none"):
        adapted(build(GPT2Config()), FinetuneConfig(method="router"))


