"""RWKV-5's and 6's sizes, starting weights and properties: causal, recurrent == parallel, documents kept apart."""

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
from jaxvram.models.rwkv5 import RWKV5, RWKV5Config
from jaxvram.models.rwkv5 import SIZES as SIZES_5
from jaxvram.models.rwkv6 import RWKV6, RWKV6Config
from jaxvram.models.rwkv6 import SIZES as SIZES_6
from jaxvram.sample.text import generate

SMALL = {
    "vocab_size": 29, "vocab_multiple": 8, "block_size": 40, "n_layer": 2, "n_embd": 16, "head_dim": 8, "d_ffn": 24,
    "remat": "none", "dtype": "float32",
}  # fmt: skip
CFGS = {version: RWKV5Config(version=version, **SMALL) for version in ("5.0", "5.1", "5.2")}
CFGS["6"] = RWKV6Config(d_mix=3, d_decay=4, **SMALL)
both = pytest.mark.parametrize("version", ("5.0", "6"))  # decays of heads and of tokens; with a gate and without
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


def test_parameter_counts():
    """Made of the shapes in an official checkpoint. The paper has 0.46 to 7.5 billion of RWKV-5, 1.6 and 3.1 of RWKV-6."""
    found = {name: count(RWKV5Config(version=v, n_layer=L, n_embd=D)) for name, (v, L, D) in SIZES_5.items()}
    V, wanted = 65536, {}
    for name, (version, L, D) in SIZES_5.items():
        F, matrices, vectors = (4 * D, 5, 11) if version == "5.0" else (int(3.5 * D) // 32 * 32, 6, 14)
        of_heads = 2 * D // 64 if version == "5.0" else 0  # time_decay and time_first, which are among the 14 vectors else
        wanted[name] = 2 * V * D + 4 * D + L * (matrices * D**2 + 2 * D * F + vectors * D + of_heads)
    assert found == wanted
    assert found == {
        "0.1b": 192_780_576, "0.4b": 461_721_600, "1.5b": 1_577_754_624, "3b": 3_062_999_040, "7b": 7_518_044_160
    }  # fmt: skip
    found = {name: count(RWKV6Config(n_layer=L, n_embd=D)) for name, (L, D) in SIZES_6.items()}
    for name, (L, D) in SIZES_6.items():
        M, R = (64, 128) if D == 4096 else (32, 64)
        F = int(3.5 * D) // 32 * 32
        wanted[name] = 2 * V * D + 4 * D + L * (6 * D**2 + 2 * D * F + 16 * D + 10 * M * D + 2 * R * D)
    assert found == {name: wanted[name] for name in SIZES_6}
    assert [round(found[name] / 1e9, 1) for name in ("1.6b", "3b", "7b")] == [1.6, 3.1, 7.6]


@pytest.mark.parametrize("version", CFGS)
def test_starting_weights(version):
    """As generate_init_weight and the modules of the authors' code make them, layer by layer."""
    more = {"n_layer": 3, "vocab_size": 100, "d_ffn": 0}
    cfg = dataclasses.replace(CFGS[version], **more)
    L, D, H = 3, 16, 2
    p = quick.jit(lambda key: models.build(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    p = jax.tree.map(np.asarray, p)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    table, head = p["embedding"]["embedding"], p["lm_head"]["kernel"]
    assert 0.9e-4 < np.abs(table).max() <= 1e-4 and (p["ln0"]["scale"] == 1).all()
    same(head @ head.T, 0.25 * 100 / 16 * np.eye(D), atol=1e-4)  # 0.5 sqrt(V / D), orthogonal
    c, maa = np.arange(D) / D, version == "6"
    n = np.arange(D if version in ("5.2", "6") else H)
    to_end = n / (len(n) - 1)
    assert p["layers"]["ffn"]["key"]["kernel"].shape == (L, D, 64 if version == "5.0" else 32)
    for i in range(L):
        layer = jax.tree.map(lambda x, i=i: x[i], p["layers"])
        att, ffn, depth, left = layer["att"], layer["ffn"], i / (L - 1), 1 - i / L
        mixes = {"k": c**left, "v": c**left + 0.3 * depth, "r": c ** (0.5 * left)}
        mixes |= {"x": c**left, "w": c**left} if maa else {}
        mixes |= {} if version == "5.0" else {"g": c ** (0.5 * left)}
        of_token = (lambda x: 1 - x) if maa else (lambda x: x)
        prefix = "time_maa" if maa else "time_mix"
        for name, mix in mixes.items():
            same(att[f"{prefix}_{name}"], of_token(mix))
        for name in "kr":
            same(ffn[f"{prefix}_{name}"], of_token(c ** (left**3 if maa else left)))
        same(att["time_decay"].ravel(), -6 + 5 * to_end ** (0.7 + 1.3 * depth))
        if version == "5.0":
            assert (att["time_first"] == -3).all()
        else:
            zigzag = 0.1 * ((n + 1) % 3 - 1) if len(n) == D else 0
            same(att["time_faaaa"].ravel(), depth * (1 - to_end) + zigzag)
        same(att["ln_x"]["scale"], np.full(D, ((1 + i) / L) ** 0.7))
        for zero in (att["output"], ffn["value"], ffn["receptance"]):
            assert (zero["kernel"] == 0).all()
        gains = {"receptance": 1, "key": 0.1, "value": 1} | ({} if version == "5.0" else {"gate": 0.1})
        for name, gain in gains.items():
            same(att[name]["kernel"] @ att[name]["kernel"].T, gain**2 * np.eye(D))
        same(ffn["key"]["kernel"] @ ffn["key"]["kernel"].T, np.eye(D))
        assert ("gate" in att) == (version != "5.0")
        if maa:
            assert (att["time_maa_w1"] == 0).all() and (att["time_decay_w1"] == 0).all()
            for name in ("time_maa_w2", "time_decay_w2"):
                assert 0.009 < np.abs(att[name]).max() <= 0.01
    matrices = p["layers"]["att"]["key"]["kernel"]
    assert not np.allclose(matrices[0], matrices[1])


@both
def test_causal(version):
    """No gradient from a token to what comes before it, and some to all that comes after."""
    model, params = model_and_params(CFGS[version])
    hidden = lambda x: model.apply({"params": params}, x, None, (None,), True, method="run_layers")[0].sum((0, 2))
    x = np.random.RandomState(0).normal(size=(1, 19, 16)).astype(np.float32)
    reach = np.abs(quick.jit(jax.jacobian(hidden))(x)).sum((1, 3))  # (to, from)
    assert (np.triu(reach, 1) == 0).all() and (reach[np.tril_indices(19)] > 0).all()


@both
@pytest.mark.parametrize("cuts", [(1, 20), tuple(range(1, T))], ids=str)
def test_cut_anywhere_and_carried_on_is_uncut(version, cuts):
    """The last one is decoding: a token at a time."""
    model, params = model_and_params(CFGS[version])
    want, none = run(model, params, tokens())
    assert none is None
    state, parts = model.apply({"params": params}, B, method="initial_state"), []
    for start, end in zip((0, *cuts), (*cuts, T), strict=True):
        part, state = run(model, params, tokens()[:, start:end], state)
        parts.append(part)
    assert relative_error(np.concatenate(parts, axis=1), want) < 1e-5


@both
def test_a_document_remembers_nothing_of_the_one_before(version):
    """With the token that begins documents: each as if it were alone, whole or cut."""
    model, params = model_and_params(dataclasses.replace(CFGS[version], reset_token=28))
    text = np.minimum(tokens(), 27)
    text[:, 20] = 28
    got, _ = run(model, params, text)
    for part in (text[:, :20], text[:, 20:]):
        alone, _ = run(model, params, part)
        assert relative_error(got[:, :20] if part[0, 0] != 28 else got[:, 20:], alone) < 1e-5
    state = model.apply({"params": params}, B, method="initial_state")
    first, state = run(model, params, text[:, :20], state)
    second, _ = run(model, params, text[:, 20:], state)
    assert relative_error(np.concatenate([first, second], 1), got) < 1e-5
    without, _ = run(model_and_params(CFGS[version])[0], params, text)
    assert relative_error(got, without) > 1e-2, "the token changes nothing"


def test_remat_changes_nothing():
    cfg = dataclasses.replace(CFGS["6"], reset_token=3)
    _, params = model_and_params(cfg)
    loss = lambda model: lambda p: jnp.sin(model.apply({"params": p}, tokens())[0]).sum()
    gradients = lambda cfg: quick.jit(jax.grad(loss(models.build(cfg))))(params)
    other = dataclasses.replace(cfg, remat="full")
    assert "remat" in str(jax.make_jaxpr(loss(models.build(other)))(params))
    got, want = gradients(other), gradients(cfg)
    assert (want.pop("lm_head")["kernel"] == 0).all() and got.pop("lm_head")  # hidden states do not know it
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(g, w) < 1e-5


def test_sampling_knows_no_longest_text():
    """Greedy continuation far beyond block_size equals the argmax of the whole text read anew."""
    model, params = model_and_params(CFGS["6"])
    prompt = tokens(1, 5)
    new = np.asarray(generate(model, params, prompt, jax.random.key(0), new_tokens=60, vocab_size=29, temperature=0))
    text = np.concatenate([prompt, new], axis=1)
    hidden, _ = run(model, params, text)
    logits = np.einsum("btd,dv->btv", hidden, params["lm_head"]["kernel"])[..., :29]
    assert (logits.argmax(-1)[0, 4:-1] == new[0]).all()


@both
def test_the_state_has_one_size(version):
    model = models.build(dataclasses.replace(CFGS[version], dtype="bfloat16"))
    state = jax.eval_shape(lambda: model.apply({}, 1, method="initial_state"))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 2 * (2 * 16 * 2 + 4 * 16 * 8)


@pytest.mark.parametrize(("config", "fields", "message"), [
    (RWKV5Config, {"version": "5.3"}, r"model.version='5.3' is none of 5\.0, 5\.1, 5\.2"),
    (RWKV5Config, {"remat": "som"}, r"model.remat='som' is unknown"),
    (RWKV6Config, {"head_dim": 60}, "head_dim=60 does not divide n_embd=2048"),
    (RWKV6Config, {"d_mix": -1}, "none of d_[*] negative"),
    (RWKV6Config, {"n_layer": 0}, "every size must be at least 1"),
    (RWKV6Config, {"reset_token": 65536}, "model.reset_token=65536 is no token"),
])  # fmt: skip
def test_bad_fields(config, fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)


def test_the_class_is_the_configurations():
    assert isinstance(models.build(CFGS["5.1"]), RWKV5) and isinstance(models.build(CFGS["6"]), RWKV6)
