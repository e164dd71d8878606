"""BitNet's sizes and properties: what it keeps, packed == latent, token by token == whole, annealed from full precision."""

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
from jaxvram.finetune.adapted import adapted
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.finetune.weights import merged
from jaxvram.models.bitnet import NORMS, SIZES, BitNet, BitNetConfig, packed_params
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.sample.text import SampleConfig, generate
from jaxvram.tasks.language import LanguageConfig, LanguageTask
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup, make_optimizer
from jaxvram.train.partition import divide, join
from jaxvram.train.step import TrainConfig, init_state, make_train_step

CFG = BitNetConfig(
    vocab_size=29, vocab_multiple=8, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_inner=24,
    rope_theta=100.0, remat="none", dtype="float32", weights="latent",
)  # fmt: skip
B, T = 2, 16


def tokens():
    return np.random.RandomState(0).randint(0, CFG.vocab_size, (B, T))


def with_(**fields):
    return dataclasses.replace(CFG, **fields)


@functools.cache
def params_of(cfg=CFG):
    """Larger than a fresh model's, which hardly listens to its context."""
    random = np.random.RandomState(1)
    shapes = jax.eval_shape(lambda: BitNet(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return jax.tree.map(lambda s: random.normal(0, 0.4, s.shape).astype(s.dtype), shapes)


@functools.cache
def packed(weights):
    """The parameters with their matrices packed."""
    return quick.jit(lambda params: packed_params(params, weights))(params_of())


@functools.cache
def runner(cfg=CFG):
    model = BitNet(cfg)
    return quick.jit(lambda params, tokens, state=None: model.apply({"params": params}, tokens, state))


def shapes_of(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def count(params, name=""):
    return sum(math.prod(x.shape) for path, x in jax.tree.leaves_with_path(params) if name in jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("size", "ternary", "all_of_them"),
    [
        ("700m", 679_477_248, 777_991_680),
        ("1.3b", 1_207_762_944, 1_339_115_488),
        ("3b", 3_221_504_000, 3_426_781_440),
        ("3.9b", 4_259_840_000, 4_465_225_600),
        ("2b4t", 2_084_044_800, 2_412_820_480),
    ],
)
def test_parameter_counts(size, ternary, all_of_them):
    """2B4T's as Microsoft's file has them: 2,084,485,120 besides the table."""
    cfg = BitNetConfig(**SIZES[size])
    params = shapes_of(BitNet(cfg))
    D, F, GK = cfg.n_embd, cfg.n_inner, cfg.n_kv_head * cfg.key_size
    assert count(params, "latent") == cfg.n_layer * (2 * D * D + 2 * D * GK + 3 * D * F) == ternary
    assert count(params) == all_of_them
    if size == "2b4t":
        assert count(params) - count(params, "embed_tokens") == 2_084_485_120


def test_every_size_is_counted_above():
    (mark,) = test_parameter_counts.pytestmark
    assert {size for size, *_ in mark.args[1]} == set(SIZES)


@pytest.mark.parametrize("norms", NORMS)
def test_the_tree(norms):
    layers = shapes_of(BitNet(with_(norms=norms)))["layers"]
    names = {"/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(layers)}
    matrices = [f"attn/{n}_proj" for n in "qkvo"] + [f"mlp/{n}_proj" for n in ("gate", "up", "down")]
    want = {f"{name}/latent" for name in matrices}
    if norms == "inside":
        want |= {f"{name}/rms_norm/scale" for name in matrices}
    else:
        want |= {"input_norm/scale", "post_norm/scale"}
    if norms == "subln":
        want |= {"attn/attn_sub_norm/scale", "mlp/ffn_sub_norm/scale"}
    assert names == want


@pytest.mark.parametrize("norms", NORMS)
def test_causal_by_gradient(norms):
    """Position 10 has no gradient from any later input, and some from every earlier one."""
    cfg = with_(norms=norms)
    params, model = params_of(cfg), BitNet(cfg)

    def hidden_at_10(delta_BxTxD):
        def add(next_fun, args, kwargs, at):
            out = next_fun(*args, **kwargs)
            return out + delta_BxTxD if (at.module.name, at.method_name) == ("embed_tokens", "__call__") else out

        with nn.intercept_methods(add):
            return model.apply({"params": params}, tokens())[0][:, 10].sum()

    g_BxT = np.abs(quick.jit(jax.grad(hidden_at_10))(jnp.zeros((B, T, CFG.n_embd)))).sum(-1)
    assert (g_BxT[:, 11:] == 0).all() and (g_BxT[:, :11] > 1e-6).all()


@pytest.mark.parametrize("cuts", [(10, T - 10), (1, 3, 5, 7), (1,) * T], ids=str)
def test_cached_equals_whole(cuts):
    """Of packed weights, which is how it decodes; against latent ones, all at once."""
    cfg = with_(weights="base3")
    params = packed("base3")
    whole = runner()(params_of(), tokens())[0]
    state, parts = BitNet(cfg).apply({"params": params}, B, method="initial_state"), []
    for start, length in zip(np.cumsum((0, *cuts[:-1])), cuts, strict=True):
        part, state = runner(cfg)(params, tokens()[:, start : start + length], state)
        parts.append(part)
    assert quick.relative_error(np.concatenate(parts, axis=1), whole) < 1e-5


def test_sampling_packs_latent_weights():
    """What it draws is what the packed model draws; in its program nobody rounds a matrix again for each token."""
    options = {"new_tokens": 12, "vocab_size": CFG.vocab_size, "temperature": 0}
    prompt, key = tokens()[:, :3], jax.random.key(0)
    drawn = generate(BitNet(CFG), params_of(), prompt, key, **options)
    cfg = with_(weights="base3")
    np.testing.assert_array_equal(generate(BitNet(cfg), packed("base3"), prompt, key, **options), drawn)
    assert BitNet(CFG).decoder.cfg.weights == "2bit" and BitNet(cfg).decoder.cfg == cfg
    text = str(jax.make_jaxpr(functools.partial(generate, BitNet(CFG), **options))(params_of(), prompt, key))
    assert "u8[2,6,16]" in text  # gate and up: 24 rows of codes in 6 of bytes


def loss_of(cfg, model=BitNet):
    task = LanguageTask(model(cfg), None, LanguageConfig(), SampleConfig())
    return lambda params, tokens: task.loss(params, {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1)})[0]


@pytest.mark.parametrize("norms", NORMS)
def test_remat_changes_nothing(norms):
    params = params_of(with_(norms=norms))
    gradients = lambda remat: quick.jit(jax.grad(loss_of(with_(norms=norms, remat=remat))))(params, tokens())
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, gradients("full"), gradients("none")))) < 1e-5


def kept_by_token(model, cfg):
    """What the backward pass of 1 x 2048 tokens is handed by JAX that has an entry a token and layer, and its bytes."""
    params, batch = shapes_of(model(cfg)), jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    kept = jax.eval_shape(lambda p, t: jax.vjp(lambda p: loss_of(cfg, model)(p, t), p)[1], params, batch)
    kept = [x for x in jax.tree.leaves(kept) if 2048 in x.shape and x.shape[0] == cfg.n_layer]
    return kept, sum(x.size * x.dtype.itemsize for x in kept)


@pytest.mark.parametrize("norms", NORMS)
def test_it_keeps_less_than_a_llama(norms):
    """At the 700M's widths, without remat: at most 0.6 of a Llama's, whose rounded weights are not even counted."""
    sizes = SIZES["700m"] | {"n_layer": 2, "vocab_size": 512, "remat": "none"}
    kept, ours = kept_by_token(BitNet, BitNetConfig(**sizes, norms=norms))
    _, theirs = kept_by_token(Llama, LlamaConfig(**sizes))
    each = 2 * 2048 * 1536  # XLA finds that q, k and v read the same codes: 14 D of these bytes are there on a card
    assert ours < 0.6 * 34 * each < 0.6 * theirs and ours <= {"inside": 18.1, "subln": 16.1, "llama": 18.1}[norms] * each
    assert not [x for x in kept if x.shape[-1] == 4096]  # nothing of the MLP's width
    assert sum(x.dtype == jnp.int8 for x in kept) == 4


def train_step(cfg, learning_rate=0.0):
    task = LanguageTask(BitNet(cfg), None, LanguageConfig(), SampleConfig())
    optimizer = OptimizerConfig(learning_rate=learning_rate, schedule="constant", groups={"all": ParamGroup(".*")})
    train = TrainConfig(batch_size=B, microbatch_size=1)
    tx, schedule = make_optimizer(optimizer, params_of(cfg), 10)
    state = init_state(tx, train, jax.tree.map(jnp.asarray, params_of(cfg)), {})
    return jax.jit(make_train_step(task, tx, schedule, train)), state


def test_annealing_goes_by_the_step(quick_compile):
    """Step n trains the model that is rounded n / N of the way, and from N on the ternary one; an evaluation always that."""
    cfg = with_(norms="llama", anneal_steps=4)
    step, state = train_step(cfg)
    batch = {"tokens": jnp.asarray(tokens()), "targets": jnp.roll(tokens(), -1, axis=1)}
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    task = LanguageTask(BitNet(cfg), None, LanguageConfig(), SampleConfig())
    at = jax.jit(lambda n: task.loss(params_of(cfg), batch | {"step": jnp.full(B, n)})[0] / (B * T))
    np.testing.assert_allclose(losses, [at(n) for n in range(6)], rtol=1e-5)
    total, weight, _ = jax.jit(lambda: task.loss(params_of(cfg), batch))()
    np.testing.assert_allclose(losses[4:], [total / weight] * 2, rtol=1e-4)
    assert len({round(loss, 4) for loss in losses[:5]}) == 5
    llama = LlamaConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(LlamaConfig)})
    plain = jax.tree_util.tree_map_with_path(lambda p, x: x.swapaxes(1, 2) if p[-1].key == "latent" else x, params_of(cfg))
    for module in ("attn", "mlp"):
        for leaves in plain["layers"][module].values():
            leaves["kernel"] = leaves.pop("latent")
    np.testing.assert_allclose(losses[0], jax.jit(loss_of(llama, Llama))(plain, tokens()) / (B * T), rtol=1e-5)


def test_only_what_anneals_reads_the_step():
    reads = lambda cfg: LanguageTask(BitNet(cfg), None, LanguageConfig(), SampleConfig()).reads_step
    assert reads(with_(anneal_steps=3)) and not reads(CFG)


def test_a_lora_beside_packed_weights(quick_compile):
    """Learns, with no gradient for anything that is packed; and cannot be merged."""
    finetune = FinetuneConfig(method="lora", rank=2, alpha=8.0)
    cfg = with_(weights="2bit")
    model = adapted(BitNet(cfg), finetune)
    params = quick.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    is_added = lambda path: finetune.trains("/".join(key.key for key in path))
    added = {path for path, _ in jax.tree.leaves_with_path(params) if is_added(path)}
    assert len(added) == 14
    trained, frozen = divide(params, finetune.trains)
    task = LanguageTask(model, None, LanguageConfig(), SampleConfig())
    batch = {"tokens": jnp.asarray(tokens()), "targets": jnp.roll(tokens(), -1, axis=1)}
    loss = jax.jit(jax.value_and_grad(lambda trained: task.loss(join(trained, frozen), batch)[0]))
    first, grads = loss(trained)
    for _ in range(5):
        trained = jax.tree.map(lambda p, g: p - 0.02 * g, trained, grads)
        last, grads = loss(trained)
    assert last < first
    with pytest.raises(UserError, match="beside ternary matrices has no place in them; export it by itself: --adapter"):
        merged(model, join(trained, frozen))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norms": "sublm"}, "model.norms='sublm' is unknown; did you mean 'subln'"),
        ({"activation": "gelu"}, "model.activation='gelu' is unknown"),
        ({"weights": "3bit"}, "model.weights='3bit' is unknown; did you mean '2bit'"),
        ({"anneal_steps": -1}, "model.anneal_steps=-1 must not be negative"),
        ({"anneal_steps": 2, "weights": "2bit"}, "model.weights=2bit are not"),
        ({"remat": "ful"}, "model.remat='ful' is unknown"),
    ],
    ids=str,
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        with_(**fields)


def test_what_a_bitnet_is_not_fine_tuned_with():
    for cfg, finetune, message in (
        (CFG, FinetuneConfig(method="lora", base="nf4"), "are for a Llama's"),
        (CFG, FinetuneConfig(method="lora", dora=True), "are for a Llama's"),
        (with_(weights="base3"), FinetuneConfig(), "model.weights=base3 are packed, and not trained"),
    ):
        with pytest.raises(UserError, match=message):
            adapted(BitNet(cfg), finetune)
