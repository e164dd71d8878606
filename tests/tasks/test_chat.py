"""A chat goes on: in a style of one turn, and when the conversation has outgrown the context."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from jaxvram.data import DataConfig
from jaxvram.data.instructions import load_instructions
from jaxvram.errors import UserError
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.chat import chat


def make(tmp_path, style, block_size, max_new_tokens=8):
    """(a task of random weights, the prompts that it is asked)"""
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": f"{i} and 1 abcdefgh", "output": "x"}) for i in range(9)))
    data = DataConfig(name="instructions", path=str(file), prompt_style=style)
    source = load_instructions(data, block_size, 0)
    cfg = LlamaConfig(
        vocab_size=source.vocab_size, block_size=block_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=8, n_inner=8,
        init_std=0.5, dtype="float32",
    )  # fmt: skip
    prompt_ids, asked = source.prompt_ids, []

    def heard(message, said=()):
        asked.append(source.tokenizer.decode(prompt_ids(message, said)))
        return prompt_ids(message, said)

    source.prompt_ids, source.end_ids = heard, ()
    sample = SampleConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    task = types.SimpleNamespace(model=Llama(cfg), sample=sample, source=source)
    return task, Llama(cfg).init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"], asked


def test_a_style_of_one_turn_forgets(tmp_path):
    task, params, asked = make(tmp_path, "alpaca", 512)
    said = []
    chat(task, params, ["1 and 1", "2 and 2"], said.append)
    assert len(asked) == 2 and "1 and 1" not in asked[1] and asked[1] == asked[0].replace("1 and 1", "2 and 2")


def test_the_first_turns_are_forgotten_where_the_context_ends(tmp_path):
    """A prompt of the plain style with a message of 3 has 22 characters, an answer 8 and its end."""
    task, params, asked = make(tmp_path, "plain", 95)
    chat(task, params, ["a a", "b b", "c c", "d d"], lambda piece: None)
    last = asked[-1]
    assert "a a" in asked[2] and "a a" not in last and "b b" in last and "c c" in last and last.count("User:") == 3
    with pytest.raises(UserError, match="the model reads 95"):
        chat(task, params, ["a a", "a" * 95], lambda piece: None)


def test_room_for_an_answer_is_half_of_the_context_at_most(tmp_path):
    """Else all that was said would be forgotten each time. The model ends at once, so answers are empty."""
    task, params, asked = make(tmp_path, "plain", 120, max_new_tokens=1000)
    task.source.end_ids = tuple(range(task.source.vocab_size))
    chat(task, params, ["a a", "b b"], lambda piece: None)
    assert "a a" in asked[-1]
