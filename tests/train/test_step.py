"""Microbatches add up to the batch, the state is donated, one compilation serves every step, EMA follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import ToyTask

from jaxvram.errors import UserError
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh
from jaxvram.train.step import TrainConfig, loss_and_gradients

pytestmark = pytest.mark.usefixtures("quick_compile")
compiled = jax.jit(loss_and_gradients, static_argnums=(0, 4))


@pytest.fixture(scope="module")
def uneven(quick_compile, tiny_recipe, make_task):
    """A task without dropout and a batch of 8 whose rows have 7, 6, ... 0 targets."""
    recipe = tiny_recipe(model={"dropout": 0.0, "n_layer": 2})
    task = make_task(recipe)
    batch = task.source.batch("train", 0, 8)
    keep = np.arange(7)[None] < np.arange(8)[:, None]
    return recipe, task, {**batch, "targets": np.where(keep, batch["tokens"], -1).astype(np.int32)}


@pytest.fixture(scope="module")
def program(quick_compile, tiny_recipe, make_task):
    recipe = tiny_recipe()
    return make_program(recipe, make_task(recipe), make_mesh(recipe.mesh))


def test_microbatches_equal_one_batch_with_uneven_masks(uneven):
    _recipe, task, batch = uneven
    params = task.init(jax.random.key(0))
    key = jax.random.key(1)
    loss, grads, _ = compiled(task, params, batch, key, 1)
    loss_sum, weight, _ = jax.jit(task.loss)(params, batch)
    assert weight == 28
    np.testing.assert_allclose(loss, loss_sum / 28, rtol=1e-6)
    for microbatches in (2, 8):
        loss_k, grads_k, _ = compiled(task, params, batch, key, microbatches)
        np.testing.assert_allclose(loss_k, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads_k, grads)


def test_many_microbatches_of_bf16_weights_are_summed_in_fp32(uneven):
    """A running sum of 8 in bf16 would be off by a per cent of the largest."""
    _, task, batch = uneven
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), task.init(jax.random.key(0)))
    (_, whole, _), (_, sums, _) = (compiled(task, params, batch, jax.random.key(1), k) for k in (1, 8))
    assert {g.dtype for g in jax.tree.leaves(sums)} == {jnp.dtype(jnp.bfloat16)}
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole))
    off = jax.tree.map(lambda a, b: float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()), sums, whole)
    assert all(x < 5e-3 * largest for x in jax.tree.leaves(off))  # `max` would pass over one that is not a number


def test_the_average_of_bf16_weights_moves(tiny_recipe):
    """A thousandth of a difference is below what bf16 can add."""
    recipe = tiny_recipe(train={"ema_decay": 0.999})
    task = ToyTask()
    init = task.init
    task.init = lambda key: jax.tree.map(lambda p: p.astype(jnp.bfloat16), init(key))
    program = make_program(recipe, task, make_mesh(recipe.mesh))
    state = program.init()
    before = np.asarray(state.ema["wte"]["embedding"])
    state = state.replace(step=state.step + 100_000)  # past the warm-up of the average
    for n in range(3):
        state, _ = program.step(state, task.source.batch("train", n, 8))
    moved = np.asarray(state.ema["wte"]["embedding"]) - before
    assert state.ema["wte"]["embedding"].dtype == jnp.float32 and (moved != 0).mean() > 0.5


def test_a_step_of_microbatches_gives_the_same_parameters(uneven, tiny_recipe):
    _, task, batch = uneven
    after = {}
    for size in (0, 2):
        recipe = tiny_recipe(model={"dropout": 0.0, "n_layer": 2}, train={"microbatch_size": size})
        program = make_program(recipe, task, make_mesh(recipe.mesh))
        state, metrics = program.step(program.init(), batch)
        after[size] = state.params, metrics["loss"], metrics["grad_norm"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after[0], after[2])


def test_microbatches_draw_their_own_dropout(program, uneven):
    """With dropout, rows that are equal must not be masked equally in two microbatches."""
    _, _task, batch = uneven

    class Noisy(ToyTask):
        def loss(self, params, batch, key=None):
            noise = jax.random.uniform(key)
            return noise * params["x"], jnp.float32(1), {"noise": noise**2}

    _, _, metrics = loss_and_gradients(Noisy(), {"x": jnp.float32(1)}, batch, jax.random.key(0), 2)
    drawn = [float(jax.random.uniform(k)) for k in jax.random.split(jax.random.key(0), 2)]
    np.testing.assert_allclose(metrics["noise"], np.square(drawn).mean(), rtol=1e-6)


def test_a_batch_without_targets_has_no_gradient(uneven):
    _, task, batch = uneven
    params = task.init(jax.random.key(0))
    empty = {**batch, "targets": np.full_like(batch["targets"], -1)}
    loss, grads, _ = compiled(task, params, empty, jax.random.key(1), 1)
    assert loss == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


def test_one_compilation_and_the_state_is_donated(program, tiny_recipe, make_task):
    source = make_task(tiny_recipe()).source
    state = program.init()
    for n in range(4):
        before = state
        state, _ = program.step(
            state, source.batch("train", n, 8)
        )  # an unused donation would warn, and warnings are errors
        alive = [x for x in jax.tree.leaves(before) if not x.is_deleted()]
        assert not alive, alive
    assert program.step._cache_size() == 1
    assert program.fresh._cache_size() == 1


def test_dropout_is_a_function_of_seed_and_step(program, tiny_recipe, make_task, same):
    batch = make_task(tiny_recipe()).source.batch("train", 0, 8)
    first, again = (program.step(program.init(), batch)[1]["loss"] for _ in range(2))
    later = program.step(program.init().replace(step=jnp.int32(1)), batch)[1]["loss"]
    offset = program.step(program.init().replace(data_offset=jnp.int32(1)), batch)[1]["loss"]
    assert same(first, again) and first != later and same(later, offset)


def test_the_first_rate_is_that_of_the_warmup(program, tiny_recipe, make_task):
    source = make_task(tiny_recipe()).source
    state, rates = program.init(), []
    for n in range(5):
        state, metrics = program.step(state, source.batch("train", n, 8))
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates[:4], [0.0025, 0.005, 0.0075, 0.01], rtol=1e-6)
    assert rates[4] < 0.01


def test_ema_is_the_average_it_says_and_is_what_gets_evaluated(tiny_recipe):
    recipe, task = tiny_recipe(train={"ema_decay": 0.5}), ToyTask()
    program = make_program(recipe, task, make_mesh(recipe.mesh))
    state = program.init()
    ema = np.asarray(state.params["wte"]["embedding"])
    np.testing.assert_array_equal(state.ema["wte"]["embedding"], ema)
    for n in range(12):
        state, _ = program.step(state, task.source.batch("train", n, 8))
        decay = min(0.5, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * np.asarray(state.params["wte"]["embedding"])
    np.testing.assert_allclose(state.ema["wte"]["embedding"], ema, rtol=1e-5)
    assert state.eval_params is state.ema and not np.allclose(ema, state.params["wte"]["embedding"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 8, "microbatch_size": 3},
        {"steps": 0},
        {"log_every": 0},
        {"seed": 2**63},
        {"ema_decay": 1.0},
        {"microbatch_size": -2},
    ],
)
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match="train"):
        TrainConfig(**wrong)
