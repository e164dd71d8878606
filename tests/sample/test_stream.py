"""Streamed tokens are those of `generate`; what was read is not read again; an answer ends where it should."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvram.errors import UserError
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.models.mamba import Mamba, MambaConfig
from jaxvram.sample.stream import Stream, pieces_of_text
from jaxvram.sample.text import SampleConfig, generate
from jaxvram.tasks.chat import chat

V = 23
MODELS = {
    "llama": Llama(LlamaConfig(
        vocab_size=V, block_size=24, n_layer=1, n_head=2, n_kv_head=1, n_embd=8, n_inner=8, init_std=0.5, dtype="float32"
    )),
    "mamba": Mamba(MambaConfig(vocab_size=V, block_size=24, n_layer=1, n_embd=8, d_state=4, dtype="float32")),
}  # fmt: skip
GREEDY = SampleConfig(temperature=0.0, top_k=0, max_new_tokens=9)
PROMPT = [3, 1, 4, 1, 5, 9, 2]


@pytest.fixture(scope="module", params=MODELS)
def streamed(request):
    """(a model, its parameters, a stream)"""
    model = MODELS[request.param]
    params = model.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, params, Stream(model, params, GREEDY, V)


def whole(model, params, prompt, new_tokens):
    options = {"new_tokens": new_tokens, "vocab_size": V, "temperature": 0}
    tokens = generate(model, params, jnp.asarray([prompt]), jax.random.key(0), **options)
    return np.asarray(tokens)[0].tolist()


def test_the_tokens_are_those_of_generate(streamed):
    model, params, stream = streamed
    answer = list(stream.answer(PROMPT))
    assert answer == whole(model, params, PROMPT, 9)
    assert stream.seen == PROMPT + answer[:-1]  # what follows the last was not asked for


def test_what_was_read_is_not_read_again(streamed, monkeypatch):
    model, params, stream = streamed
    answer = list(stream.answer(PROMPT))
    fed = []
    feed = Stream._feed
    monkeypatch.setattr(Stream, "_feed", lambda self, ids: fed.append(list(ids)) or feed(self, ids))
    going_on = PROMPT + answer + [7, 7]
    assert list(stream.answer(going_on))[:5] == whole(model, params, going_on, 5)
    assert fed[0] == [answer[-1], 7, 7]
    other = [2, 2]
    assert list(stream.answer(other)) == whole(model, params, other, 9) and [2, 2] in fed


def test_an_answer_ends_before_its_end_token(streamed):
    model, params, stream = streamed
    expected = whole(model, params, PROMPT, 9)
    end = expected[4]
    assert list(stream.answer(PROMPT, {end})) == expected[: expected.index(end)]


def test_an_answer_ends_with_the_context():
    model = MODELS["llama"]
    params = model.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    stream = Stream(model, params, SampleConfig(temperature=0.0, max_new_tokens=99), V)
    assert list(stream.answer(PROMPT)) == whole(model, params, PROMPT, 24 - len(PROMPT) + 1)
    with pytest.raises(UserError, match="24 tokens, and the model reads 24"):
        next(stream.answer([1] * 24))


def test_seeds_tell_draws_apart(streamed):
    model, params, _ = streamed
    say = lambda seed: list(Stream(model, params, SampleConfig(max_new_tokens=12, seed=seed), V).answer(PROMPT))
    assert say(1) == say(1) != say(2)


def test_a_character_waits_for_all_its_bytes():
    text = "né €"
    data = text.encode()
    decode = lambda ids: bytes(ids).decode(errors="replace")
    pieces = list(pieces_of_text(iter(data), decode))
    assert "".join(pieces) == text and pieces == ["n", "é", " ", "€"]
    assert list(pieces_of_text(iter(data[:-1]), decode))[-1] == "\ufffd"  # what never came


def test_a_chat_remembers_until_it_is_told_to_forget():
    model = MODELS["llama"]
    params = model.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    asked = []

    def prompt_ids(message, said=()):
        asked.append((message, list(said)))
        return np.array([1, *(len(a) % V for pair in said for a in pair), len(message)], np.int32)

    tokenizer = types.SimpleNamespace(decode=lambda ids: "".join(chr(97 + i) for i in ids))
    source = types.SimpleNamespace(prompt_ids=prompt_ids, end_ids=[0], tokenizer=tokenizer, vocab_size=V)
    task = types.SimpleNamespace(model=model, sample=SampleConfig(temperature=0.0, max_new_tokens=3), source=source)
    said = []
    chat(task, params, ["hello\n", "\n", "more", "/new", "again"], said.append)
    answers = "".join(said).split("\n")
    assert [message for message, _ in asked] == ["hello", "more", "again"]
    assert asked[0][1] == asked[2][1] == [] and asked[1][1] == [("hello", answers[0])]
    assert len(answers) == 4 and all(len(answer) <= 3 for answer in answers)


def test_a_chat_needs_turns():
    task = types.SimpleNamespace(source=types.SimpleNamespace())
    with pytest.raises(UserError, match=r"needs data\.name=instructions"):
        chat(task, None, [], print)
