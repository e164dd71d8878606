"""Fine-tuning as a run: what is trained, saved and resumed, what a step costs in gradients, and what goes wrong."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxvram import modes
from jaxvram.convert import llama
from jaxvram.errors import UserError
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.train.checkpoint import Checkpoints, look
from jaxvram.train.loop import Loop
from jaxvram.train.optimizer import ParamGroup
from jaxvram.train.partition import join
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh
from jaxvram.vram import plan as planner

pytestmark = pytest.mark.usefixtures("no_report")
LLAMA = LlamaConfig(
    vocab_size=3, block_size=7, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_inner=16, dtype="float32", init_std=0.2
)
LORA = FinetuneConfig("lora", rank=2, dropout=0.1)


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe):
    """A recipe that fine-tunes LLAMA to sort digits."""

    def make(finetune=LORA, model=LLAMA, **sections):
        base = tiny_recipe(**{"optimizer": {"groups": {"added": ParamGroup(".*")}}} | sections)
        return dataclasses.replace(base, model=model, finetune=finetune)

    return make


@pytest.fixture(scope="module")
def program(recipe_of):
    recipe = recipe_of()
    return make_program(recipe, modes.make_task(recipe), make_mesh(recipe.mesh))


def names(tree):
    return {"/".join(path) for path in traverse_util.flatten_dict(tree)}


def test_only_what_is_added_is_trained(program, same):
    state = program.init()
    assert {name.rsplit("/", 1)[1] for name in names(state.params)} == {"lora_A", "lora_B"}
    assert len(names(state.params)) == 2 * 7 and not any("lora" in name for name in names(state.frozen))
    shapes = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert shapes == {x.shape for x in jax.tree.leaves(state.params)}
    frozen = jax.device_get(state.frozen)
    before = jax.device_get(state.params)
    batch = {"tokens": np.ones((8, 7), np.int32), "targets": np.ones((8, 7), np.int32)}
    for _ in range(2):  # A has a gradient only once B is not zero
        state, _ = program.step(state, batch)
    assert same(frozen, state.frozen)
    changed = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, state.params)
    assert all(jax.tree.leaves(changed))


def test_no_gradient_of_a_frozen_matrix_is_computed(program):
    """Products in the step: with all gradients there would be three of the size of a frozen matrix for each."""
    recipe_step = program.functions.step
    state = jax.eval_shape(program.functions.init)
    batch = {name: jax.ShapeDtypeStruct((8, 7), jnp.int32) for name in ("tokens", "targets")}
    text = str(jax.make_jaxpr(recipe_step)(state, batch))
    D, F = LLAMA.n_embd, LLAMA.n_inner
    made = [line for line in text.splitlines() if "dot_general" in line and f":f32[{D},{F}]" in line]
    assert not made, made


def test_resumed_is_unbroken_and_a_checkpoint_holds_what_is_trained_alone(recipe_of, tmp_path, same):
    recipe = recipe_of(train={"steps": 12}, eval={"every": 6}, checkpoint={"every": 4})
    whole = Loop(recipe, modes.make_task(recipe), tmp_path / "whole", io.StringIO())
    whole.run()
    half = Loop(recipe, modes.make_task(recipe), tmp_path / "parts", io.StringIO())
    step, count = half.program.step, [0]

    def killed(state, batch):
        count[0] += 1
        if count[0] == 7:
            raise RuntimeError("killed")
        return step(state, batch)

    half.program.step = killed
    with pytest.raises(RuntimeError, match="killed"):
        half.run()
    assert look(tmp_path / "parts").step == 4
    rest = Loop(recipe, modes.make_task(recipe), tmp_path / "parts", io.StringIO())
    rest.run()
    assert same(whole.final_params, rest.final_params)
    stored = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoints" / "best").rglob("*") if file.is_file())
    target = whole.program.target.replace(frozen=whole.program.frozen())
    weights, meta = Checkpoints(tmp_path / "whole").restore_weights("best", target)
    assert names(weights["params"]) == names(whole.program.target.params) and stored < 100_000
    assert not any(name.startswith("frozen") for name in meta["inventory"])


def test_another_base_is_told(recipe_of, tmp_path):
    recipe = recipe_of(train={"steps": 2}, eval={"every": 2})
    loop = Loop(recipe, modes.make_task(recipe), tmp_path / "run", io.StringIO())
    loop.run()
    other = jax.tree.map(lambda x: x + 1, loop.program.frozen())
    with pytest.raises(UserError, match=r"trained on other base weights .*set train\.init_from and finetune"):
        Checkpoints(tmp_path / "run").restore("latest", loop.program.target.replace(frozen=other))
    reseeded = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=2, steps=4))
    with pytest.raises(UserError, match="other base weights"):
        Loop(reseeded, modes.make_task(reseeded), tmp_path / "run", io.StringIO()).run()


def test_weights_of_a_folder_are_frozen_and_the_rest_comes_from_the_seed(recipe_of, program, tmp_path, same):
    plain = dataclasses.replace(recipe_of(), finetune=FinetuneConfig())
    base = modes.make_task(plain).init(jax.random.key(7))
    llama.save(base, LLAMA, tmp_path / "base")
    recipe = recipe_of(train={"init_from": str(tmp_path / "base")})
    task = modes.make_task(recipe)
    state = program.init(modes.load_base(recipe, task))
    assert same(state.frozen, jax.device_get(base)) and same(state.params, program.init().params)
    assert state.step == 0 and not np.asarray(jax.tree.leaves(state.opt_state)[-1]).any()


def test_exported_is_the_plain_model(recipe_of, tmp_path):
    """--mode=export writes the merged model."""
    recipe = recipe_of(train={"steps": 3}, eval={"every": 3})
    loop = Loop(recipe, modes.make_task(recipe), tmp_path / "run", io.StringIO())
    loop.run()
    options = type("Options", (), {"out": str(tmp_path / "hf"), "checkpoint": "latest", "adapter": False, "storage": None})
    modes.export(recipe, tmp_path / "run", options)
    plain = llama.load_params(tmp_path / "hf", LLAMA)
    tokens_BxT = jnp.asarray([[0, 1, 2, 1, 0, 2, 2]])
    want = loop.task.model.apply({"params": loop.final_params}, tokens_BxT)[0]
    np.testing.assert_allclose(Llama(LLAMA).apply({"params": plain}, tokens_BxT)[0], want, rtol=2e-5, atol=2e-5)


def test_an_exported_adapter_comes_back(recipe_of, tmp_path, same):
    """--mode=export --adapter, and finetune.adapter_from in another run."""
    plain = dataclasses.replace(recipe_of(), finetune=FinetuneConfig())
    llama.save(modes.make_task(plain).init(jax.random.key(7)), LLAMA, tmp_path / "base")
    recipe = recipe_of(train={"init_from": str(tmp_path / "base"), "steps": 3}, eval={"every": 3})
    task = modes.make_task(recipe)
    loop = Loop(recipe, task, tmp_path / "run", io.StringIO())
    loop.run(modes.load_base(recipe, task))
    options = type("Options", (), {"out": str(tmp_path / "peft"), "checkpoint": "latest", "adapter": True, "storage": None})
    modes.export(recipe, tmp_path / "run", options)
    again = dataclasses.replace(recipe, finetune=dataclasses.replace(LORA, adapter_from=str(tmp_path / "peft")))
    state = loop.program.init(modes.load_base(again, task))
    assert same(join(state.params, state.frozen), loop.final_params)
    alone = dataclasses.replace(again, train=dataclasses.replace(again.train, init_from=""))
    with pytest.raises(UserError, match=r"set train\.init_from"):
        modes.load_base(alone, task)


def test_a_plan_loads_the_base_instead_of_making_it(recipe_of):
    recipe = recipe_of()
    programs = planner.programs(recipe, modes.make_task(recipe, with_data=False))
    (frozen,) = programs["init"].args
    assert names(frozen) == {name for name in names(frozen) if "lora" not in name} and programs["init"].donate_argnums


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lara"}, "finetune.method='lara' is unknown.*lora"),
        ({"base": "nf4"}, "finetune.base=nf4 is not trained: finetune.method=none must be lora or adapter"),
        ({"method": "lora", "rank": 0}, "rank and prompt_length must be at least 1"),
        ({"method": "lora", "targets": "("}, "is no regular expression"),
        ({"method": "lora", "dropout": 1.0}, r"dropout=1\.0 is not in \[0, 1\)"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(UserError, match=message):
        FinetuneConfig(**fields)
