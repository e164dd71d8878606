"""RWKV-7's sizes and starting weights; what all recurrent models must do is in test_recurrent.py."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from recurrent import CASES, count, fresh

from jaxvram import models
from jaxvram.errors import UserError
from jaxvram.models.rwkv7 import RWKV7, SIZES, RWKV7Config

CFG = CASES["rwkv7"].cfg


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
    p = fresh(cfg)
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
