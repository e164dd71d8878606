"""GPT-2's sizes, starting weights and properties: causal, the same with a cache, remat that is on, dropout in place."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram import recipe
from jaxvram.errors import UserError
from jaxvram.kernels import linear_cross_entropy
from jaxvram.layers.stack import REMAT
from jaxvram.models.gpt2 import GPT2, GPT2Config
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig, LanguageTask

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CFG = GPT2Config(
    vocab_size=29, vocab_multiple=8, block_size=16, n_layer=3, n_head=2, n_embd=12, remat="none", dtype="float32"
)
B, T = 2, 16


@functools.cache
def model_and_params(cfg=CFG):
    """Weights far larger than a fresh model's: a fresh one hardly listens to its context."""
    model, random = GPT2(cfg), np.random.RandomState(1)
    params = quick.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    return model, jax.tree.map(lambda p: np.asarray(p) + random.normal(0, 0.4, p.shape).astype(np.float32), params)


def tokens():
    return np.random.RandomState(0).randint(0, CFG.vocab_size, (B, T))


def count(cfg, real_rows=False):
    shapes = jax.eval_shape(lambda: GPT2(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    padding = (cfg.table_rows - cfg.vocab_size) * cfg.n_embd if real_rows else 0
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) - padding


def test_parameter_counts():
    llm_c = GPT2Config(vocab_multiple=128)
    assert (count(llm_c), count(llm_c, real_rows=True)) == (124_475_904, 124_439_808)  # its d12, padded and not
    # nanoGPT's transformer_sizing.ipynb counts without biases
    assert count(GPT2Config(bias=False)) == 124_337_664
    sizes = {"medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
    counts = {k: count(GPT2Config(n_layer=l, n_head=h, n_embd=d)) for k, (l, h, d) in sizes.items()}
    assert counts == {"medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}  # OpenAI's checkpoints


@pytest.mark.parametrize(("variant", "sizes"), [("124m", (12, 12, 768)), ("medium", (24, 16, 1024)),
                                                ("large", (36, 20, 1280)), ("xl", (48, 25, 1600))])  # fmt: skip
def test_recipe_sizes(variant, sizes):
    model = recipe.build(*recipe.load(f"{CONFIGS}/gpt2.py:{variant}")).model
    assert (model.n_layer, model.n_head, model.n_embd, model.table_rows) == (*sizes, 50304)


@pytest.mark.parametrize("name", ["mingpt_sort", "mingpt_adder"])
def test_mingpts_preset(name):
    """gpt-nano: 3 layers, 3 heads, 48 wide; minGPT itself prints 0.09M, without the head."""
    cfg = recipe.build(*recipe.load(f"{CONFIGS}/{name}.py")).model
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == (3, 3, 48)
    assert (cfg.tie_head, cfg.activation, cfg.bias, cfg.dropout) == (False, "gelu_tanh", True, 0.1)
    without_head = count(cfg) - cfg.vocab_size * cfg.n_embd
    assert without_head == (cfg.vocab_size + cfg.block_size) * 48 + 3 * (12 * 48**2 + 13 * 48) + 2 * 48
    assert f"{without_head / 1e6:.2f}M" == "0.09M"


def test_starting_weights():
    """Every matrix and table N(0, 0.02), c_proj N(0, 0.02 / sqrt(2 L)), norms 1, biases 0, padding 0."""
    cfg = GPT2Config(vocab_size=200, vocab_multiple=128, block_size=64, n_layer=8, n_head=4, n_embd=64, tie_head=False)
    p = quick.jit(lambda key: GPT2(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    p = jax.tree.map(np.asarray, p)
    h, small = p["h"], 0.02 / math.sqrt(2 * 8)
    std = lambda x, expected: np.testing.assert_allclose(np.std(x), expected, rtol=0.05)
    for matrix, expected in (
        (p["wte"]["embedding"][:200], 0.02), (p["wpe"]["embedding"], 0.02), (p["lm_head"]["kernel"][:, :200], 0.02),
        (h["attn"]["c_attn"]["kernel"], 0.02), (h["mlp"]["c_fc"]["kernel"], 0.02),
        (h["attn"]["c_proj"]["kernel"], small), (h["mlp"]["c_proj"]["kernel"], small),
    ):  # fmt: skip
        std(matrix, expected)
        assert abs(np.mean(matrix)) < 1e-3
    assert p["wte"]["embedding"].shape == (256, 64) and p["lm_head"]["kernel"].shape == (64, 256)
    assert (p["wte"]["embedding"][200:] == 0).all() and (p["lm_head"]["kernel"][:, 200:] == 0).all()
    assert (p["wte"]["embedding"][:200] != p["lm_head"]["kernel"][:, :200].T).any()
    for path, x in jax.tree.leaves_with_path(p):
        if path[-1].key in ("scale", "bias"):
            assert (x == (path[-1].key == "scale")).all()
        assert x.dtype == jnp.float32


def test_dtypes():
    """bf16: the hidden states; parameters stay as param_dtype says."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16", param_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: GPT2(cfg).init_with_output(jax.random.key(0), jnp.zeros((B, T), jnp.int32)))
    (hidden, _), variables = shapes
    assert hidden.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
    mixed = dataclasses.replace(CFG, dtype="bfloat16")
    (hidden, _), variables = jax.eval_shape(
        lambda: GPT2(mixed).init_with_output(jax.random.key(0), jnp.zeros((B, T), jnp.int32))
    )
    assert hidden.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_causal_by_gradient():
    """Position 10 has no gradient from any later input, and some from every earlier one."""
    model, params = model_and_params()
    x_BxTxD = params["wte"]["embedding"][tokens()]

    def hidden_at_10(x_BxTxD):
        return model.apply({"params": params}, x_BxTxD, method=lambda m, x: m.h(x, None)[0])[:, 10].sum()

    g_BxT = np.abs(quick.jit(jax.grad(hidden_at_10))(x_BxTxD)).sum(-1)
    assert (g_BxT[:, 11:] == 0).all() and (g_BxT[:, :11] > 1e-4).all()


@pytest.mark.parametrize("remat", ["none", "nested"])
@pytest.mark.parametrize("cuts", [(T,), (10, T - 10), (1, 3, 5, 7), (1,) * T], ids=str)
def test_cached_equals_whole(cuts, remat):
    """Cut anywhere and passed on through the cache, even token by token: the hidden states are those of the whole."""
    _, params = model_and_params()
    run, whole_BxTxD, _ = cached_run(remat)
    state, parts = GPT2(CFG).apply({"params": params}, B, method="initial_state"), []
    for start, length in zip(np.cumsum((0, *cuts[:-1])), cuts, strict=True):
        part, state = run(params, tokens()[:, start : start + length], state)
        parts.append(part)
    assert quick.relative_error(np.concatenate(parts, axis=1), whole_BxTxD) < 1e-5
    assert (state.length == T).all()
    _, _, filled = cached_run(remat)
    assert quick.relative_error(state.k_BxSxHxK, filled.k_BxSxHxK) < 1e-5
    assert quick.relative_error(state.v_BxSxHxK, filled.v_BxSxHxK) < 1e-5


@functools.cache
def cached_run(remat):
    """A jitted forward pass with a state; the hidden states of the whole without any; the cache that the whole fills."""
    model, params = GPT2(dataclasses.replace(CFG, remat=remat)), model_and_params()[1]
    run = quick.jit(lambda params, tokens_BxT, state: model.apply({"params": params}, tokens_BxT, state))
    whole_BxTxD, nothing = run(params, tokens(), None)
    assert nothing is None
    _, filled = run(params, tokens(), model.apply({"params": params}, B, method="initial_state"))
    return run, whole_BxTxD, filled


def test_positions_after_the_cached_ones_count():
    """The same token later is another input: position embeddings go on from the cache's length."""
    model, params = model_and_params()
    run, _, _ = cached_run("none")
    same = np.full((B, 4), 7)
    empty = model.apply({"params": params}, B, method="initial_state")
    _, state = run(params, same, empty)
    later, _ = run(params, same, state)
    first, _ = run(params, same, empty)
    assert quick.relative_error(later, first) > 0.01


def test_too_many_tokens():
    model, params = model_and_params()
    with pytest.raises(ValueError, match="17 tokens exceed block_size=16"):
        model.apply({"params": params}, np.zeros((1, 17), np.int32))


def loss_of(cfg, batch_tokens, key=None):
    task = LanguageTask(GPT2(cfg), None, LanguageConfig(), SampleConfig())
    batch = {"tokens": batch_tokens, "targets": np.roll(batch_tokens, -1, axis=1)}
    return lambda params: task.loss(params, batch, key)[0]


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
def test_remat_is_on(unroll):
    for remat in REMAT:
        cfg = dataclasses.replace(CFG, remat=remat, unroll_layers=unroll)
        jaxpr = str(jax.make_jaxpr(loss_of(cfg, tokens()))(model_and_params()[1]))
        assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (remat != "none")


def test_remat_changes_nothing_under_dropout():
    """The recomputed forward pass draws the same masks."""
    _, params = model_and_params()
    loss = lambda remat: loss_of(dataclasses.replace(CFG, remat=remat, dropout=0.3), tokens(), jax.random.key(0))
    none, full = (quick.jit(jax.grad(loss(remat)))(params) for remat in ("none", "full"))
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, full, none))) < 1e-5


def test_dropout_where_and_when():
    """Only with a key; in embeddings, probabilities and both branches: each alone moves the result."""
    cfg = dataclasses.replace(CFG, dropout=0.3)
    _, params = model_and_params()
    with_key = quick.jit(lambda key, params: loss_of(cfg, tokens(), key)(params))
    loss = lambda key: float(with_key(key, params))
    assert loss(None) == float(quick.jit(loss_of(CFG, tokens()))(params))
    assert loss(jax.random.key(0)) == loss(jax.random.key(0)) != loss(jax.random.key(1))
    jaxpr = str(jax.make_jaxpr(lambda key: loss_of(cfg, tokens(), key)(params))(jax.random.key(0)))
    # embeddings; then in the layer loop, written once: probabilities, and what both branches add
    draws = [line for line in jaxpr.splitlines() if "name=_bernoulli" in line]
    assert len(draws) == 4


def test_no_logits_of_the_whole_batch(monkeypatch):
    """Nothing of size batch x length x vocabulary, forward or backward, in the compiled gradient."""
    cfg = dataclasses.replace(CFG, vocab_size=99)
    rows = cfg.table_rows
    assert rows == 104  # the size of nothing else here
    params = jax.eval_shape(lambda: GPT2(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])

    def largest_with_vocabulary(as_text):
        grad = jax.grad(loss_of(cfg, tokens()))  # a new function each time: nothing traced before is used again
        return max(math.prod(shape) for shape in quick.shapes(as_text(grad)) if rows in shape)

    jaxpr = lambda grad: jax.make_jaxpr(grad)(params)
    compiled = lambda grad: jax.jit(grad).lower(params).compile().as_text()
    assert largest_with_vocabulary(jaxpr) >= B * T * rows  # one chunk: all logits are there
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_BUDGET", 4 * B * rows * 4)  # four positions
    assert largest_with_vocabulary(jaxpr) < B * T * rows
    assert largest_with_vocabulary(compiled) < B * T * rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "gelu_tan"}, "model.activation='gelu_tan' is unknown; did you mean 'gelu_tanh'"),
        ({"remat": "ful"}, "model.remat='ful' is unknown; did you mean 'full'"),
        ({"dtype": "float16"}, "model.dtype='float16' is unknown"),
        ({"param_dtype": "fp32"}, "model.param_dtype='fp32' is unknown"),
        ({"n_head": 5}, "model.n_embd=768 is not a multiple of model.n_head=5"),
        ({"n_layer": 0}, "must be at least 1"),
        ({"dropout": 1.0}, r"model.dropout=1.0 is not in \[0, 1\)"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        GPT2Config(**fields)
