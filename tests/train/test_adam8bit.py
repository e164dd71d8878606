"""8-bit Adam: maps and steps against bitsandbytes, nearest codes by brute force, bytes, meshes, and that it learns."""

import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adam8bit_on_devices import run

from jaxvram.train.adam8bit import dynamic_map, nearest_code, scale_by_adam_8bit, value
from jaxvram.train.checkpoint import Checkpoints
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup, make_optimizer
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh
from jaxvram.train.stochastic_rounding import apply_updates
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

ROOT = pathlib.Path(__file__).parents[2]
ALL = {"all": ParamGroup(".*")}
SHAPES = {"even": (3, 8, 512), "odd": (5, 1001), "small": (4095,), "least": (4096,), "scalar": ()}


@pytest.mark.parametrize("signed, golden", [(True, "e732639a65f497b4"), (False, "305f002cc11278fb")])
def test_the_maps_are_bitsandbytes(signed, golden):
    """The hash is of bitsandbytes 0.50.2's create_dynamic_map."""
    assert hashlib.sha256(dynamic_map(signed).tobytes()).hexdigest()[:16] == golden


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_those_of_the_bitsandbytes_that_is_here(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed).numpy())


def numbers(signed):
    random = np.random.default_rng(0)
    both = np.concatenate([random.uniform(0, 1, 20_000), 10 ** random.uniform(-9, 0, 20_000)])
    return (both * random.choice([-1, 1] if signed else [1], both.size)).astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_of_the_nearest_entry(signed):
    x = numbers(signed)
    codes, entries = np.asarray(nearest_code(x, signed)), dynamic_map(signed).astype(np.float64)
    off = np.abs(x[:, None] - entries)
    excess = off[np.arange(x.size), codes] - off.min(1)
    if not signed:  # positive stays positive
        assert (codes[x > 0] > 0).all() and nearest_code(np.zeros(1, np.float32), False) == 0
        excess = excess[x > entries[1]]
    assert (excess <= 1e-6 * np.abs(x[-excess.size :]).max()).all() and (excess > 0).mean() < 1e-3


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_stands_for_its_entry(signed):
    codes, entries = np.arange(256, dtype=np.uint8), dynamic_map(signed)
    np.testing.assert_allclose(value(codes, signed), entries, rtol=1e-6)
    np.testing.assert_array_equal(nearest_code(entries, signed), codes)


def gradients(n):
    random = np.random.default_rng(n)
    return {name: np.float32(random.normal(0, 0.1, shape)) for name, shape in SHAPES.items()}


def test_steps_are_those_of_bitsandbytes():
    """Each from its state and weights: on a CPU its codes are not the nearest, by up to seven below 1e-4 of the largest."""
    bitsandbytes, torch = pytest.importorskip("bitsandbytes"), pytest.importorskip("torch")
    start = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    reference = bitsandbytes.optim.AdamW8bit(theirs.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    groups = {"all": ParamGroup(".*", 0.1)}
    cfg = OptimizerConfig(name="adamw_8bit", learning_rate=1e-3, schedule="constant", clip_norm=0, groups=groups)
    tx, _ = make_optimizer(cfg, start, 10)
    state, update = tx.init(start), jax.jit(tx.update)
    for n in range(5):
        for name, g in gradients(n).items():
            theirs[name].grad = torch.tensor(g)
        params = {name: p.detach().numpy().copy() for name, p in theirs.items()}
        if n:
            state = (as_theirs(state[0], {name: reference.state[p] for name, p in theirs.items()}), *state[1:])
        updates, state = update(gradients(n), state, params)
        params = optax.apply_updates(params, updates)
        reference.step()
        for name, p in theirs.items():
            np.testing.assert_allclose(params[name], p.detach(), rtol=0, atol=2e-7, err_msg=f"{name} {n}")
            expected, given = as_theirs(state[0], {name: reference.state[p] for name, p in theirs.items()}), state[0]
            compare(np.asarray(given.mu[name]), expected.mu[name], True)
            compare(np.asarray(given.nu[name]), expected.nu[name], False)
            if name in ("even", "odd", "least"):
                np.testing.assert_allclose(given.mu_absmax[name], expected.mu_absmax[name], rtol=1e-6)
                np.testing.assert_allclose(given.nu_absmax[name], expected.nu_absmax[name], rtol=1e-6)


def as_theirs(state, reference):
    """Our state with the codes and magnitudes of theirs."""
    new = {}
    for ours, number, zero in (("mu", 1, 127), ("nu", 2, 0)):
        codes, absmax = dict(getattr(state, ours)), dict(getattr(state, f"{ours}_absmax"))
        for name, their in reference.items():
            flat = their[f"state{number}"].numpy().reshape(-1)
            flat = np.pad(flat, (0, codes[name].size - flat.size), constant_values=zero)
            codes[name] = flat.reshape(codes[name].shape)
            if flat.dtype == np.uint8:
                absmax[name] = their[f"absmax{number}"].numpy().reshape(absmax[name].shape).copy()
        new |= {ours: codes, f"{ours}_absmax": absmax}
    return state._replace(**new)


def compare(ours, theirs, signed):
    assert ours.dtype == theirs.dtype == (np.uint8 if ours.size >= 4096 else np.float32)
    if ours.dtype == np.float32:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
        return
    apart = np.abs(ours.astype(int) - theirs)[np.abs(dynamic_map(signed)[ours]) > 1e-4]
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02


def state_bytes(shape):
    state = jax.eval_shape(scale_by_adam_8bit().init, {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)})
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) - 4  # the count


@pytest.mark.parametrize("shape", [(12, 768, 3072), (64, 64), (50257, 768)])
def test_two_bytes_and_a_thirty_second_a_parameter(shape):
    assert state_bytes(shape) == np.prod(shape) * (2 + 8 / 256)


def test_bytes_of_odd_and_of_small_arrays():
    assert state_bytes((5, 1001)) == 20 * (2 * 256 + 8)  # 5005 elements fill 20 blocks, the last in part
    assert state_bytes((4095,)) == 4095 * 8


def test_codes_lie_as_their_parameter_where_blocks_fit_its_rows():
    state = scale_by_adam_8bit().init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    shapes = lambda tree: {name: x.shape for name, x in tree.items() if hasattr(x, "shape")}
    assert shapes(state.mu) == SHAPES | {"odd": (5120,), "least": (4096,)}
    assert shapes(state.nu_absmax) == {"even": (3, 8, 2), "odd": (20,), "least": (16,)}


def test_a_second_moment_that_rounds_to_nothing_does_not_blow_up_the_step():
    """1e-4 beside 1: as a second moment 1e-8, less than the smallest entry; the first moment is kept."""
    params, big = {"w": np.zeros(4096, np.float32)}, np.ones(4096, np.float32)
    first, second = big.copy(), big.copy()
    first[7], second[7] = 1e-4, 0.0
    steps = []
    for tx in (scale_by_adam_8bit(0.9, 0.999), optax.scale_by_adam(0.9, 0.999)):
        _, state = tx.update({"w": first}, tx.init(params))
        steps.append(tx.update({"w": second}, state)[0]["w"][7])
    assert 0 < steps[0] <= 1.1 * steps[1]


def test_it_learns_as_adamw_does():
    """A net of two layers, 300 steps; to a tenth of a per cent of where it began, and within a fifth of fp32's end."""
    random = np.random.default_rng(0)
    x_Nx32 = random.normal(0, 1, (512, 32)).astype(np.float32)
    y_Nx8 = np.tanh(x_Nx32 @ random.normal(0, 0.3, (32, 8))).astype(np.float32)
    params = {"a": random.normal(0, 0.17, (32, 256)), "b": random.normal(0, 0.06, (256, 8)), "c": np.zeros(8)}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)

    def loss(p):
        return jnp.square(jnp.tanh(x_Nx32 @ p["a"]) @ p["b"] + p["c"] - y_Nx8).mean()

    def train(name):
        cfg = OptimizerConfig(name=name, learning_rate=1e-2, final_lr_fraction=0.0, groups=ALL)
        tx, _ = make_optimizer(cfg, params, 300)

        def step(carry, _):
            p, state = carry
            l, g = jax.value_and_grad(loss)(p)
            updates, state = tx.update(g, state, p)
            return (optax.apply_updates(p, updates), state), l

        return np.asarray(jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=300)[1])())

    ours, fp32 = train("adamw_8bit"), train("adamw")
    assert ours[-1] < 2e-3 * ours[0] and ours[-1] < 1.2 * fp32[-1]
    assert not np.array_equal(ours, fp32)


FROZEN = {
    "frozen": ParamGroup(".*(bias|scale|attn/kernel)", lr_multiplier=0.0),
    "trained": ParamGroup(".*(embedding|c_proj/kernel|c_fc/kernel|lm_head/kernel)", 0.1),
}
WIDE = {"n_embd": 64, "n_head": 2}  # 12,288 to 16,384 elements a matrix; of c_fc even, of the others odd


@pytest.mark.parametrize("groups", [None, FROZEN])
def test_a_run_in_two_parts_is_one_run(tiny_recipe, make_task, tmp_path, same, quick_compile, groups):
    """Through a checkpoint, in bf16, with and without frozen weights; a step that the guard refuses leaves all as it was."""
    options = {"groups": groups} if groups else {}
    recipe = tiny_recipe(
        model=WIDE | {"param_dtype": "bfloat16"},
        optimizer={"name": "adamw_8bit", "stochastic_rounding": True, **options},
    )
    task = make_task(recipe)
    program = make_program(recipe, task, make_mesh(recipe.mesh))
    batch = lambda n: task.source.batch("train", n, 8)
    whole = program.init()
    for n in range(4):
        if n == 2:
            checkpoints = Checkpoints(tmp_path)
            checkpoints.save("latest", 2, whole, {})
            checkpoints.close()
        whole, metrics = program.step(whole, batch(n))
    parts, _ = Checkpoints(tmp_path).restore("latest", program.target)
    for n in (2, 3):
        parts, _ = program.step(parts, batch(n))
    assert same(whole, parts) and metrics["skipped"] == 0
    start = program.init()
    stayed = lambda *path: same(*(functools.reduce(lambda tree, name: tree[name], path, s.params) for s in (start, whole)))
    assert not stayed("h", "mlp", "c_fc") and not stayed("h", "mlp", "c_proj", "kernel")
    assert stayed("h", "attn", "c_attn", "kernel") == stayed("ln_f") == bool(groups)
    before = jax.tree.map(np.asarray, (whole.params, whole.opt_state))
    guard = whole.guard  # all that it ever saw were zeros
    poisoned = whole.replace(guard=guard.replace(seen=jnp.int32(10**6), recent_Wx2=jnp.zeros_like(guard.recent_Wx2)))
    after, metrics = program.step(poisoned, batch(4))
    assert metrics["skipped"] == 1 and same(before, (after.params, after.opt_state))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"
    }  # fmt: skip
    codes = tmp_path_factory.mktemp("two") / "codes.npy"
    command = [sys.executable, str(pathlib.Path(__file__).with_name("adam8bit_on_devices.py")), str(codes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(codes), json.loads(done.stdout.splitlines()[-1])


def test_two_devices_have_the_codes_of_one_and_share_them(two):
    codes, parts = two
    apart = np.abs(codes.astype(int) - run({})[0])  # what lies between two codes may fall to either, as sums are compiled
    assert apart.shape == (4, 2 * (131072 + 32768 + 501 * 256)) and apart.max() <= 1 and apart.mean() < 1e-4
    cut = {name for name, count in parts.items() if count == 2}
    assert cut == {
        "mu/h/c_attn/kernel", "mu_absmax/h/c_attn/kernel", "nu/h/c_attn/kernel", "nu_absmax/h/c_attn/kernel",
        "mu/h/c_proj/kernel", "nu/h/c_proj/kernel",  # a block is a row, half of it on either device: its magnitude on both
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 1024, 2048), (4, 1000, 1001)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_moment_is_ever_in_memory_in_fp32(shape, dtype):
    """Nor a second gradient: clipped, guarded and rounded in place it takes as much beside the gradient as AdamW does."""
    temporary = {}
    for name in ("adamw", "adamw_8bit"):
        params = {"w": jax.ShapeDtypeStruct(shape, dtype)}
        cfg = OptimizerConfig(name=name, stochastic_rounding=dtype == "bfloat16", groups={"all": ParamGroup(".*", 0.1)})
        tx, _ = make_optimizer(cfg, params, 10)
        state = params, jax.eval_shape(tx.init, params)
        xs, key = jax.ShapeDtypeStruct((4, 128, 2048), "float32"), jax.eval_shape(lambda: jax.random.PRNGKey(0))
        compiled = compile_for(cards.find("rtx4070"), one_step(tx, cfg), (state, xs, key), (0,))
        assert compiled.output_bytes - compiled.aliased_bytes < 1000
        temporary[name] = compiled.temporary_bytes
    assert temporary["adamw_8bit"] <= temporary["adamw"] + 0.1 * np.prod(shape)


def one_step(tx, cfg):
    """With gradients from a scan, as those of a stack of layers are: XLA merges its zeros with any others of their shape."""

    def step(state, xs, key):
        params, moments = state
        (L, D, F), dtype = params["w"].shape, params["w"].dtype
        of_layer = lambda x: (x.T @ x)[:D, :F].astype(dtype)
        grads = {"w": jax.lax.scan(lambda carry, x: (carry, of_layer(x)), 0.0, xs[:L])[1]}
        grads = jax.tree.map(lambda g: (g / xs.sum()).astype(dtype), grads)
        good = jnp.isfinite(optax.tree.norm(grads))
        updates, new = tx.update(grads, moments, params)
        new = apply_updates(params, updates, key) if cfg.stochastic_rounding else optax.apply_updates(params, updates), new
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)

    return step
