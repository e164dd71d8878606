"""RWKV-4's sizes, starting weights and properties: causal, recurrent == parallel, documents kept apart."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from quick import relative_error

from jaxvram import models
from jaxvram.errors import UserError
from jaxvram.layers.stack import REMAT
from jaxvram.models.rwkv4 import RWKV4, SIZES, RWKV4Config
from jaxvram.sample.text import generate

CFG = RWKV4Config(
    vocab_size=29, vocab_multiple=8, block_size=40, n_layer=3, n_embd=8, d_ffn=12, remat="none", dtype="float32"
)  # fmt: skip
B, T = 2, 20


@functools.cache
def model_and_params(cfg):
    """Weights far larger than a fresh model's, whose layers give nothing."""
    model, random = models.build(cfg), np.random.RandomState(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return model, jax.tree.map(lambda p: random.normal(0.2, 0.6, p.shape).astype(np.float32), shapes)


def tokens(batch=B, length=T):
    return np.random.RandomState(0).randint(0, 29, (batch, length)).astype(np.int32)


@functools.partial(quick.jit, static_argnums=0)
def run(model, params, tokens_BxT, state=None):
    return model.apply({"params": params}, tokens_BxT, state)


def count(cfg):
    shapes = jax.eval_shape(lambda: models.build(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_parameter_counts():
    """Of the checkpoints that the authors trained on the Pile, as their names say."""
    wanted = {"169m": 169_342_464, "430m": 430_397_440, "1.5b": 1_515_106_304, "3b": 2_984_627_200}
    assert {name: count(RWKV4Config(n_layer=L, n_embd=D)) for name, (L, D) in SIZES.items()} == wanted


def test_starting_weights():
    """As generate_init_weight and the modules of the authors' code make them, layer by layer."""
    L, D = 3, 16
    cfg = dataclasses.replace(CFG, n_layer=L, n_embd=D, vocab_size=100, d_ffn=0, table_range=1e-3)
    p = quick.jit(lambda key: models.build(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    p = jax.tree.map(np.asarray, p)
    table, head = p["embedding"]["embedding"], p["lm_head"]["kernel"]
    assert 0.9e-3 < np.abs(table).max() <= 1e-3 and (table[100:] == 0).all() and (p["ln0"]["scale"] == 1).all()
    np.testing.assert_allclose(head @ head.T, 0.25 * 100 / D * np.eye(D), atol=1e-4)  # 0.5 sqrt(V / D), orthogonal
    n = np.arange(D)
    for i in range(L):
        layer = jax.tree.map(lambda x, i=i: x[i], p["layers"])
        att, ffn, depth, left = layer["att"], layer["ffn"], i / (L - 1), 1 - i / L
        same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        for mix in (att["time_mix_k"], att["time_mix_v"] - 0.3 * depth, ffn["time_mix_k"], ffn["time_mix_r"]):
            same(mix, (n / D) ** left)
        same(att["time_mix_r"], (n / D) ** (0.5 * left))
        same(att["time_decay"], -5 + 8 * (n / (D - 1)) ** (0.7 + 1.3 * depth))
        same(att["time_first"], np.log(0.3) + 0.5 * ((n + 1) % 3 - 1))
        for zero in (att["key"], att["receptance"], att["output"], ffn["value"], ffn["receptance"]):
            assert (zero["kernel"] == 0).all()
        same(att["value"]["kernel"] @ att["value"]["kernel"].T, np.eye(D))
        same(ffn["key"]["kernel"] @ ffn["key"]["kernel"].T, 4 * np.eye(D))  # a gain of sqrt(4 D / D)
    assert not np.allclose(*p["layers"]["att"]["value"]["kernel"][:2])


def test_causal():
    """No gradient from a token to what comes before it, and some to all that comes after."""
    model, params = model_and_params(CFG)
    hidden = lambda x: model.apply({"params": params}, x, None, (None,), True, method="run_layers")[0].sum((0, 2))
    x = np.random.RandomState(0).normal(size=(1, 11, 8)).astype(np.float32)
    reach = np.abs(quick.jit(jax.jacobian(hidden))(x)).sum((1, 3))  # (to, from)
    assert (np.triu(reach, 1) == 0).all() and (reach[np.tril_indices(11)] > 0).all()


@pytest.mark.parametrize("cuts", [(1, 12), tuple(range(1, T))], ids=str)
def test_cut_anywhere_and_carried_on_is_uncut(cuts):
    """The last one is decoding: a token at a time."""
    model, params = model_and_params(CFG)
    want, none = run(model, params, tokens())
    assert none is None
    state, parts = model.apply({"params": params}, B, method="initial_state"), []
    for start, end in zip((0, *cuts), (*cuts, T), strict=True):
        part, state = run(model, params, tokens()[:, start:end], state)
        parts.append(part)
    assert relative_error(np.concatenate(parts, axis=1), want) < 1e-5


def test_gradients_flow_through_the_state():
    """Cut and carried on, as `task.chunk_length` trains, every parameter has the gradient that it has uncut."""
    model, params = model_and_params(CFG)

    def loss(params, cuts):
        state, total = model.apply({"params": params}, B, method="initial_state"), 0.0
        for start, end in zip((0, *cuts), (*cuts, T), strict=True):
            hidden, state = model.apply({"params": params}, tokens()[:, start:end], state)
            total += jnp.sin(hidden).sum()
        return total

    got, want = (quick.jit(jax.grad(functools.partial(loss, cuts=cuts)))(params) for cuts in ((7, 8), ()))
    assert got.pop("lm_head") and want.pop("lm_head")  # hidden states do not know it
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(g, w) < 1e-5


def test_a_document_remembers_nothing_of_the_one_before():
    """With the token that begins documents: each as if it were alone, whole or cut."""
    model, params = model_and_params(dataclasses.replace(CFG, reset_token=28))
    text = np.minimum(tokens(), 27)
    text[:, [6, 13]] = 28
    got, _ = run(model, params, text)
    for start, end in ((0, 6), (6, 13), (13, T)):
        alone, _ = run(model, params, text[:, start:end])
        assert relative_error(got[:, start:end], alone) < 1e-5
    state = model.apply({"params": params}, B, method="initial_state")
    first, state = run(model, params, text[:, :6], state)
    second, _ = run(model, params, text[:, 6:], state)
    assert relative_error(np.concatenate([first, second], 1), got) < 1e-5
    without, _ = run(model_and_params(CFG)[0], params, text)
    assert relative_error(got, without) > 1e-2, "the token changes nothing"


@pytest.mark.parametrize("remat", [r for r in REMAT if r != "none"])
def test_remat_changes_nothing(remat):
    cfg = dataclasses.replace(CFG, reset_token=3)
    _, params = model_and_params(cfg)
    loss = lambda model: lambda p: jnp.sin(model.apply({"params": p}, tokens())[0]).sum()
    gradients = lambda cfg: quick.jit(jax.grad(loss(models.build(cfg))))(params)
    other = dataclasses.replace(cfg, remat=remat)
    assert "remat" in str(jax.make_jaxpr(loss(models.build(other)))(params))
    got, want = gradients(other), gradients(cfg)
    assert (want.pop("lm_head")["kernel"] == 0).all() and got.pop("lm_head")  # hidden states do not know it
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(g, w) < 1e-5


def test_sampling_knows_no_longest_text():
    """Greedy continuation far beyond block_size equals the argmax of the whole text read anew."""
    model, params = model_and_params(CFG)
    prompt = tokens(1, 5)
    new = np.asarray(generate(model, params, prompt, jax.random.key(0), new_tokens=60, vocab_size=29, temperature=0))
    text = np.concatenate([prompt, new], axis=1)
    hidden, _ = run(model, params, text)
    logits = np.einsum("btd,dv->btv", hidden, params["lm_head"]["kernel"])[..., :29]
    assert (logits.argmax(-1)[0, 4:-1] == new[0]).all()


def test_the_state_has_one_size():
    model = models.build(dataclasses.replace(CFG, dtype="bfloat16"))
    state = jax.eval_shape(lambda: model.apply({}, 1, method="initial_state"))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 3 * (2 * 8 * 2 + 3 * 8 * 4)


def test_the_stream_is_bf16():
    """Where the model computes in bf16, so that this is what a layer keeps."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16", remat="full")
    model, params = model_and_params(cfg)
    stream = jax.eval_shape(lambda p: model.apply({"params": p}, tokens(), method="embed"), params)
    hidden, _ = jax.eval_shape(lambda p: model.apply({"params": p}, tokens()), params)
    assert stream.dtype == hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize(("fields", "message"), [
    ({"remat": "som"}, r"model.remat='som' is unknown"),
    ({"n_layer": 0}, "every size must be at least 1"),
    ({"table_range": 0.0}, r"table_range=0\.0 must be more than 0"),
    ({"reset_token": 50277}, "model.reset_token=50277 is no token"),
])  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        RWKV4Config(**fields)


def test_the_class_is_the_configurations():
    assert isinstance(models.build(CFG), RWKV4)
