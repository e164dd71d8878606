"""RWKV-5's and 6's sizes and starting weights; what all recurrent models must do is in test_recurrent.py."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from recurrent import CASES, count, fresh

from jaxvram import models
from jaxvram.errors import UserError
from jaxvram.models.rwkv5 import RWKV5, RWKV5Config
from jaxvram.models.rwkv5 import SIZES as SIZES_5
from jaxvram.models.rwkv6 import RWKV6, RWKV6Config
from jaxvram.models.rwkv6 import SIZES as SIZES_6

CFGS = {version: dataclasses.replace(CASES["rwkv5"].cfg, version=version) for version in ("5.0", "5.1", "5.2")}
CFGS["6"] = CASES["rwkv6"].cfg


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
    p = fresh(cfg)
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
