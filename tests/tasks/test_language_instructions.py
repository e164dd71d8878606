"""The language task with instruction data: packed examples do not see each other, and prompts are put to the model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from jaxvram.errors import UserError
from jaxvram.models.gpt2 import GPT2Config
from jaxvram.models.llama import LlamaConfig
from jaxvram.models.mamba import MambaConfig
from jaxvram.tasks.language import LanguageTask

LLAMA = LlamaConfig(
    vocab_size=0, block_size=96, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_inner=32, dtype="float32", remat="none",
    init_std=0.3,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=0, block_size=96, n_layer=1, n_head=2, n_embd=8, dtype="float32", remat="none")


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    """`recipe(model, data={...}, sample={...})` of short questions in the plain style."""
    file = tmp_path / "data.jsonl"
    entries = [{"instruction": f"{i}+1", "output": str(i + 1) * (1 + i % 3)} for i in range(24)]
    file.write_text("\n".join(map(json.dumps, entries)))

    def make(model, data=(), **sections):
        fields = {"name": "instructions", "path": str(file), "prompt_style": "plain", "length": 6} | dict(data)
        made = tiny_recipe(data=fields, **{"sample": {"prompt": "3+1", "top_k": 0}} | sections)
        return dataclasses.replace(made, model=model)

    return make


def test_packed_examples_do_not_see_each_other(recipe):
    packed = LanguageTask.of_recipe(recipe(LLAMA))
    alone = LanguageTask.of_recipe(recipe(LLAMA, {"pack": False}))
    params = packed.init(jax.random.key(0))
    sums = {}
    for name, task in (("packed", packed), ("alone", alone)):
        rows = task.source._packing["train"].rows
        batch = task.source.batch("train", 0, rows)
        assert batch.keys() == task.batch_spec(rows).keys()
        assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in task.batch_spec(rows).items()}
        nats, count, _ = jit(task.loss)(params, batch)
        sums[name] = float(nats), float(count)
    assert packed.source._packing["train"].rows < 22 == alone.source._packing["train"].rows
    np.testing.assert_allclose(sums["packed"], sums["alone"], rtol=1e-5)
    without = {
        k: v
        for k, v in packed.source.batch("train", 0, packed.source._packing["train"].rows).items()
        if k != "segments"
    }
    assert abs(float(jit(packed.loss)(params, without)[0]) / sums["packed"][0] - 1) > 1e-3  # else nothing was seen here


def test_models_that_cannot_keep_examples_apart(recipe):
    for model, name in ((GPT2, "GPT2"), (MambaConfig(vocab_size=0, block_size=96, n_layer=1, n_embd=8), "Mamba")):
        for with_data in (True, False):
            with pytest.raises(UserError, match=rf"a {name} cannot keep .* apart: set data\.pack=False"):
                LanguageTask.of_recipe(recipe(model), with_data)
    with pytest.raises(UserError, match=r"task\.chunk_length carries a state .* set data\.pack=False"):
        LanguageTask.of_recipe(recipe(LLAMA, task={"chunk_length": 48}))
    task = LanguageTask.of_recipe(recipe(GPT2, {"pack": False}))
    nats, count, _ = jit(task.loss)(task.init(jax.random.key(0)), task.source.batch("train", 0, 4))
    assert np.isfinite(float(nats)) and float(count) > 4


def test_a_plan_knows_the_batch_and_the_prompt_without_data(recipe):
    made = recipe(dataclasses.replace(LLAMA, vocab_size=50), {"path": "/not/there.json", "system": "Add."})
    task = LanguageTask.of_recipe(made, with_data=False)
    spec = task.batch_spec(3)
    assert spec.keys() == {"tokens", "targets", "segments"} and {(v.shape, v.dtype) for v in spec.values()} == {
        ((3, 96), jnp.dtype("int32"))
    }
    _, (_, prompt, _) = task.sampling(None)
    assert prompt.shape == (2, len(".Add.\n\nUser:\n3+1\n\nAssistant:\n"))


def test_samples_are_answers_that_stop_where_the_model_ends_them(recipe, monkeypatch):
    task = LanguageTask.of_recipe(recipe(LLAMA, {"system": "Add."}))
    encode, eos = task.source.tokenizer.encode, task.source.tokenizer.eos
    asked = []

    def generate(model, params, prompt_BxP, key, **options):
        asked.append(np.asarray(prompt_BxP))
        return jnp.array([[*encode("4"), eos, *encode("7")], encode("412")])

    monkeypatch.setattr("jaxvram.tasks.language.generate", generate)
    task.check_samples()
    assert task.continue_prompt(None) == ["3+1\n4", "3+1\n412"]
    assert [task.source.tokenizer.decode(row) for row in asked[0]] == ["Add.\n\nUser:\n3+1\n\nAssistant:\n"] * 2
    assert "3+2\n4" in task.continue_prompt(None, "3+2")
    blank = LanguageTask.of_recipe(recipe(LLAMA, sample={"prompt": "\n"}))
    with pytest.raises(UserError, match=r"sample\.prompt is blank; .* what a user says"):
        blank.check_samples()
    with pytest.raises(UserError, match=r"sample\.prompt='é': the text has characters outside"):
        task.continue_prompt(None, "é")
