"""The language task: what it continues when it is asked to, and how an exam is marked."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram import models
from jaxvram.data import DataConfig, load
from jaxvram.errors import UserError
from jaxvram.models.gpt2 import GPT2, GPT2Config
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig, LanguageTask, _prompt_of


def test_l2wrap_is_in_the_gradient_and_not_in_the_loss():
    """Against the definition with all logits: 1/2 l2wrap m^2 of every token that is learnt, m its largest logit."""
    cfg = GPT2Config(vocab_size=29, vocab_multiple=32, block_size=8, n_layer=1, n_head=1, n_embd=16, dtype="float32")
    task = lambda **fields: LanguageTask(models.build(cfg), None, LanguageConfig(**fields), SampleConfig())
    params = jax.tree.map(lambda x: 5 * x, task().init(jax.random.key(0)))
    tokens = np.random.RandomState(0).randint(0, 29, (3, 8)).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.where(tokens % 3, np.roll(tokens, -1, 1), -1)}

    def defined(params):
        model, learnt = models.build(cfg), batch["targets"] >= 0
        hidden, _ = model.apply({"params": params}, tokens, None)
        logits = (hidden @ model.apply({"params": params}, method="head_VxD").T)[..., :29]
        nats = -(jax.nn.log_softmax(logits) * jax.nn.one_hot(batch["targets"], 29)).sum(-1)
        return jnp.where(learnt, nats + 0.1 / 2 * logits.max(-1) ** 2, 0).sum()

    loss_of = lambda task: quick.jit(jax.value_and_grad(lambda p: task.loss(p, batch)[0]))(params)
    (loss, got), (plain, without), want = loss_of(task(l2wrap=0.1)), loss_of(task()), quick.jit(jax.grad(defined))(params)
    off = lambda a, b: max(quick.relative_error(g, w) for g, w in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    assert loss == plain and off(got, want) < 1e-5 and off(without, want) > 1e-2
    with pytest.raises(UserError, match="l2wrap must not be negative"):
        LanguageConfig(l2wrap=-1e-4)


def test_a_prompt_comes_from_the_recipe_or_from_a_file(tmp_path):
    assert _prompt_of(SampleConfig()) is None and _prompt_of(SampleConfig(prompt="ROMEO:")) == "ROMEO:"
    file = tmp_path / "prompt.txt"
    file.write_text("to be", encoding="utf-8")
    assert _prompt_of(SampleConfig(prompt_file=str(file))) == "to be"
    with pytest.raises(UserError, match=r"gone\.txt does not exist"):
        _prompt_of(SampleConfig(prompt_file=str(tmp_path / "gone.txt")))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        _prompt_of(SampleConfig(prompt_file=str(file)))


class Looking:
    """Not a model: after a token it names what followed that token where it stood last, or always the same one."""

    def __init__(self, vocab_size: int, block_size: int, always: int | None = None):
        self.cfg = types.SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        self.always = always

    def apply(self, variables, tokens_BxT=None, method=None):
        V = self.cfg.vocab_size
        if method == "head_VxD":
            return jnp.eye(V + 3)[:, :V].at[V:].set(9)  # rows of padding, which would win if they were looked at
        B, T = tokens_BxT.shape
        same_BxTxT = (tokens_BxT[:, :, None] == tokens_BxT[:, None]) & jnp.tri(T, k=-1, dtype=bool)
        last_BxT = jnp.where(same_BxTxT, jnp.arange(T), -1).max(-1)
        said_BxT = jnp.take_along_axis(tokens_BxT, jnp.minimum(last_BxT + 1, T - 1), 1)
        if self.always is not None:
            said_BxT = jnp.full((B, T), self.always)
        return jax.nn.one_hot(said_BxT, V), None


def exam_task(problems: int, always=None, **sample):
    data = DataConfig(name="recall", length=24, symbols=6, remembered=5)
    source = load(data, 24, 0)
    return LanguageTask(
        Looking(source.vocab_size, 24, always), source, LanguageConfig(score_problems=problems), SampleConfig(**sample), data
    )


def test_an_exam_is_marked_question_by_question():
    assert exam_task(200).scores({}) == {"accuracy": 1.0}
    constant = exam_task(2000, always=8).scores({})["accuracy"]
    assert constant == pytest.approx(1 / 6, abs=0.02), "of 10,000 answers, one in six is that value"
    assert exam_task(50, always=12).scores({}) == {"accuracy": 0.0}, "a blank is no answer"
    assert exam_task(0).scores({}) == {}


def test_an_exam_is_shown_with_what_was_said():
    perfect, constant = (exam_task(9, always, num_samples=2) for always in (None, 8))
    perfect.check_samples()  # no prompt is read
    rows = perfect.show({}).text.splitlines()[::2]
    asked = [row.split(" -> ")[1].split(", ") for row in rows]
    assert all(len(said) == 5 and all(pair in row for pair in said) for row, said in zip(rows, asked, strict=True))
    said = constant.show_on_request({}).text.split(" -> ")[1].split("\n")[0].split(", ")
    assert len(said) == 5 and all(s[1] == "C" for s in said) and any("(not " in s for s in said)


def test_an_exam_is_what_a_plan_compiles_for_sampling():
    data = DataConfig(name="recall", length=24, symbols=6, remembered=5)
    cfg = GPT2Config(vocab_size=13, vocab_multiple=8, block_size=24, n_layer=1, n_head=1, n_embd=8, dtype="float32")
    task = LanguageTask(GPT2(cfg), load(data, 24, 0), LanguageConfig(score_problems=20), SampleConfig(num_samples=2), data)
    function, arguments = task.sampling(jax.eval_shape(task.init, jax.random.key(0)))
    assert arguments[1].shape == jax.eval_shape(function, *arguments).shape == (20, 24)
