"""Mamba's and Mamba-2's sizes and starting weights; of RetNet too: causal, recurrent == parallel, documents kept apart."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from quick import relative_error

from jaxvram import models, recipe
from jaxvram.errors import UserError
from jaxvram.layers.stack import REMAT
from jaxvram.models import mamba, mamba2
from jaxvram.models.mamba import Mamba, MambaConfig
from jaxvram.models.mamba2 import Mamba2, Mamba2Config
from jaxvram.models.retnet import RetNetConfig
from jaxvram.sample.text import SampleConfig, generate
from jaxvram.tasks.language import LanguageConfig, LanguageTask

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
COMMON = {"vocab_size": 29, "vocab_multiple": 8, "block_size": 24, "n_layer": 3, "n_embd": 8, "remat": "none"}
CFGS = {
    "mamba": MambaConfig(**COMMON, d_state=4, dtype="float32"),
    "mamba2": Mamba2Config(**COMMON, d_state=8, head_dim=4, n_groups=2, dtype="float32"),
    # a large eps, as rounding errors are magnified where all values of a head are small
    "retnet": RetNetConfig(**COMMON, n_head=2, d_value=12, n_inner=10, norm_eps=1e-2, tie_head=True, dtype="float32"),
}
B, T = 2, 24
both = pytest.mark.parametrize("name", ["mamba", "mamba2"])
every = pytest.mark.parametrize("name", CFGS)


@functools.cache
def model_and_params(cfg):
    """Weights far larger than a fresh model's: a fresh one hardly listens to its context."""
    model, random = models.build(cfg), np.random.RandomState(1)
    params = quick.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    return model, jax.tree.map(lambda p: np.asarray(p) + random.normal(0, 0.3, p.shape).astype(np.float32), params)


def tokens(batch=B, length=T):
    return np.random.RandomState(0).randint(0, 29, (batch, length)).astype(np.int32)


@functools.partial(quick.jit, static_argnums=0)
def run(model, params, tokens_BxT, state=None):
    return model.apply({"params": params}, tokens_BxT, state)


def count(cfg):
    shapes = jax.eval_shape(lambda: models.build(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_parameter_counts():
    """Of the checkpoints that the authors published: a table of 50280 rows (Mamba-2: 50288)."""
    wanted = {"130m": 129_135_360, "370m": 371_516_416, "790m": 793_204_224, "1.4b": 1_372_178_432, "2.8b": 2_768_345_600}
    assert {k: count(MambaConfig(n_layer=L, n_embd=D)) for k, (L, D) in mamba.SIZES.items()} == wanted
    wanted = {"130m": 128_989_632, "370m": 368_346_624, "780m": 780_161_280, "1.3b": 1_343_757_312, "2.7b": 2_702_599_680}
    assert {k: count(Mamba2Config(n_layer=L, n_embd=D)) for k, (L, D) in mamba2.SIZES.items()} == wanted


@both
def test_recipes_have_the_papers_sizes(name):
    for variant, (n_layer, n_embd) in {"mamba": mamba.SIZES, "mamba2": mamba2.SIZES}[name].items():
        if variant in ("2.8b", "2.7b"):  # no optimizer of ours trains them in 12 GB
            continue
        built = recipe.build(*recipe.load(f"{CONFIGS}/{name}.py:{variant}"))
        assert (built.model.n_layer, built.model.n_embd, built.model.table_rows) == (n_layer, n_embd, 50304)
        assert built.model.reset_token == 50256  # what llm.c's shards put before each document


@both
def test_starting_weights(name):
    many_heads = {"head_dim": 1} if name == "mamba2" else {}
    cfg = dataclasses.replace(CFGS[name], n_layer=4, n_embd=64, vocab_size=500, **many_heads)
    p = quick.jit(lambda key: models.build(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    p = jax.tree.map(np.asarray, p)
    mixer, E = p["layers"]["mixer"], cfg.d_inner
    table = p["embedding"]["embedding"]
    assert (table[500:] == 0).all() and abs(table[:500].std() / 0.02 - 1) < 0.02
    for matrix, bound in (("in_proj", 64**-0.5), ("out_proj", E**-0.5 / 2)):  # of 4 layers
        kernel = mixer[matrix]["kernel"]
        assert 0.99 * bound < np.abs(kernel).max() <= bound and abs(kernel.std() / bound - 3**-0.5) < 0.02
    for leaf in mixer["conv1d"].values():
        assert 0.45 < np.abs(leaf).max() <= 0.5
    delta = np.log1p(np.exp(mixer["dt_bias"]))
    assert 0.99e-3 < delta.min() < 1.5e-3 and 0.07 < delta.max() < 0.101
    assert abs(np.log(delta).mean() - np.log(0.01)) < 0.2  # uniform in its logarithm
    assert (mixer["D"] == 1).all()
    if name == "mamba":
        np.testing.assert_allclose(np.exp(mixer["A_log"]), np.broadcast_to(np.arange(1.0, 5), (4, E, 4)), rtol=1e-6)
        assert np.abs(mixer["dt_proj"]["kernel"]).max() <= cfg.rank**-0.5
    else:
        A = np.exp(mixer["A_log"])
        assert 1 <= A.min() < 1.5 and 15 < A.max() <= 16 and abs(A.mean() - 8.5) < 0.7


@every
def test_causal(name):
    """No gradient from a token to what comes before it, and some to all that comes after."""
    model, params = model_and_params(CFGS[name])

    def hidden(x_1xTxD):
        layers = lambda m, x: m.layers(x, None, *m.extras(tokens(1, 9), None, None))[0]
        return model.apply({"params": params}, x_1xTxD, method=layers).sum((0, 2))

    x = np.random.RandomState(0).normal(size=(1, 9, 8)).astype(np.float32)
    reach = np.abs(quick.jit(jax.jacobian(hidden))(x)).sum((1, 3))  # (to, from)
    assert (np.triu(reach, 1) == 0).all() and (reach[np.tril_indices(9)] > 0).all()


@every
@pytest.mark.parametrize("cuts", [(1, 2, 3), (7,), (11, 23), tuple(range(1, T))], ids=str)
def test_cut_anywhere_and_carried_on_is_uncut(name, cuts):
    """The last one is decoding: a token at a time."""
    model, params = model_and_params(CFGS[name])
    want, none = run(model, params, tokens())
    assert none is None
    state, parts = model.apply({"params": params}, B, method="initial_state"), []
    for start, end in zip((0, *cuts), (*cuts, T), strict=True):
        part, state = run(model, params, tokens()[:, start:end], state)
        parts.append(part)
    assert relative_error(np.concatenate(parts, axis=1), want) < 1e-5


@every
@pytest.mark.parametrize("at", [(0,), (1, 2), (5, 13), (23,)], ids=str)
def test_a_document_remembers_nothing_of_the_one_before(name, at):
    """With the token that begins documents: each as if it were alone, whole or cut."""
    cfg = dataclasses.replace(CFGS[name], reset_token=28)
    model, params = model_and_params(cfg)
    text = np.minimum(tokens(), 27)
    text[:, list(at)] = 28
    got, _ = run(model, params, text)
    for start, end in zip((0, *at), (*at, T), strict=True):
        if end > start:
            alone, _ = run(model, params, text[:, start:end])
            assert relative_error(got[:, start:end], alone) < 1e-5
    state = model.apply({"params": params}, B, method="initial_state")
    first, state = run(model, params, text[:, :6], state)
    second, _ = run(model, params, text[:, 6:], state)
    assert relative_error(np.concatenate([first, second], 1), got) < 1e-5
    without, _ = run(models.build(CFGS[name]), params, text)
    assert at == (0,) or relative_error(got, without) > 1e-2, "the token changes nothing"


@every
@pytest.mark.parametrize("remat", [r for r in REMAT if r != "none"])
def test_remat_changes_nothing(name, remat):
    cfg = dataclasses.replace(CFGS[name], n_layer=4, reset_token=3)
    model, params = model_and_params(cfg)

    def gradients(model):
        return quick.jit(jax.grad(lambda p: jnp.sin(model.apply({"params": p}, tokens())[0]).sum()))(params)

    other = dataclasses.replace(cfg, remat=remat, unroll_layers=remat == "dots")
    want, got = gradients(model), gradients(models.build(other))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(g, w) < 1e-5


def task_of(cfg, **task):
    return LanguageTask(models.build(cfg), None, LanguageConfig(**task), SampleConfig())


@every
def test_learning_by_chunks(name):
    """The same loss and gradients as on the whole; without gradients through the state, others."""
    cfg = CFGS[name]
    _, params = model_and_params(cfg)
    batch = {"tokens": tokens(), "targets": np.roll(tokens(), -1, 1)}
    of = lambda task: quick.jit(jax.value_and_grad(lambda p: task.loss(p, batch)[0]))(params)
    loss, want = of(task_of(cfg))
    for chunk_length in (8, 12):
        got_loss, got = of(task_of(cfg, chunk_length=chunk_length))
        assert abs(got_loss / loss - 1) < 1e-6
        assert max(relative_error(g, w) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)) < 1e-5
    stopped_loss, stopped = of(task_of(cfg, chunk_length=8, chunk_gradient=False))
    assert abs(stopped_loss / loss - 1) < 1e-6

    def by_hand(p):
        model, total = models.build(cfg), 0
        state = model.apply({"params": p}, B, method="initial_state")
        for i in range(0, T, 8):
            part = {k: v[:, i : i + 8] for k, v in batch.items()}
            nats, state, _ = task_of(cfg)._nats(p, part["tokens"], part["targets"], None, jax.lax.stop_gradient(state))
            total += nats
        return total

    off = lambda a, b: max(relative_error(g, w) for g, w in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert off(stopped, quick.jit(jax.grad(by_hand))(params)) < 1e-5
    assert off(stopped, want) > 1e-3, "nothing was stopped"


@every
def test_sampling_knows_no_longest_text(name):
    """Greedy continuation far beyond block_size equals the argmax of the whole text read anew."""
    model, params = model_and_params(CFGS[name])
    prompt = tokens(1, 5)
    new = np.asarray(
        generate(model, params, prompt, jax.random.key(0), new_tokens=40, vocab_size=29, temperature=0)
    )
    text = np.concatenate([prompt, new], axis=1)
    hidden, _ = run(model, params, text)
    logits = np.einsum("btd,vd->btv", hidden, params["embedding"]["embedding"])[..., :29]
    assert (logits.argmax(-1)[0, 4:-1] == new[0]).all()


@both
def test_the_state_has_one_size(name):
    cfg = dataclasses.replace(CFGS[name], dtype="bfloat16")
    model = models.build(cfg)
    state = jax.eval_shape(lambda: model.apply({}, 1, method="initial_state"))
    channels = cfg.d_inner + (2 * cfg.n_groups * cfg.d_state if name == "mamba2" else 0)
    bytes_a_layer = 3 * channels * 2 + 4 * cfg.d_inner * cfg.d_state
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == cfg.n_layer * bytes_a_layer


@pytest.mark.parametrize(("cls", "fields", "message"), [
    (MambaConfig, {"remat": "som"}, r"model.remat='som' is unknown"),
    (MambaConfig, {"dtype": "float16"}, "model.dtype='float16' is unknown"),
    (MambaConfig, {"d_conv": 1}, "d_conv at least 2"),
    (MambaConfig, {"reset_token": 50277}, "model.reset_token=50277 is no token"),
    (Mamba2Config, {"head_dim": 60}, "head_dim=60 does not divide"),
    (Mamba2Config, {"n_groups": 5}, "n_groups=5 does not divide the 24 heads"),
    (Mamba2Config, {"kernels": "cuda"}, "model.kernels='cuda' is unknown"),
])  # fmt: skip
def test_bad_fields(cls, fields, message):
    with pytest.raises(UserError, match=message):
        cls(**fields)


def test_a_chunk_must_divide_the_sequence():
    with pytest.raises(UserError, match=r"task.chunk_length=7 does not divide model.block_size=24"):
        task_of(CFGS["mamba"], chunk_length=7)


def test_the_classes_are_the_configurations():
    assert isinstance(models.build(CFGS["mamba"]), Mamba) and isinstance(models.build(CFGS["mamba2"]), Mamba2)
