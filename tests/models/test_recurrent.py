"""What every recurrent model must do: causal, cut anywhere == uncut, documents kept apart, memory of one size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from quick import relative_error
from recurrent import (
    CASES,
    B,
    V,
    assert_equal_gradients,
    empty_state,
    model_and_params,
    run,
    run_cut,
    state_bytes,
    tokens,
)

from jaxvram import models
from jaxvram.errors import UserError
from jaxvram.sample.text import SampleConfig, generate
from jaxvram.tasks.language import LanguageConfig, LanguageTask

every = pytest.mark.parametrize("name", CASES)


def every_of(field):
    """A test for each entry of a field that cases have."""
    both = [pytest.param(name, x, id=f"{name}-{x}") for name, case in CASES.items() for x in getattr(case, field)]
    return pytest.mark.parametrize(("name", field), both)


@every
def test_causal(name):
    """No gradient from a token to what comes before it, and some to all that comes after."""
    (model, params), case = model_and_params(name), CASES[name]

    def hidden(x_1xTxD):
        layers = lambda m, x: m.run_layers(x, None, m.extras(tokens(1, case.T_causal), None, None), True)[0]
        return model.apply({"params": params}, x_1xTxD, method=layers).sum((0, 2))

    x = np.random.RandomState(0).normal(size=(1, case.T_causal, case.cfg.n_embd)).astype(np.float32)
    reach = np.abs(quick.jit(jax.jacobian(hidden))(x)).sum((1, 3))  # (to, from)
    assert (np.triu(reach, 1) == 0).all() and (reach[np.tril_indices(case.T_causal)] > 0).all()


@every_of("cuts")
def test_cut_anywhere_and_carried_on_is_uncut(name, cuts):
    """The last one is decoding: a token at a time."""
    (model, params), text = model_and_params(name), tokens(B, CASES[name].T)
    want, none = run(model, params, text)
    assert none is None
    assert relative_error(run_cut(run, model, params, text, cuts), want) < 1e-5


@every_of("documents")
def test_a_document_remembers_nothing_of_the_one_before(name, documents):
    """With the token that begins documents: each as if it were alone, whole or cut."""
    (at, cut), T = documents, CASES[name].T
    model, params = model_and_params(name, reset_token=V - 1)
    text = np.minimum(tokens(B, T), V - 2)
    text[:, list(at)] = V - 1
    got, _ = run(model, params, text)
    for start, end in zip((0, *at), (*at, T), strict=True):
        if end > start:
            alone, _ = run(model, params, text[:, start:end])
            assert relative_error(got[:, start:end], alone) < 1e-5
    assert relative_error(run_cut(run, model, params, text, (cut,)), got) < 1e-5
    without, _ = run(model_and_params(name)[0], params, text)
    assert at == (0,) or relative_error(got, without) > 1e-2, "the token changes nothing"


@every_of("remat")
def test_remat_changes_nothing(name, remat):
    case = CASES[name]
    model, params = model_and_params(name, reset_token=3, **dict(case.remat_changes))
    loss = lambda model: lambda p: jnp.sin(model.apply({"params": p}, tokens(B, case.T))[0]).sum()
    gradients = lambda model: quick.jit(jax.grad(loss(model)))(params)
    other = models.build(dataclasses.replace(model.cfg, remat=remat, unroll_layers=remat in case.unrolled))
    assert str(jax.make_jaxpr(loss(other))(params)).count("remat") >= case.rematted
    assert_equal_gradients(gradients(other), gradients(model))


@every
def test_sampling_knows_no_longest_text(name):
    """Greedy continuation far beyond block_size equals the argmax of the whole text read anew.

    The head does not see what all hidden states share: else one token is the answer to everything.
    """
    case = CASES[name]
    model, params = model_and_params(name, **({"tie_head": False} if case.cfg.tie_head else {}))
    shared_D = np.asarray(run(model, params, tokens(B, case.T))[0]).mean((0, 1))
    head_DxV = np.random.RandomState(2).normal(size=params["lm_head"]["kernel"].shape).astype(np.float32)
    head_DxV -= np.outer(shared_D, shared_D @ head_DxV) / (shared_D @ shared_D)
    params = params | {"lm_head": {"kernel": head_DxV}}
    prompt, options = tokens(8, 5), {"new_tokens": case.cfg.block_size + 20, "vocab_size": V, "temperature": 0}
    new = np.asarray(generate(model, params, prompt, jax.random.key(0), **options))
    hidden, _ = run(model, params, np.concatenate([prompt, new], axis=1))
    logits = np.einsum("btd,dv->btv", hidden, head_DxV)[:, 4:-1, :V]
    taken = np.take_along_axis(logits, new[..., None], -1)
    assert relative_error(taken[..., 0], logits.max(-1)) < 1e-5  # the largest one, or another that rounding took for it
    pairs = np.unique(np.stack([new[:, :-1], new[:, 1:]]).reshape(2, -1), axis=1)
    assert pairs.shape[1] > len(np.unique(pairs[0])), "the last token alone says what is next"


@every
def test_the_state_has_one_size(name):
    assert state_bytes(dataclasses.replace(CASES[name].cfg, dtype="bfloat16")) == CASES[name].state_bytes


def task_of(cfg, **task):
    return LanguageTask(models.build(cfg), None, LanguageConfig(**task), SampleConfig())


@pytest.mark.parametrize("name", ["mamba", "mamba2", "retnet"])
def test_learning_by_chunks(name):
    """The same loss and gradients as on the whole; without gradients through the state, others."""
    (model, params), cfg, T = model_and_params(name), CASES[name].cfg, CASES[name].T
    batch = {"tokens": tokens(B, T), "targets": np.roll(tokens(B, T), -1, 1)}
    of = lambda task: quick.jit(jax.value_and_grad(lambda p: task.loss(p, batch)[0]))(params)
    off = lambda a, b: max(relative_error(g, w) for g, w in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    loss, want = of(task_of(cfg))
    for chunk_length in (8, 12):
        got_loss, got = of(task_of(cfg, chunk_length=chunk_length))
        assert abs(got_loss / loss - 1) < 1e-6
        assert off(got, want) < 1e-5
    stopped_loss, stopped = of(task_of(cfg, chunk_length=8, chunk_gradient=False))
    assert abs(stopped_loss / loss - 1) < 1e-6

    def by_hand(p):
        state, total = empty_state(model), 0
        for i in range(0, T, 8):
            part = {k: v[:, i : i + 8] for k, v in batch.items()}
            nats, state, _ = task_of(cfg)._nats(p, part["tokens"], part["targets"], None, jax.lax.stop_gradient(state))
            total += nats
        return total

    assert off(stopped, quick.jit(jax.grad(by_hand))(params)) < 1e-5
    assert off(stopped, want) > 1e-3, "nothing was stopped"


def test_a_chunk_must_divide_the_sequence():
    with pytest.raises(UserError, match=r"task.chunk_length=7 does not divide model.block_size=24"):
        task_of(CASES["mamba"].cfg, chunk_length=7)
