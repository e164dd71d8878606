"""Stochastic rounding: unbiased, exact where it can be, the same when resumed; bf16 weights then learn as fp32 ones do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import ToySource, ToyTask

from jaxvram.errors import UserError
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup, make_optimizer
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh
from jaxvram.train.step import TrainConfig, init_state, make_train_step
from jaxvram.train.stochastic_rounding import apply_updates, to_bfloat16

ALL = {"all": ParamGroup(".*")}
rounded = jax.jit(jax.vmap(to_bfloat16, in_axes=(None, 0)))


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def neighbours(x):
    """The bf16 numbers below and above in magnitude, as float64."""
    bits = np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000
    return bits.view(np.float32).astype(np.float64), (bits + 0x10000).view(np.float32).astype(np.float64)


def test_it_is_unbiased():
    """Of every size, both signs, subnormal ones too: the mean over 4,096 keys is within four deviations of the sum."""
    random, N = np.random.default_rng(0), 4096
    exponents = np.concatenate([random.uniform(-30, 30, 200), random.uniform(-39.5, -37, 50)])
    x = (random.choice([-1, 1], 250) * 10**exponents).astype(np.float32)
    draws = np.asarray(rounded(x, keys(N)).astype(jnp.float32)).astype(np.float64)
    below, above = neighbours(x)
    assert ((draws == below) | (draws == above)).all()
    p = (x - below) / (above - below)
    deviation = np.sqrt(p * (1 - p) / N)
    off = (draws == above).mean(0) - p
    assert (np.abs(off) <= 4 * deviation + 1e-12).mean() > 0.99 and (np.abs(off) <= 6 * deviation + 1 / N).all()
    assert abs(off.mean()) <= 4 * np.sqrt((deviation**2).sum()) / off.size


def test_the_chance_is_that_of_the_lower_half():
    """1 + k / 2^16 of the way to the next, for a few k: 2^16 keys, within four deviations."""
    k, N = np.array([0, 1, 100, 2**14, 2**15, 2**16 - 1], np.uint32), 2**16
    x = (np.float32(-3.0).view(np.uint32) + k).view(np.float32)
    up = (np.asarray(rounded(x, keys(N))) != np.float32(-3.0)).mean(0)
    p = k / 2**16
    assert (np.abs(up - p) <= 4 * np.sqrt(p * (1 - p) / N)).all() and up[0] == 0


EXACT = [0.0, -0.0, 1.0, -1.0, 1.5, -2.0**-126, 2.0**-133, 3.3895314e38, -3.3895314e38, np.inf, -np.inf]


@pytest.mark.parametrize("x", EXACT)
def test_what_bf16_holds_stays(x):
    draws = np.asarray(rounded(np.float32([x]), keys(256)).astype(jnp.float32))
    assert (draws.view(np.uint32) == np.float32(x).view(np.uint32)).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF80FFFF])
def test_what_is_no_number_stays_none(bits):
    """Also where a carry would run through the sign, or all that says NaN is in the half that is cut off."""
    x = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(np.asarray(rounded(x, keys(256)).astype(jnp.float32))).all()


def test_beyond_the_largest_is_that_or_infinity():
    x = np.float32([3.4e38, -3.4e38])
    draws = np.asarray(rounded(x, keys(512)).astype(jnp.float32))
    assert set(np.abs(draws).reshape(-1).tolist()) == {float(np.float32(3.3895314e38)), np.inf}
    assert (np.sign(draws) == np.sign(x)).all()


def test_leaves_are_rounded_apart_and_fp32_is_added_as_usual():
    params = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16), "c": jnp.ones(3)}
    updates = {"a": jnp.full(4096, 1e-3), "b": jnp.full(4096, 1e-3), "c": jnp.full(3, 1e-3)}
    after = jax.jit(apply_updates)(params, updates, jax.random.key(0))
    assert [after[name].dtype for name in "abc"] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert not np.array_equal(after["a"], after["b"])
    np.testing.assert_array_equal(after["c"], optax.apply_updates(params, updates)["c"])
    np.testing.assert_allclose(after["a"].astype(jnp.float32).mean(), 1.001, atol=4 * 2.0**-7 / 2 / 64)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["a"], 1)  # which to the nearest never moves


def train(dtype, stochastic, name="adamw_8bit", steps=400):
    """Distance from a target, of weights that start 0.5 away and move 2^-9 a step at first."""
    target = np.random.default_rng(0).uniform(1, 1.5, (16, 256)).astype(np.float32)
    params = {"w": jnp.asarray(target + 0.5, dtype)}
    cfg = OptimizerConfig(
        name=name, learning_rate=2e-3, final_lr_fraction=0.0, stochastic_rounding=stochastic, groups=ALL
    )
    tx, _ = make_optimizer(cfg, params, steps)

    def step(carry, n):
        p, state = carry
        updates, state = tx.update({"w": (p["w"] - target).astype(dtype)}, state, p)
        key = jax.random.fold_in(jax.random.key(0), n)
        return (apply_updates(p, updates, key) if stochastic else optax.apply_updates(p, updates), state), None

    (p, _), _ = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps)))()
    return float(jnp.sqrt(jnp.square(p["w"].astype(jnp.float32) - target).mean()))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_bf16_weights_learn_as_fp32_ones_where_they_would_stall(name):
    fp32, stochastic, nearest = train("float32", False, name), train("bfloat16", True, name), train("bfloat16", False, name)
    assert nearest > 0.3 and fp32 < 0.15  # half a step of bf16 is 2^-8 there, more than the largest update
    assert abs(stochastic - fp32) < 0.02


@pytest.fixture(scope="module")
def toy(quick_compile):
    """A step of bf16 weights: `toy(microbatch_size) -> (step, state)`."""
    task = ToyTask(ToySource())
    as_bf16 = lambda tree: jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree)

    def make(microbatch_size=0, stochastic=True):
        cfg = TrainConfig(steps=8, batch_size=8, microbatch_size=microbatch_size)
        params = as_bf16(task.init(jax.random.key(0)))
        optimizer = OptimizerConfig(stochastic_rounding=stochastic, learning_rate=1e-3, schedule="constant", groups=ALL)
        tx, schedule = make_optimizer(optimizer, params, cfg.steps)
        step = jax.jit(make_train_step(task, tx, schedule, cfg, stochastic))
        return step, init_state(tx, cfg, params, {})

    return make


def test_a_resumed_run_rounds_as_the_unbroken_one(toy, same):
    """The key is of the step and of the batches jumped over, not of how often the function was called."""
    step, state = toy()
    batch = lambda n: ToySource().batch("train", n, 8)
    states = [state]
    for n in range(4):
        states.append(step(states[-1], batch(n))[0])
    again, halfway = toy()[0], jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), states[2])
    for n in (2, 3):
        halfway, _ = again(halfway, batch(n))
    assert same(halfway, states[4])
    first, other = (step(state.replace(step=jnp.int32(n)), batch(0))[0].params for n in (0, 1))
    assert not same(first, other)
    after_rollback = step(state.replace(data_offset=jnp.int32(5)), batch(0))[0].params
    assert not same(first, after_rollback)


def test_microbatches_round_as_one_batch_does(toy):
    """But where their sums differ in the last bits of fp32, which is rarely seen in bf16."""
    batch = ToySource().batch("train", 0, 8)
    results = []
    for microbatch_size, stochastic in ((0, True), (2, True), (0, False)):
        step, state = toy(microbatch_size, stochastic)
        leaves = jax.tree.leaves(step(state, batch)[0].params)
        results.append(np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in leaves]))
    whole, parts, nearest = results
    assert (whole != parts).mean() < 0.1 < (whole != nearest).mean()


def test_the_recipe_turns_it_on(tiny_recipe, make_task, quick_compile):
    """To the nearest no weight above 1e-3 moves at this rate; the key is the run's seed and its step."""
    moved = {}
    for stochastic in (False, True):
        optimizer = {"learning_rate": 1e-6, "warmup_steps": 0, "stochastic_rounding": stochastic}
        recipe = tiny_recipe(model={"param_dtype": "bfloat16", "n_embd": 32}, optimizer=optimizer)
        task = make_task(recipe)
        program = make_program(recipe, task, make_mesh(recipe.mesh))
        before = jax.tree.map(np.asarray, program.init().params)
        after = program.step(program.init(), task.source.batch("train", 0, 8))[0].params
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        moved[stochastic] = sum(int(((b != np.asarray(a)) & (np.abs(b) > 1e-3)).sum()) for b, a in pairs)
    assert moved[False] == 0 and moved[True] > 20


def test_without_weights_to_round_it_is_an_error():
    with pytest.raises(UserError, match=r"set model\.param_dtype=bfloat16"):
        make_optimizer(OptimizerConfig(stochastic_rounding=True, groups=ALL), {"w": jnp.ones(3)}, 10)
