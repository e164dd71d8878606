"""The language task: what it continues when it is asked to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram import models
from jaxvram.errors import UserError
from jaxvram.models.gpt2 import GPT2Config
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
