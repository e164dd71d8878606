"""RWKV-7's sizes, starting weights and properties: causal, recurrent == parallel, documents kept apart."""

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
from jaxvram.models.rwkv7 import RWKV7, SIZES, RWKV7Config
from jaxvram.sample.text import generate

CFG = RWKV7Config(
    vocab_size=29, vocab_multiple=8, block_size=40, n_layer=3, n_embd=16, head_dim=8, d_ffn=24, d_decay=3, d_rate=3,
    d_value=2, d_gate=5, remat="none", dtype="float32",
)  # fmt: skip
B, T = 2, 40


@functools.cache
def model_and_params(cfg):
    """Weights far larger than a fresh model's, whose layers give nothing."""
    model, random = models.build(cfg), np.random.RandomState(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return model, jax.tree.map(lambda p: random.normal(0.2, 0.4, p.shape).astype(np.float32), shapes)


def tokens(batch=B, length=T):
    return np.random.RandomState(0).randint(0, 29, (batch, length)).astype(np.int32)


@functools.partial(quick.jit, static_argnums=0)
def run(model, params, tokens_BxT, state=None):
    return model.apply({"params": params}, tokens_BxT, state)


def count(cfg):
    shapes = jax.eval_shape(lambda: models.build(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def of_size(name):
    n_layer, n_embd, (w, a, v, g) = SIZES[name]
    return RWKV7Config(n_layer=n_layer, n_embd=n_embd, d_decay=w, d_rate=a, d_value=v, d_gate=g)


def test_parameter_counts():
    """Of the checkpoints that the authors published, and of what today's training code makes, whose ranks are others."""
    wanted = {"0.1b": 191_034_624, "0.4b": 450_767_872, "1.5b": 1_527_404_544, "2.9b": 2_947_735_040}
    assert {name: count(of_size(name)) for name in SIZES} == wanted
    unused = lambda cfg: (2 * cfg.rank("v") + 1) * cfg.n_embd  # theirs has v0, v1, v2 in layer 0 too, and reads them nowhere
    todays = {name: RWKV7Config(n_layer=L, n_embd=D) for name, (L, D, _) in SIZES.items()}
    assert [[cfg.rank(x) for x in "wavg"] for cfg in todays.values()] == [
        [64, 64, 32, 128], [64, 64, 64, 160], [128, 128, 64, 224], [128, 128, 96, 256],
    ]  # fmt: skip
    wanted = {"0.1b": 191_084_544, "0.4b": 453_980_160, "1.5b": 1_530_814_464, "2.9b": 2_953_308_160}
    assert {name: count(cfg) + unused(cfg) for name, cfg in todays.items()} == wanted


def test_starting_weights():
    """As generate_init_weight and the modules of the authors' code make them, layer by layer."""
    cfg = dataclasses.replace(CFG, n_layer=4, n_embd=64, head_dim=16, vocab_size=200, d_ffn=0, d_gate=0)
    L, D, N = 4, 64, 16
    p = quick.jit(lambda key: models.build(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    p = jax.tree.map(np.asarray, p)
    table, head = p["embedding"]["embedding"], p["lm_head"]["kernel"]
    assert 0.9e-4 < np.abs(table).max() <= 1e-4 and (p["ln0"]["scale"] == 1).all()
    np.testing.assert_allclose(head @ head.T, 0.25 * 200 / 64 * np.eye(D), atol=1e-4)  # 0.5 sqrt(V / D), orthogonal
    n = np.arange(D)
    zigzag = ((n % N) - 7.5) / 7.5 * np.abs(((n % N) - 7.5) / 7.5)
    linear = n / (D - 1) - 0.5
    for i in range(L):
        layer = p["first"] if i == 0 else jax.tree.map(lambda x, i=i: x[i - 1], p["layers"])
        att, ffn, depth, left = layer["att"], layer["ffn"], i / (L - 1), 1 - i / L
        same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            same(att[f"x_{name}"], 1 - (n / D) ** (power * left))
        same(ffn["x_k"], 1 - (n / D) ** (left**4))
        same(att["w0"], -6 + 6 * (n / (D - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
        same(att["a0"], -0.19 + 0.3 * zigzag + 0.4 * linear)
        same(att["k_k"], 0.71 - 0.1 * linear)
        same(att["ln_x_scale"], np.full(D, ((1 + i) / L) ** 0.7))
        assert (att["k_a"] == np.float32(1.02)).all() and (att["r_k"] == np.float32(-0.04)).all()
        assert ("v0" in att) == (i > 0)
        for zero in (att["output"], ffn["value"]):
            assert (zero["kernel"] == 0).all()
        for pair in "wag" if i == 0 else "wavg":
            assert (att[f"{pair}1"] == 0).all()
            same(att[f"{pair}2"] @ att[f"{pair}2"].T, 0.01 * np.eye(len(att[f"{pair}2"])))
        for name, gain in (("receptance", 1), ("key", 0.1), ("value", 1)):
            same(att[name]["kernel"] @ att[name]["kernel"].T, gain**2 * np.eye(D))
        same(ffn["key"]["kernel"] @ ffn["key"]["kernel"].T, np.eye(D))
    layers = p["layers"]["att"]["key"]["kernel"]
    assert not np.allclose(layers[0], layers[1])


def test_causal():
    """No gradient from a token to what comes before it, and some to all that comes after."""
    model, params = model_and_params(CFG)
    hidden = lambda x: model.apply({"params": params}, x, None, (None,), True, method="run_layers")[0].sum((0, 2))
    x = np.random.RandomState(0).normal(size=(1, 19, 16)).astype(np.float32)
    reach = np.abs(quick.jit(jax.jacobian(hidden))(x)).sum((1, 3))  # (to, from)
    assert (np.triu(reach, 1) == 0).all() and (reach[np.tril_indices(19)] > 0).all()


@pytest.mark.parametrize("cuts", [(1, 20), (17, 18), tuple(range(1, T))], ids=str)
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


def test_a_document_remembers_nothing_of_the_one_before():
    """With the token that begins documents: each as if it were alone, whole or cut."""
    model, params = model_and_params(dataclasses.replace(CFG, reset_token=28))
    text = np.minimum(tokens(), 27)
    text[:, [9, 30]] = 28
    got, _ = run(model, params, text)
    for start, end in ((0, 9), (9, 30), (30, T)):
        alone, _ = run(model, params, text[:, start:end])
        assert relative_error(got[:, start:end], alone) < 1e-5
    state = model.apply({"params": params}, B, method="initial_state")
    first, state = run(model, params, text[:, :9], state)
    second, _ = run(model, params, text[:, 9:], state)
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
    assert str(jax.make_jaxpr(loss(models.build(other)))(params)).count("remat") >= 2  # the first layer's, and the others'
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
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 3 * (2 * 16 * 2 + 4 * 16 * 8)


@pytest.mark.parametrize(("fields", "message"), [
    ({"remat": "som"}, r"model.remat='som' is unknown"),
    ({"head_dim": 60}, "head_dim=60 does not divide n_embd=768"),
    ({"n_layer": 1}, "n_layer=1: RWKV-7 has at least 2 layers"),
    ({"reset_token": 65536}, "model.reset_token=65536 is no token"),
])  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        RWKV7Config(**fields)


def test_the_class_is_the_configurations():
    assert isinstance(models.build(CFG), RWKV7)
