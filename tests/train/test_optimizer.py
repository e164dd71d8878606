"""Groups, schedules and updates against hand-computed values, nanoGPT's and llm.c's formulas, and PyTorch's AdamW."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvram.errors import UserError
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup, group_labels, make_optimizer, make_schedule, path_name

PARAMS = {
    "wte": {"embedding": jnp.linspace(-1, 1, 12).reshape(4, 3)},
    "h": {"attn": {"kernel": jnp.linspace(-2, 2, 18).reshape(2, 3, 3), "bias": jnp.full((2, 3), 0.5)}},
    "ln_f": {"scale": jnp.ones(3)},
}
ALL = {"all": ParamGroup(".*")}
MINGPT = {"linear": ParamGroup(".*kernel", weight_decay=0.1), "plain": ParamGroup(".*(embedding|bias|scale)")}


def grads_of(n):
    keys = jax.random.split(jax.random.key(n), len(jax.tree.leaves(PARAMS)))
    leaves = [jax.random.normal(k, p.shape) for k, p in zip(keys, jax.tree.leaves(PARAMS), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(PARAMS), leaves)


def run(cfg, steps=3, grads=grads_of):
    tx, _ = make_optimizer(cfg, PARAMS, 100)
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for n in range(steps):
        updates, state = update(grads(n), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_nanogpt_decays_tables_and_matrices_and_mingpt_matrices_alone():
    zero = lambda n: jax.tree.map(jnp.zeros_like, PARAMS)
    for groups, decayed in ((OptimizerConfig().groups, {"embedding", "kernel"}), (MINGPT, {"kernel"})):
        cfg = OptimizerConfig(learning_rate=0.5, schedule="constant", groups=groups)
        after, _ = run(cfg, 1, zero)  # without a gradient only the decay is left
        for (path, p), q in zip(jax.tree_util.tree_leaves_with_path(PARAMS), jax.tree.leaves(after), strict=True):
            factor = 1 - 0.5 * 0.1 if path[-1].key in decayed else 1.0
            np.testing.assert_allclose(q, factor * p, rtol=1e-6)


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"a": ParamGroup(".*kernel")}, "h/attn/bias is in no optimizer group"),
        ({"a": ParamGroup(".*"), "b": ParamGroup(".*kernel")}, "h/attn/kernel is in the optimizer groups a and b"),
        ({"a": ParamGroup(".*"), "typo": ParamGroup("kernell")}, "no parameter is in the optimizer group(s) typo"),
        ({"a": ParamGroup("(")}, "optimizer.groups.a.params='(' is no regular expression"),
        ({"a": ParamGroup("h")}, "in no optimizer group"),  # the whole path must match
    ],
)
def test_every_parameter_is_in_exactly_one_group(groups, message):
    with pytest.raises(UserError, match=re.escape(message)):
        group_labels(groups, PARAMS)


def test_a_learning_rate_multiplier_scales_update_and_decay():
    half = {"half": ParamGroup(".*kernel", 0.1, lr_multiplier=0.5), "rest": ParamGroup(".*(embedding|bias|scale)")}
    cfg = OptimizerConfig(schedule="constant", groups=half)
    plain, _ = run(OptimizerConfig(schedule="constant", groups=MINGPT), 1)
    after, _ = run(cfg, 1)
    moved = lambda tree: tree["h"]["attn"]["kernel"] - PARAMS["h"]["attn"]["kernel"]
    np.testing.assert_allclose(moved(after), moved(plain) / 2, rtol=1e-3, atol=1e-8)
    np.testing.assert_array_equal(after["wte"]["embedding"], plain["wte"]["embedding"])


def test_frozen_parameters_stay_and_have_no_state():
    frozen = {
        "frozen": ParamGroup(".*kernel", 0.1, lr_multiplier=0.0),
        "rest": ParamGroup(".*(embedding|bias|scale)", 0.1),
    }
    after, state = run(OptimizerConfig(groups=frozen))
    np.testing.assert_array_equal(after["h"]["attn"]["kernel"], PARAMS["h"]["attn"]["kernel"])
    assert not np.array_equal(after["wte"]["embedding"], PARAMS["wte"]["embedding"])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("embedding" in path for path in paths) and not any("kernel" in path for path in paths)


def test_clipping_does_not_count_frozen_gradients():
    """The norm that is clipped is that of what moves, so freezing more does not slow the rest."""
    huge = lambda n: jax.tree.map(lambda p: jnp.full_like(p, 1.0 if p.ndim == 3 else 1e-3), PARAMS)
    frozen = {"frozen": ParamGroup(".*kernel", lr_multiplier=0.0), "rest": ParamGroup(".*(embedding|bias|scale)")}
    cfg = {"name": "lion", "schedule": "constant", "clip_norm": 1.0}
    after, _ = run(OptimizerConfig(groups=frozen, **cfg), 1, huge)
    np.testing.assert_allclose(PARAMS["ln_f"]["scale"] - after["ln_f"]["scale"], 6e-4, rtol=1e-3)


def nanogpt_lr(it, peak, warmup, decay_iters, min_lr):
    """train.py at 3adf61e, get_lr."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    if it > decay_iters:
        return min_lr
    ratio = (it - warmup) / (decay_iters - warmup)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - min_lr)


def test_cosine_is_nanogpts():
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-3, warmup_steps=10, decay_steps=90), 100)
    for step in (0, 1, 9, 10, 11, 50, 89, 90, 99):
        np.testing.assert_allclose(schedule(step), nanogpt_lr(step, 1e-3, 10, 90, 1e-4), rtol=1e-5, err_msg=str(step))


@pytest.mark.parametrize(
    "schedule, expected",  # at steps 10, 30, 60, 90, 100 of 100: 10 of warm-up, peak 1, final 0.2
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 1 - 0.8 * 20 / 90, 1 - 0.8 * 50 / 90, 1 - 0.8 * 80 / 90, 0.2]),
        # llm.c's schedulers.h: final + (peak - final) (1 - sqrt((step - 80) / 20)) over the last fifth
        ("wsd", [1, 1, 1, 0.2 + 0.8 * (1 - math.sqrt(0.5)), 0.2]),
    ],
)
def test_the_other_schedules(schedule, expected):
    cfg = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=10, final_lr_fraction=0.2)
    rates = make_schedule(cfg, 100)
    np.testing.assert_allclose([rates(s) for s in (10, 30, 60, 90, 100)], expected, rtol=1e-5)
    np.testing.assert_allclose([rates(s) for s in (0, 4, 9)], [1 / 11, 5 / 11, 10 / 11], rtol=1e-5)
    no_warmup = make_schedule(OptimizerConfig(learning_rate=1.0, schedule=schedule), 100)
    np.testing.assert_allclose(no_warmup(0), 1.0)


def test_adamw_is_pytorchs():
    torch = pytest.importorskip("torch")
    cfg = OptimizerConfig(learning_rate=1e-2, schedule="constant", clip_norm=1.0)
    tensors = {
        jax.tree_util.keystr(k): torch.tensor(np.array(p)) for k, p in jax.tree_util.tree_leaves_with_path(PARAMS)
    }
    decayed = [t for name, t in tensors.items() if "kernel" in name or "embedding" in name]
    plain = [t for name, t in tensors.items() if "kernel" not in name and "embedding" not in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for n in range(10):
        for path, g in jax.tree_util.tree_leaves_with_path(grads_of(n)):
            tensors[jax.tree_util.keystr(path)].grad = torch.tensor(np.array(g))
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        reference.step()
    after, _ = run(cfg, 10)
    for path, p in jax.tree_util.tree_leaves_with_path(after):
        np.testing.assert_allclose(p, tensors[jax.tree_util.keystr(path)], rtol=1e-5, atol=2e-6)


def test_adamw_by_hand():
    """One weight, two steps; PyTorch is not needed."""
    cfg = OptimizerConfig(learning_rate=0.1, schedule="constant", clip_norm=0.0, groups={"all": ParamGroup(".*", 0.5)})
    tx, _ = make_optimizer(cfg, {"w": jnp.float32(2.0)}, 10)
    w, m, v = 2.0, 0.0, 0.0
    params = {"w": jnp.float32(w)}
    state = tx.init(params)
    for n, g in enumerate((3.0, -1.0), 1):
        updates, state = tx.update({"w": jnp.float32(g)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w -= 0.1 * (m / (1 - 0.9**n) / (math.sqrt(v / (1 - 0.95**n)) + 1e-8) + 0.5 * w)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


@pytest.mark.parametrize("clip, factor", [(1.0, 0.1), (20.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, factor):
    cfg = OptimizerConfig(clip_norm=clip, b1=0.0, groups=ALL)
    tx, _ = make_optimizer(cfg, {"a": jnp.zeros(2), "b": jnp.zeros(1)}, 10)
    grads = {"a": jnp.array([6.0, 0.0]), "b": jnp.array([8.0])}  # of norm 10
    _, state = tx.update(grads, tx.init(grads), grads)
    nu = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu")).nu
    np.testing.assert_allclose(nu["b"], 0.05 * (8 * factor) ** 2, rtol=1e-5)


def test_lion_steps_by_signs_and_adafactor_keeps_rows_and_columns():
    plain = {"all": ParamGroup(".*")}
    after, _ = run(OptimizerConfig(name="lion", learning_rate=0.5, schedule="constant", groups=plain), 1)
    np.testing.assert_allclose(after["ln_f"]["scale"], 1 - 0.5 * np.sign(grads_of(0)["ln_f"]["scale"]), rtol=1e-6)
    big = {"w": jnp.ones((256, 512))}
    tx, _ = make_optimizer(OptimizerConfig(name="adafactor", groups=plain), big, 10)
    assert sum(x.size for x in jax.tree.leaves(tx.init(big))) < 2 * (256 + 512)
    updates, _ = tx.update(big, tx.init(big), big)
    assert jnp.isfinite(updates["w"]).all() and (updates["w"] < 0).all()


def test_the_first_moment_may_be_bfloat16():
    _, state = run(OptimizerConfig(mu_dtype="bfloat16"), 1)
    assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"bfloat16", "float32", "int32"}


BIG = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}


def momentum_and_plain(**options):
    """Adafactor with a first moment and without."""
    options, names = {"schedule": "constant", "groups": ALL} | options, ("adafactor_momentum", "adafactor")
    return [make_optimizer(OptimizerConfig(name=name, **options), BIG, 60)[0] for name in names]


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_adafactor_with_momentum_keeps_one_matrix_in_the_type_asked_for(mu_dtype):
    """And of the second moments rows and columns alone."""
    leaves = jax.tree.leaves(jax.eval_shape(momentum_and_plain(mu_dtype=mu_dtype)[0].init, BIG))
    assert [str(x.dtype) for x in leaves if x.shape == (256, 512)] == [mu_dtype]
    assert sum(x.size for x in leaves if x.shape != (256, 512)) < 256 + 512 + 10


def test_adafactors_momentum_is_the_mean_of_its_steps():
    """After two steps (b1 (1 - b1) u_1 + (1 - b1) u_2) / (1 - b1^2), as Adam's."""
    random, b1 = np.random.RandomState(0), 0.8
    grads = [{"w": random.normal(0, 1, (256, 512)).astype(np.float32)} for _ in range(2)]
    steps = []
    for tx in momentum_and_plain(b1=b1):
        state, update = tx.init(grads[0]), jax.jit(tx.update)
        for g in grads:
            u, state = update(g, state, g)
            steps.append(np.asarray(u["w"]))
    m_1, m_2, u_1, u_2 = steps
    np.testing.assert_allclose(m_1, u_1, rtol=1e-5)
    np.testing.assert_allclose(m_2, (b1 * (1 - b1) * u_1 + (1 - b1) * u_2) / (1 - b1**2), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_adafactor_with_momentum_minimises_a_parabola(mu_dtype):
    """From 0.6 away, the root mean square of what it starts with, to less than a hundredth of that."""
    target = np.random.RandomState(0).uniform(-1, 1, (256, 512)).astype(np.float32)
    fall = {"learning_rate": 0.1, "schedule": "linear", "final_lr_fraction": 0.0}
    tx, _ = momentum_and_plain(mu_dtype=mu_dtype, **fall)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update({"w": w - target}, state, {"w": w})
        return (w + updates["w"], state), None

    start = jnp.zeros((256, 512))
    (w, _), _ = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init({"w": w})), length=60))(start)
    rms = lambda x: float(jnp.sqrt(jnp.square(x).mean()))
    assert rms(w - target) < 0.01 * rms(start - target)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "adafactor", "adafactor_momentum"])
def test_without_decay_parameters_are_not_read(name):
    """0 * p would be: XLA merges that zero with the zeros in which gradients begin, and holds a whole copy to the end."""
    groups = {"decayed": ParamGroup(".*kernel", 0.1), "plain": ParamGroup(".*(embedding|bias|scale)")}
    tx, _ = make_optimizer(OptimizerConfig(name=name, groups=groups), PARAMS, 10)
    program = jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS).jaxpr
    read = {id(x) for equation in program.eqns for x in equation.invars}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
    of_params = program.invars[-len(paths) :]
    assert {path for path, x in zip(paths, of_params, strict=True) if id(x) in read} == {"['h']['attn']['kernel']"}
    is_zero = lambda x: hasattr(x, "val") and np.ndim(x.val) == 0 and x.val == 0
    assert not any(is_zero(x) for equation in program.eqns if equation.primitive.name == "mul" for x in equation.invars)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "adamww"}, "did you mean 'adamw'"),
        ({"name": "adafactor_momentun"}, "did you mean 'adafactor_momentum'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"mu_dtype": "float16"}, "mu_dtype"),
        ({"learning_rate": -1.0}, "negative"),
        ({"b2": 1.0}, "b2"),
        ({"final_lr_fraction": 2.0}, "fraction"),
    ],
)
def test_impossible_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**wrong)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adafactor_momentum"])
def test_second_moments_of_bf16_weights_come_up(name):
    """In the weights' dtype they would stay where a step adds less than 2^-9 of them: at 0.5 of 0.86 after 2,000 steps."""
    cfg = OptimizerConfig(name=name, b2=0.999, clip_norm=0.0, groups={"all": ParamGroup(".*")})
    weights = {"w": jnp.ones(3, jnp.bfloat16)}
    tx, _ = make_optimizer(cfg, weights, 2000)
    ones = jax.tree.map(jnp.ones_like, weights)
    step = lambda state, _: (tx.update(ones, state, weights)[1], None)
    state = jax.jit(lambda state: jax.lax.scan(step, state, None, length=2000)[0])(tx.init(weights))
    (moment,) = (x for path, x in jax.tree.leaves_with_path(state) if path_name(path).endswith(("nu/w", "/v/w")))
    assert moment.dtype == jnp.float32
    want = 1 - 0.999**2000 if name == "adamw" else 1.0  # Adafactor's decay begins at 0, so that it is the mean at once
    np.testing.assert_allclose(moment, want, rtol=1e-3)


def test_a_group_with_a_sign_rate_moves_by_the_sign_alone():
    """Whatever optimizer, schedule and clip the others have; and the clip does not see it."""
    params = {"w": {"kernel": jnp.ones((3, 2))}, "router": {"expert_offset": jnp.zeros(3)}}
    groups = {"all": ParamGroup(r".*kernel"), "offsets": ParamGroup(r".*expert_offset", sign_rate=0.01)}
    tx, _ = make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_steps=9, clip_norm=1.0, groups=groups), params, 10)
    slopes = {"w": {"kernel": jnp.full((3, 2), 1e-3)}, "router": {"expert_offset": jnp.array([1e6, -1e-9, 0.0])}}
    updates, state = tx.update(slopes, tx.init(params), params)
    np.testing.assert_allclose(updates["router"]["expert_offset"], [-0.01, 0.01, 0.0], rtol=1e-6)
    np.testing.assert_allclose(updates["w"]["kernel"], -0.05, rtol=1e-3)  # AdamW's first step, not clipped to nothing
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * 6 + 6, "an offset has no moments"
    with pytest.raises(UserError, match=r"optimizer\.groups\.frozen has a sign_rate"):
        OptimizerConfig(groups={"frozen": ParamGroup(r".*", sign_rate=0.01)})


def test_two_stages():
    """BitNet's: two lines to the same end, the second from a lower peak, taken halfway; warm-up before."""
    cfg = OptimizerConfig(
        learning_rate=3.0, schedule="two_stage", warmup_steps=10, final_lr_fraction=0.0, second_peak_fraction=2 / 3
    )
    rate = jax.vmap(make_schedule(cfg, 110))(jnp.arange(111))
    line = lambda peak, n: peak * (1 - (n - 10) / 100)
    n = np.arange(111)
    np.testing.assert_allclose(rate[10:55], line(3, n[10:55]), rtol=1e-5)
    np.testing.assert_allclose(rate[55:], line(2, n[55:]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rate[:10], 3 / 11 + (3 - 3 / 11) * n[:10] / 10, rtol=1e-5)


def test_weight_decay_ends_halfway():
    zero = lambda n: jax.tree.map(jnp.zeros_like, PARAMS)
    groups = {"all": ParamGroup(".*", weight_decay=0.1)}
    cfg = OptimizerConfig(learning_rate=0.5, schedule="constant", groups=groups, decay_steps=6, weight_decay_until=0.5)
    for steps in (2, 3, 5):
        after, _ = run(cfg, steps, zero)
        factor = 0.95 ** min(steps, 3)
        jax.tree.map(lambda p, q: np.testing.assert_allclose(q, factor * p, rtol=1e-5), PARAMS, after)  # noqa: B023


def test_fractions_are_fractions():
    for field in ("final_lr_fraction", "wsd_decay_fraction", "second_peak_fraction", "weight_decay_until"):
        with pytest.raises(UserError, match=rf"optimizer.{field}=1.5 is not in \[0, 1\]"):
            OptimizerConfig(**{field: 1.5})
