"""Llama's sizes, starting weights and properties: causal, the same with a cache, packed or alone, in either RoPE layout."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.errors import UserError
from jaxvram.layers.linear import Linear
from jaxvram.layers.stack import REMAT
from jaxvram.models.llama import SIZES, Llama, LlamaAttention, LlamaConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig, LanguageTask

CFG = LlamaConfig(
    vocab_size=29, vocab_multiple=8, block_size=16, n_layer=3, n_head=4, n_kv_head=2, n_embd=16, n_inner=24,
    rope_theta=100.0, remat="none", dtype="float32",
)  # fmt: skip
B, T = 2, 16


@functools.cache
def model_and_params():
    """Weights far larger than a fresh model's: a fresh one hardly listens to its context."""
    model, random = Llama(CFG), np.random.RandomState(1)
    params = quick.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    return model, jax.tree.map(lambda p: np.asarray(p) + random.normal(0, 0.4, p.shape).astype(np.float32), params)


def tokens():
    return np.random.RandomState(0).randint(0, CFG.vocab_size, (B, T))


@functools.cache
def runner(cfg=CFG):
    """A jitted forward pass: (params, tokens, state, segments) -> (hidden, state)."""
    model = Llama(cfg)
    run = lambda params, tokens, state=None, segments=None: model.apply({"params": params}, tokens, state, segments)
    return quick.jit(run)


@functools.cache
def whole():
    return np.asarray(runner()(model_and_params()[1], tokens())[0])


def shapes_of(cfg):
    return jax.eval_shape(lambda: Llama(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tinyllama-1.1b", 1_100_048_384),
        ("openllama-3b", 3_426_473_600),
        ("openllama-7b", 6_738_415_616),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
    ],
)
def test_parameter_counts(name, parameters):
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(LlamaConfig(**SIZES[name])))) == parameters


def test_every_preset_is_counted_above():
    marks = {mark.name: mark for mark in test_parameter_counts.pytestmark}
    assert {name for name, _ in marks["parametrize"].args[1]} == set(SIZES)


def test_the_tree_is_what_others_rely_on():
    """Names and orientation: fine-tuning and conversion go by them."""
    cfg = dataclasses.replace(CFG, head_dim=6, attention_bias=True)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
             for path, x in jax.tree.leaves_with_path(shapes_of(cfg))}  # fmt: skip
    attn = {"q_proj": (16, 24), "k_proj": (16, 12), "v_proj": (16, 12), "o_proj": (24, 16)}
    mlp = {"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}
    want = {f"layers/attn/{name}/kernel": (3, *shape) for name, shape in attn.items()}
    want |= {f"layers/attn/{name}/bias": (3, shape[1]) for name, shape in attn.items()}
    want |= {f"layers/mlp/{name}/kernel": (3, *shape) for name, shape in mlp.items()}
    want |= {"layers/input_norm/scale": (3, 16), "layers/post_norm/scale": (3, 16), "norm/scale": (16,)}
    assert names == want | {"embed_tokens/embedding": (32, 16), "lm_head/kernel": (16, 32)}


def test_starting_weights():
    """Every matrix and table N(0, init_std), those that write to the stream too; norms 1, biases 0, padding 0."""
    cfg = LlamaConfig(
        vocab_size=200, vocab_multiple=128, block_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, n_inner=96,
        attention_bias=True, init_std=0.05,
    )  # fmt: skip
    p = quick.jit(lambda key: Llama(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    p = jax.tree.map(np.asarray, p)
    assert (p["embed_tokens"]["embedding"][200:] == 0).all() and (p["lm_head"]["kernel"][:, 200:] == 0).all()
    for path, x in jax.tree.leaves_with_path(p):
        name = path[-1].key
        if name in ("scale", "bias"):
            assert (x == (name == "scale")).all()
        else:
            x = x[:200] if name == "embedding" else x[:, :200] if path[0].key == "lm_head" else x
            np.testing.assert_allclose(np.std(x), 0.05, rtol=0.05)
        assert x.dtype == jnp.float32
    layers = p["layers"]["mlp"]["down_proj"]["kernel"]
    assert (layers[0] != layers[1]).any()


def test_dtypes():
    """bf16: hidden states and the cache; parameters stay as param_dtype says."""
    for param_dtype in ("float32", "bfloat16"):
        model = Llama(dataclasses.replace(CFG, dtype="bfloat16", param_dtype=param_dtype))
        made = lambda: model.init_with_output(jax.random.key(0), jnp.zeros((B, T), jnp.int32))  # noqa: B023
        (hidden, _), variables = jax.eval_shape(made)
        assert hidden.dtype == jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}
        cache = jax.eval_shape(lambda v: model.apply(v, B, method="initial_state"), variables)  # noqa: B023
        assert cache.k_BxSxHxK.shape == (3, B, 16, 2, 4) and cache.k_BxSxHxK.dtype == jnp.bfloat16


def test_causal_by_gradient():
    """Position 10 has no gradient from any later input, and some from every earlier one."""
    model, params = model_and_params()
    x_BxTxD = params["embed_tokens"]["embedding"][tokens()]

    def hidden_at_10(x_BxTxD):
        embed = lambda next_fun, args, kwargs, at: x_BxTxD if at.module.name == "embed_tokens" else next_fun(*args, **kwargs)
        with nn.intercept_methods(embed):
            return model.apply({"params": params}, tokens())[0][:, 10].sum()

    g_BxT = np.abs(quick.jit(jax.grad(hidden_at_10))(x_BxTxD)).sum(-1)
    assert (g_BxT[:, 11:] == 0).all() and (g_BxT[:, :11] > 1e-4).all()


@pytest.mark.parametrize("cuts", [(T,), (10, T - 10), (1, 3, 5, 7), (1,) * T], ids=str)
def test_cached_equals_whole(cuts):
    """Cut anywhere and passed on through the cache, even token by token: the hidden states are those of the whole."""
    model, params = model_and_params()
    state, parts = model.apply({"params": params}, B, method="initial_state"), []
    for start, length in zip(np.cumsum((0, *cuts[:-1])), cuts, strict=True):
        part, state = runner()(params, tokens()[:, start : start + length], state)
        parts.append(part)
    assert quick.relative_error(np.concatenate(parts, axis=1), whole()) < 1e-5
    assert (state.length == T).all()


def test_packed_segments_equal_each_alone():
    """Three examples in a row, of which nothing crosses a border, and no positions are given."""
    _, params = model_and_params()
    lengths = (5, 7, 4)
    segments_BxT = np.broadcast_to(np.repeat(np.arange(3), lengths), (B, T))
    packed_BxTxD, nothing = runner()(params, tokens(), None, segments_BxT)
    assert nothing is None
    start = 0
    for length in lengths:
        alone_BxTxD, _ = runner()(params, tokens()[:, start : start + length])
        assert quick.relative_error(packed_BxTxD[:, start : start + length], alone_BxTxD) < 1e-5
        start += length
    assert quick.relative_error(packed_BxTxD[:, 5:], whole()[:, 5:]) > 0.1


def test_the_other_rope_layout_is_the_same_model():
    """Columns of W_q and W_k in the order 0, K/2, 1, K/2 + 1, ... of each head."""
    _, params = model_and_params()
    cfg, K = dataclasses.replace(CFG, rope_layout="interleaved"), CFG.key_size
    order = np.arange(K).reshape(2, K // 2).T.ravel()

    def moved(path, p):
        if path[-2].key not in ("q_proj", "k_proj"):
            return p
        return p.reshape(*p.shape[:-1], -1, K)[..., order].reshape(p.shape)

    theirs = jax.tree_util.tree_map_with_path(moved, params)
    assert quick.relative_error(runner(cfg)(theirs, tokens())[0], whole()) < 1e-5
    assert quick.relative_error(runner(cfg)(params, tokens())[0], whole()) > 0.01


def test_a_group_of_one_is_plain_attention():
    """With key heads repeated, as many of them as of queries give the same."""
    _, params = model_and_params()
    repeated = lambda p: np.repeat(p.reshape(3, 16, 2, 4), 2, axis=2).reshape(3, 16, 16)
    attn = params["layers"]["attn"]
    attn = attn | {name: {"kernel": repeated(attn[name]["kernel"])} for name in ("k_proj", "v_proj")}
    plain = params | {"layers": params["layers"] | {"attn": attn}}
    cfg = dataclasses.replace(CFG, n_kv_head=4)
    assert quick.relative_error(runner(cfg)(plain, tokens())[0], whole()) < 1e-5


def test_too_many_tokens_and_segments_with_a_cache():
    model, params = model_and_params()
    with pytest.raises(ValueError, match="17 tokens exceed block_size=16"):
        model.apply({"params": params}, np.zeros((1, 17), np.int32))
    empty = model.apply({"params": params}, B, method="initial_state")
    with pytest.raises(ValueError, match="pack without a state"):
        model.apply({"params": params}, tokens(), empty, np.zeros((B, T), np.int32))


def test_every_matrix_and_the_attention_can_be_intercepted():
    """LoRA and adapters wrap modules by name, from outside, through the loop over layers."""
    model, params = model_and_params()
    seen, attended = set(), []

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            seen.add("/".join(context.module.path))
        if isinstance(context.module, LlamaAttention) and context.method_name == "attend":
            q, k, v = args
            attended.append((q.shape, k.shape, v.shape))
            return jnp.zeros_like(q)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        silenced, _ = model.apply({"params": params}, tokens())
    assert seen == {f"attn/{n}_proj" for n in "qkvo"} | {f"mlp/{n}_proj" for n in ("gate", "up", "down")}
    assert attended and set(attended) == {((B, T, 4, 4), (B, T, 2, 4), (B, T, 2, 4))}
    without = jax.tree_util.tree_map_with_path(lambda path, p: p * 0 if path[-2].key == "o_proj" else p, params)
    assert quick.relative_error(silenced, runner()(without, tokens())[0]) < 1e-5


def loss_of(cfg):
    task = LanguageTask(Llama(cfg), None, LanguageConfig(), SampleConfig())
    batch = {"tokens": tokens(), "targets": np.roll(tokens(), -1, axis=1)}
    return lambda params: task.loss(params, batch)[0]


def test_remat_is_on():
    for remat in REMAT:
        jaxpr = str(jax.make_jaxpr(loss_of(dataclasses.replace(CFG, remat=remat)))(model_and_params()[1]))
        assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (remat != "none")


def test_remat_changes_nothing():
    _, params = model_and_params()
    none, full = (quick.jit(jax.grad(loss_of(dataclasses.replace(CFG, remat=r))))(params) for r in ("none", "full"))
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, full, none))) < 1e-5


def test_the_backward_pass_keeps_three_arrays_of_the_mlps_width():
    """Gate and up, as the products left them, and what goes into down_proj; JAX by itself would keep five, some in fp32."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16", n_layer=1, n_inner=40)
    saved = jax.eval_shape(lambda p: jax.vjp(loss_of(cfg), p)[1], shapes_of(cfg))
    wide = [x for x in jax.tree.leaves(saved) if x.shape[-1:] == (40,) and math.prod(x.shape) == B * T * 40]
    assert len(wide) == 3 and {x.dtype for x in wide} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_layout": "halves"}, "model.rope_layout='halves' is unknown; did you mean 'half'"),
        ({"remat": "ful"}, "model.remat='ful' is unknown; did you mean 'full'"),
        ({"dtype": "float16"}, "model.dtype='float16' is unknown"),
        ({"n_layer": 0}, "model.n_layer=0 must be at least 1"),
        ({"vocab_size": -1}, "must not be negative"),
        ({"n_kv_head": 5}, "model.n_head=32 is not a multiple of model.n_kv_head=5"),
        ({"n_embd": 100}, "model.n_embd=100 is not a multiple of model.n_head=32; give a model.head_dim"),
        ({"head_dim": 5}, "model.head_dim=5 is odd"),
        ({"rope_low_freq_factor": 4.0}, "rope_low_freq_factor must be less than"),
        ({"rope_factor": 0.5}, "rope_factor at least 1"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        LlamaConfig(**fields)
