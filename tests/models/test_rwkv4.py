"""RWKV-4's sizes, starting weights and stream; what all recurrent models must do is in test_recurrent.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from recurrent import CASES, B, assert_equal_gradients, count, fresh, model_and_params, run_cut, tokens

from jaxvram import models
from jaxvram.errors import UserError
from jaxvram.models.rwkv4 import RWKV4, SIZES, RWKV4Config

CASE = CASES["rwkv4"]


def test_parameter_counts():
    """Of the checkpoints that the authors trained on the Pile, as their names say."""
    wanted = {"169m": 169_342_464, "430m": 430_397_440, "1.5b": 1_515_106_304, "3b": 2_984_627_200}
    assert {name: count(RWKV4Config(n_layer=L, n_embd=D)) for name, (L, D) in SIZES.items()} == wanted


def test_starting_weights():
    """As generate_init_weight and the modules of the authors' code make them, layer by layer."""
    L, D = 3, 16
    cfg = dataclasses.replace(CASE.cfg, n_layer=L, n_embd=D, vocab_size=100, d_ffn=0, table_range=1e-3)
    p = fresh(cfg)
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


def test_gradients_flow_through_the_state():
    """Cut and carried on, as `task.chunk_length` trains, every parameter has the gradient that it has uncut."""
    (model, params), text = model_and_params("rwkv4"), tokens(B, CASE.T)
    read = lambda model, params, *part: model.apply({"params": params}, *part)
    loss = lambda params, cuts: jnp.sin(run_cut(read, model, params, text, cuts)).sum()
    got, want = (quick.jit(jax.grad(functools.partial(loss, cuts=cuts)))(params) for cuts in ((7, 8), ()))
    assert_equal_gradients(got, want)


def test_the_stream_is_bf16():
    """Where the model computes in bf16, so that this is what a layer keeps."""
    (model, params), text = model_and_params("rwkv4", dtype="bfloat16", remat="full"), tokens(B, CASE.T)
    stream = jax.eval_shape(lambda p: model.apply({"params": p}, text, method="embed"), params)
    hidden, _ = jax.eval_shape(lambda p: model.apply({"params": p}, text), params)
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
    assert isinstance(models.build(CASE.cfg), RWKV4)
