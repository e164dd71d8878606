"""Runs that begin from a folder of weights, as a user's do: each method, resumed, and what differs from run to run."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxvram import modes
from jaxvram.convert import llama
from jaxvram.errors import UserError
from jaxvram.finetune.adapted import Adapted
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.finetune.weights import base_parameters, one_by_one
from jaxvram.models.dit import DiTConfig
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.tasks.diffusion import DiffusionTask
from jaxvram.tasks.language import LanguageTask
from jaxvram.train.checkpoint import check_workdir
from jaxvram.train.optimizer import ParamGroup

pytestmark = pytest.mark.usefixtures("no_report")
LLAMA = LlamaConfig(
    vocab_size=3, block_size=7, n_layer=3, n_head=2, n_kv_head=1, n_embd=16, n_inner=16, dtype="float32", init_std=0.2
)
METHODS = {
    "lora": FinetuneConfig("lora", rank=2),
    "dora on nf4": FinetuneConfig("lora", rank=2, base="nf4", dora=True),
    "adapter": FinetuneConfig("adapter", prompt_length=2),
    "adapter on nf4": FinetuneConfig("adapter", prompt_length=2, base="nf4"),
    "adapter_v2": FinetuneConfig("adapter_v2", prompt_length=2),
}


@pytest.fixture(scope="module")
def base():
    return jax.device_get(Llama(LLAMA).init(jax.random.key(7), jnp.zeros((1, 1), jnp.int32))["params"])


@pytest.fixture
def recipe_of(tiny_recipe, tmp_path, base):
    """A recipe that fine-tunes the weights of a folder to sort digits."""
    llama.save(base, LLAMA, tmp_path / "base")

    def make(finetune, **train):
        sections = {"optimizer": {"groups": {"added": ParamGroup(".*")}}, "eval": {"every": 2}}
        sections |= {"train": {"init_from": str(tmp_path / "base"), "steps": 2} | train}
        return dataclasses.replace(tiny_recipe(**sections), model=LLAMA, finetune=finetune)

    return make


def run(recipe, workdir):
    """As launch.py does."""
    assert modes.train(recipe, workdir, None) == 0
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_starts_from_a_folder_and_resumes(recipe_of, tmp_path, method):
    """Also what is frozen and in no folder: whether a layer has prompts."""
    finetune = METHODS[method]
    whole = run(recipe_of(finetune, steps=4), tmp_path / "whole")
    run(recipe_of(finetune, steps=2), tmp_path / "parts")
    assert run(recipe_of(finetune, steps=4), tmp_path / "parts") == whole
    _, params, step = modes.load_checkpoint(recipe_of(finetune, steps=4), tmp_path / "parts", "latest")
    assert step == 4
    if method.startswith("adapter"):
        assert params["layers"]["attn"]["adapter_active"].tolist() == [0, 0, 1]


def test_an_adapter_to_start_from_is_needed_once(recipe_of, tmp_path):
    finetune = METHODS["lora"]
    run(recipe_of(finetune), tmp_path / "first")
    options = type("Options", (), {"out": str(tmp_path / "peft"), "checkpoint": "latest", "adapter": True})
    modes.export(recipe_of(finetune), tmp_path / "first", options)
    again = dataclasses.replace(finetune, adapter_from=str(tmp_path / "peft"))
    run(recipe_of(again), tmp_path / "second")
    shutil.rmtree(tmp_path / "peft")
    run(recipe_of(again, steps=4), tmp_path / "second")


def test_what_is_read_again_is_what_is_frozen_alone(recipe_of, tmp_path):
    """A run that trains all resumes without its first weights: they are in the checkpoint."""
    recipe = recipe_of(FinetuneConfig())
    run(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "base")
    run(recipe_of_steps(recipe, 4), tmp_path / "run")


def recipe_of_steps(recipe, steps):
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps))


@pytest.mark.parametrize(
    ("change", "field"), [({"alpha": 64.0}, "alpha=32.0, not 64.0"), ({"rank_stabilised": True}, "rank_stabilised=False")]
)
def test_a_run_folder_is_of_one_way_of_fine_tuning(recipe_of, tmp_path, change, field):
    """Arrays of the same shapes, and another function of them."""
    finetune = METHODS["lora"]
    run(recipe_of(finetune), tmp_path / "run")
    with pytest.raises(UserError, match=rf"was made with finetune\.{field}"):
        modes.load_checkpoint(recipe_of(dataclasses.replace(finetune, **change)), tmp_path / "run", "latest")
    free = dataclasses.replace(finetune, dropout=0.5)
    check_workdir(tmp_path / "run", recipe_of(free))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("held", ["plain", "nf4"])
def test_dora_changes_nothing_at_first(base, dtype, held):
    """|W + s A B| is that of the matrix as it is held: in NF4, or rounded to bf16."""
    cfg = dataclasses.replace(LLAMA, dtype=dtype, param_dtype=dtype)
    tokens_BxT = np.arange(7)[None] % 3
    said = []
    for dora in (False, True):
        model = Adapted(Llama(cfg), FinetuneConfig("lora", rank=2, base=held, dora=dora))
        fresh = traverse_util.flatten_dict(model.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"])
        read = traverse_util.flatten_dict(base_parameters(model, one_by_one(base)))
        assert not dora or any(path[-1] == "lora_magnitude" for path in read)
        params = traverse_util.unflatten_dict(fresh | read)
        said.append(np.asarray(model.apply({"params": params}, tokens_BxT)[0], np.float32))
    np.testing.assert_allclose(said[1], said[0], rtol=1e-5, atol=1e-5)


def test_norms_that_are_trained_are_in_fp32():
    """In bf16 a step of 0.003 would leave a scale of 1 where it is, and Adam's second moment would never fall."""
    model = Adapted(Llama(dataclasses.replace(LLAMA, param_dtype="bfloat16")), METHODS["adapter_v2"])
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    dtype_of = {"/".join(path): str(leaf.dtype) for path, leaf in traverse_util.flatten_dict(params).items()}
    assert {name for name in dtype_of if "norm" in name} == {
        "norm/scale", "layers/input_norm/scale", "layers/post_norm/scale"
    }  # fmt: skip
    for name, dtype in dtype_of.items():
        is_fp32 = METHODS["adapter_v2"].trains(name) or name.endswith("adapter_active")
        assert dtype == ("float32" if is_fp32 else "bfloat16"), name


def test_an_adapter_that_peft_has_not():
    for fields in ({"method": "none"}, {"method": "adapter"}, {"method": "adapter_v2", "gate": "layer"}):
        with pytest.raises(UserError, match=r"set finetune\.method=lora, or adapter with finetune\.gate=layer"):
            FinetuneConfig(**fields, adapter_from="folder")
    FinetuneConfig("adapter", gate="layer", adapter_from="folder")


def test_no_weights_and_weights_that_are_not_there(tiny_recipe, tmp_path):
    """Said of train.init_from, which was set or forgotten, not of data.vocab_path, which follows it."""
    recipe = dataclasses.replace(tiny_recipe(data={"name": "instructions", "tokenizer": "file"}), model=LLAMA)
    with pytest.raises(UserError, match=r"data\.tokenizer=file .* set train\.init_from"):
        LanguageTask.of_recipe(recipe)
    wrong = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, init_from=str(tmp_path / "not there")))
    with pytest.raises(UserError, match=r"train\.init_from=.*not there: there is no such folder or file"):
        LanguageTask.of_recipe(wrong)


def test_a_tokenizer_that_is_not_the_weights(recipe_of):
    """Three digits for weights that know four tokens; a row or two of padding to three would be nothing."""
    recipe = recipe_of(METHODS["lora"])
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(LLAMA, vocab_size=4))
    with pytest.raises(UserError, match=r"the tokenizer has 3 tokens, and the weights .* know 4: it is not theirs"):
        modes.make_task(recipe)


def test_images_have_no_adapter(tiny_recipe):
    recipe = dataclasses.replace(tiny_recipe(), model=DiTConfig(), finetune=METHODS["adapter"])
    with pytest.raises(UserError, match=r"finetune\.method=adapter is for language models"):
        DiffusionTask.of_recipe(recipe)
