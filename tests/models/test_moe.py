"""Mixtures' sizes, starting weights and properties: causal, the same with a cache and packed; equal experts are one.

Grok-1's parts are held against a reference of thirty lines, since nobody has published one that trains.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.convert.moe import dense_config
from jaxvram.errors import UserError
from jaxvram.layers.linear import Linear
from jaxvram.models import build, name_of
from jaxvram.models.llama import Llama
from jaxvram.models.moe import GROK, SIZES, MoE, MoEConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig, LanguageTask
from jaxvram.train.step import loss_and_gradients

CFG = MoEConfig(
    vocab_size=29, vocab_multiple=8, block_size=16, n_layer=3, n_head=4, n_kv_head=2, n_embd=16, n_inner=24,
    rope_theta=100.0, remat="none", dtype="float32", n_expert=4,
)  # fmt: skip
GROK_CFG = dataclasses.replace(CFG, **GROK | {"attention_soft_cap": 3.0})  # a cap that is felt at this size
B, T = 2, 16


@functools.cache
def params_of(cfg):
    """Weights far larger than a fresh model's: a fresh one hardly listens to its context."""
    random = np.random.RandomState(1)
    params = quick.jit(lambda key: MoE(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    return jax.tree.map(lambda p: np.asarray(p) + random.normal(0, 0.4, p.shape).astype(np.float32), params)


def tokens():
    return np.random.RandomState(0).randint(0, CFG.vocab_size, (B, T))


@functools.cache
def runner(cfg):
    """A jitted forward pass: (params, tokens, state, segments) -> (hidden, state)."""
    run = lambda params, tokens, state=None, segments=None: MoE(cfg).apply({"params": params}, tokens, state, segments)
    return quick.jit(run)


@functools.cache
def whole(cfg=GROK_CFG):
    return np.asarray(runner(cfg)(params_of(cfg), tokens())[0])


def shapes_of(cfg):
    return jax.eval_shape(lambda: build(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "parameters"), [("mixtral-8x7b", 46_702_792_704), ("grok-1", 315_684_820_992)])
def test_parameter_counts(name, parameters):
    """Mixtral's is published; of Grok-1 "314B" is: its model.py's shapes add up to a little more."""
    assert count(shapes_of(MoEConfig(**SIZES[name]))) == parameters
    if name == "grok-1":
        layer = 6144 * (2 * 6144 + 2 * 8 * 128) + 8 * 3 * 6144 * 32768 + 6144 * 8 + 4 * 6144
        assert parameters == 64 * layer + 131072 * 6144 + 6144


def test_a_mixture_is_no_llama_by_name():
    assert name_of(CFG) == "moe" and name_of(dense_config(CFG)) == "llama" and type(build(CFG)) is MoE


def test_starting_weights():
    """Chosen by us: N(0, init_std) but for norms, offsets and padding; the router in fp32 whatever the rest."""
    cfg = dataclasses.replace(GROK_CFG, n_embd=64, n_inner=48, init_std=0.05, balance_offsets=True, n_shared_expert=1,
                              param_dtype="bfloat16")  # fmt: skip
    params = quick.jit(lambda key: MoE(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    for path, x in jax.tree.leaves_with_path(params):
        name, x32 = path[-1].key, np.asarray(x, np.float32)
        if name in ("scale", "expert_offset"):
            assert (x32 == (name == "scale")).all()
        else:
            np.testing.assert_allclose(x32[:29].std() if name == "embedding" else x32.std(), 0.05, rtol=0.08)
        assert x.dtype == (jnp.float32 if path[-2].key == "router" else jnp.bfloat16)
    assert "lm_head" not in params and params["layers"]["moe"]["experts"]["up_proj"]["kernel"].shape == (3, 4, 64, 48)
    assert {name for name in params["layers"] if name.endswith("norm")} == {
        "input_norm", "attn_out_norm", "post_norm", "moe_out_norm"
    }  # fmt: skip


def grok_by_hand(cfg, params, tokens_T):
    """Logits of one sequence in NumPy, float64, token by token and expert by expert, as xai-org/grok-1 model.py says."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale
    H, G, K, D = cfg.n_head, cfg.n_kv_head, cfg.key_size, cfg.n_embd
    angle = np.arange(len(tokens_T))[:, None] * cfg.rope_theta ** (-np.arange(K // 2) * 2 / K)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    pairs = lambda x: (x[..., : K // 2], x[..., K // 2 :])
    turn = lambda x: np.concatenate([pairs(x)[0] * cos - pairs(x)[1] * sin, pairs(x)[1] * cos + pairs(x)[0] * sin], -1)
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    x = p["embed_tokens"]["embedding"][tokens_T] * np.sqrt(D)
    for i in range(cfg.n_layer):
        layer = jax.tree.map(lambda a: a[i], p["layers"])  # noqa: B023
        u = norm(x, layer["input_norm"]["scale"])
        q, k, v = (u @ layer["attn"][f"{n}_proj"]["kernel"] for n in "qkv")
        q, k, v = turn(q.reshape(-1, H, K)), turn(k.reshape(-1, G, K)), v.reshape(-1, G, K)
        o = np.zeros((len(x), H, K))
        for t, h in np.ndindex(len(x), H):
            s = k[: t + 1, h // (H // G)] @ q[t, h] / np.sqrt(K)
            s = cfg.attention_soft_cap * np.tanh(s / cfg.attention_soft_cap)
            o[t, h] = np.exp(s) / np.exp(s).sum() @ v[: t + 1, h // (H // G)]
        x = x + norm(o.reshape(len(x), -1) @ layer["attn"]["o_proj"]["kernel"], layer["attn_out_norm"]["scale"])
        u, y = norm(x, layer["post_norm"]["scale"]), np.zeros_like(x)
        for t, z in enumerate(u @ layer["moe"]["router"]["kernel"]):
            weight = np.exp(z) / np.exp(z).sum()
            for e in np.argsort(-weight)[: cfg.n_expert_per_token]:
                gate, up, down = (layer["moe"]["experts"][f"{n}_proj"]["kernel"][e] for n in ("gate", "up", "down"))
                y[t] += weight[e] * ((gelu(u[t] @ gate) * (u[t] @ up)) @ down)
        x = x + norm(y, layer["moe_out_norm"]["scale"])
    return norm(x, p["norm"]["scale"]) @ p["embed_tokens"]["embedding"].T * 0.5773502691896257


@pytest.mark.parametrize(
    "fields", [{}, {"n_expert": 5, "n_expert_per_token": 3, "head_dim": 6}], ids=["2 of 4", "3 of 5"]
)
def test_grok_by_hand(fields):
    cfg = dataclasses.replace(GROK_CFG, **fields)
    params = params_of(cfg)
    hidden_BxTxD = whole(cfg)
    for b in range(B):
        want_TxV = grok_by_hand(cfg, params, tokens()[b])
        assert quick.relative_error(hidden_BxTxD[b] @ params["embed_tokens"]["embedding"].T, want_TxV) < 1e-5


@pytest.mark.parametrize(
    "fields",
    [{"attention_soft_cap": 0.0}, {"sandwich_norm": False}, {"activation": "gelu"},
     {"scale_embedding": False}, {"output_multiplier": 1.0}],
    ids=str,
)  # fmt: skip
def test_each_part_of_grok_is_felt(fields):
    changed, _ = runner(dataclasses.replace(GROK_CFG, **fields))(params_of(GROK_CFG), tokens())
    assert quick.relative_error(changed, whole()) > 1e-4


def test_norms_after_the_experts_take_a_factor_of_a_token_out_again():
    """So whether Grok-1's two weights are divided by their sum matters through eps alone; without those norms it is felt."""
    renormalised = lambda cfg: runner(dataclasses.replace(cfg, renormalise=True))(params_of(GROK_CFG), tokens())[0]
    assert quick.relative_error(renormalised(GROK_CFG), whole()) < 1e-4
    bare = dataclasses.replace(GROK_CFG, sandwich_norm=False)
    assert quick.relative_error(renormalised(bare), runner(bare)(params_of(GROK_CFG), tokens())[0]) > 0.01


def test_groks_constants():
    assert SIZES["grok-1"]["n_embd"] ** 0.5 == pytest.approx(78.38367176906169)
    assert GROK["output_multiplier"] == pytest.approx(0.5773502691896257) and GROK["attention_soft_cap"] == 30
    assert MoEConfig(**SIZES["grok-1"]).key_size ** -0.5 == pytest.approx(0.08838834764831845)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_identical_experts_with_weights_that_add_up_to_one_are_the_dense_model(router):
    cfg = dataclasses.replace(CFG, n_expert_per_token=3, router=router)
    params = params_of(cfg)
    one = jax.tree.map(lambda x: x[:, 1], params["layers"]["moe"]["experts"])
    same = jax.tree.map(lambda x: np.repeat(x[:, None], cfg.n_expert, 1), one)
    layers = params["layers"] | {"moe": params["layers"]["moe"] | {"experts": same}}
    got, _ = runner(cfg)(params | {"layers": layers}, tokens())
    dense = params | {"layers": {n: x for n, x in params["layers"].items() if n != "moe"} | {"mlp": one}}
    want, _ = quick.jit(lambda p: Llama(dense_config(cfg)).apply({"params": p}, tokens()))(dense)
    assert quick.relative_error(got, want) < 1e-5
    assert quick.relative_error(runner(cfg)(params, tokens())[0], want) > 0.01


def test_one_expert_is_its_layer_times_its_weight():
    """GPT-NeoX's k = 1 with Sinkhorn: a sigmoid."""
    cfg = dataclasses.replace(CFG, n_expert=1, n_expert_per_token=1, router="sinkhorn", renormalise=False, n_layer=1)
    params = params_of(cfg)
    halved = jax.tree.map(np.copy, params)
    halved["layers"]["moe"]["router"]["kernel"][:] = 0  # sigmoid(0) = 1/2
    one = jax.tree.map(lambda x: x[:, 0].copy(), params["layers"]["moe"]["experts"])
    one["down_proj"]["kernel"] *= 0.5
    dense = params | {"layers": {n: x for n, x in params["layers"].items() if n != "moe"} | {"mlp": one}}
    want, _ = quick.jit(lambda p: Llama(dense_config(cfg)).apply({"params": p}, tokens()))(dense)
    assert quick.relative_error(runner(cfg)(halved, tokens())[0], want) < 1e-5


def test_a_shared_expert_is_added_for_every_token():
    cfg = dataclasses.replace(CFG, n_shared_expert=2, n_layer=1)
    params = params_of(cfg)
    assert params["layers"]["moe"]["shared"]["up_proj"]["kernel"].shape == (1, 16, 48)
    silent = jax.tree_util.tree_map_with_path(lambda path, x: x * 0 if "experts" in str(path) else x, params)
    layers = {name: x for name, x in silent["layers"].items() if name != "moe"}
    dense = silent | {"layers": layers | {"mlp": silent["layers"]["moe"]["shared"]}}
    llama = Llama(dataclasses.replace(dense_config(cfg), n_inner=48))
    want, _ = quick.jit(lambda p: llama.apply({"params": p}, tokens()))(dense)
    assert quick.relative_error(runner(cfg)(silent, tokens())[0], want) < 1e-5


def test_causal_by_gradient():
    """Position 10 has no gradient from any later input, and some from every earlier one."""
    params = params_of(GROK_CFG)
    x_BxTxD = params["embed_tokens"]["embedding"][tokens()]

    def hidden_at_10(x_BxTxD):
        embed = lambda next_fun, args, kwargs, at: (
            x_BxTxD if at.module.name == "embed_tokens" else next_fun(*args, **kwargs)
        )
        with nn.intercept_methods(embed):
            return MoE(GROK_CFG).apply({"params": params}, tokens())[0][:, 10].sum()

    g_BxT = np.abs(quick.jit(jax.grad(hidden_at_10))(x_BxTxD)).sum(-1)
    assert (g_BxT[:, 11:] == 0).all() and (g_BxT[:, :11] > 1e-5).all()


@pytest.mark.parametrize("cuts", [(10, T - 10), (1,) * T], ids=["two", "token by token"])
def test_cached_equals_whole(cuts):
    model, params = MoE(GROK_CFG), params_of(GROK_CFG)
    state, parts = model.apply({"params": params}, B, method="initial_state"), []
    for start, length in zip(np.cumsum((0, *cuts[:-1])), cuts, strict=True):
        part, state = runner(GROK_CFG)(params, tokens()[:, start : start + length], state)
        parts.append(part)
    assert quick.relative_error(np.concatenate(parts, axis=1), whole()) < 1e-5
    assert (state.length == T).all()


def test_packed_segments_equal_each_alone():
    params = params_of(GROK_CFG)
    segments_BxT = np.broadcast_to(np.repeat(np.arange(2), 8), (B, T))
    packed_BxTxD, _ = runner(GROK_CFG)(params, tokens(), None, segments_BxT)
    for start in (0, 8):
        alone_BxTxD, _ = runner(GROK_CFG)(params, tokens()[:, start : start + 8])
        assert quick.relative_error(packed_BxTxD[:, start : start + 8], alone_BxTxD) < 1e-5


def test_adapters_find_the_attention_and_leave_experts_alone():
    seen = set()

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            seen.add("/".join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda p: MoE(CFG).apply({"params": p}, tokens()), params_of(CFG))
    assert seen == {f"attn/{n}_proj" for n in "qkvo"}


def task_of(cfg, **task):
    return LanguageTask(MoE(cfg), None, LanguageConfig(**task), SampleConfig())


def batch():
    targets = np.roll(tokens(), -1, axis=1)
    targets[0, :5] = -1
    return {"tokens": tokens(), "targets": targets}


def test_the_loss_tells_of_its_routers():
    cfg = dataclasses.replace(CFG, balance_loss=0.3, z_loss=0.2)
    nats, weight, metrics = quick.jit(task_of(cfg).loss)(params_of(CFG), batch())
    mean = {name: np.asarray(x) / float(weight) for name, x in metrics.items()}
    added = 3 * (0.3 * (mean["balance_loss"] - 1) + 0.2 * mean["z_loss"])  # of three layers
    assert float(nats / weight) == pytest.approx(mean["next_token_loss"] + added, rel=1e-5) and added > 0.1
    assert mean["router_load"].shape == (3, 4) and mean["router_dropped"] == 0 and 0 < mean["router_entropy"] < 1
    np.testing.assert_allclose(mean["router_load"].sum(-1), 1, rtol=1e-5)
    evaluated = quick.jit(lambda p: task_of(cfg).evaluation(p, batch(), None))(params_of(CFG))
    assert float(evaluated["loss"][0] / weight) == pytest.approx(mean["next_token_loss"], rel=1e-5)


def test_microbatches_add_up():
    """Of as many targets each, by the balance loss of each sequence: loss, gradient and loads are those of the batch."""
    cfg = dataclasses.replace(CFG, balance_loss=0.5, z_loss=0.1, balance_per_sequence=True, n_layer=1)
    task, params = task_of(cfg), params_of(cfg)
    even = batch() | {"targets": np.roll(tokens(), -1, axis=1)}
    run = lambda k: quick.jit(lambda p: loss_and_gradients(task, p, even, jax.random.key(0), k))(params)
    (loss, grads, told), (loss_2, grads_2, told_2) = run(1), run(2)
    assert loss_2 == pytest.approx(float(loss), rel=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, grads_2, grads))) < 1e-5
    np.testing.assert_allclose(told_2["router_load"], told["router_load"], rtol=1e-5)


def test_by_chunks_tells_the_same():
    """Loads of a sequence in two chunks, the cache carried on."""
    whole_of, parts = (quick.jit(task_of(CFG, chunk_length=c).loss)(params_of(CFG), batch()) for c in (0, 8))
    np.testing.assert_allclose(parts[2]["router_load"], whole_of[2]["router_load"], rtol=1e-5)
    assert parts[2]["next_token_loss"] == pytest.approx(float(whole_of[2]["next_token_loss"]), rel=1e-5)


def test_training_drops_evaluation_does_not():
    cfg = dataclasses.replace(CFG, capacity_factor=0.5)
    run = lambda key: quick.jit(lambda p: task_of(cfg).loss(p, batch(), key))(params_of(CFG))
    (_, weight, training), (_, _, evaluating) = run(jax.random.key(0)), run(None)
    assert training["router_dropped"] / weight >= 0.5 and evaluating["router_dropped"] == 0
    task = task_of(dataclasses.replace(cfg, capacity_factor=0.01))
    with pytest.raises(UserError, match="all would be dropped"):
        jax.eval_shape(lambda p: task.loss(p, batch(), jax.random.key(0)), params_of(CFG))


def test_jitter_is_of_training_alone():
    cfg = dataclasses.replace(CFG, router_jitter=0.9)
    run = quick.jit(lambda p, key: task_of(cfg).loss(p, batch(), key)[2]["z_loss"])
    params = params_of(CFG)
    first, second = (run(params, jax.random.key(seed)) for seed in (0, 1))
    assert abs(first - second) > 1e-3 * first
    z_loss_of = lambda c: quick.jit(lambda p: task_of(c).loss(p, batch())[2]["z_loss"])(params)
    evaluating, without = z_loss_of(cfg), z_loss_of(CFG)
    assert evaluating == pytest.approx(float(without))


def test_what_the_layers_tell_costs_a_few_numbers():
    """Under remat, a layer keeps its stream, and nothing of its router but E + 4 numbers and those of the gradient."""
    kept, params = {}, params_of(GROK_CFG)
    for remat in ("full", "none"):
        task = task_of(dataclasses.replace(GROK_CFG, remat=remat, z_loss=0.1))
        kept[remat] = count(jax.eval_shape(lambda p: jax.vjp(lambda p: task.loss(p, batch())[0], p)[1], params))  # noqa: B023
    streams, size = 3 * B * T * 16, count(params)
    assert kept["full"] - size < streams + 4 * B * T * 32 < kept["none"] - size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "softmx"}, "model.router='softmx' is unknown; did you mean 'softmax'"),
        ({"activation": "relu"}, "model.activation='relu' is unknown"),
        ({"n_expert_per_token": 9}, "model.n_expert_per_token=9 must be at least 1 and at most model.n_expert=8"),
        ({"capacity_factor": -1.0}, "model.capacity_factor=-1.0 must not be negative"),
        ({"router_jitter": 1.0}, "model.router_jitter=1.0 is not in"),
        ({"n_expert_per_token": 1}, "model.renormalise gives one expert a token the weight 1"),
        ({"mlp_bias": True}, "experts have no biases"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(**fields)
