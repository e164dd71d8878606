"""Run by test_moe_mesh.py in a process with eight simulated devices: a mixture of experts trains on several meshes."""

import json
import math
import re

import jax
import numpy as np

from jaxvram import recipe as recipes
from jaxvram.modes import make_task
from jaxvram.train.optimizer import path_name
from jaxvram.train.program import make_program
from jaxvram.train.sharding import MeshConfig, make_mesh, to_devices

MESHES = {"2x4": {"data": 2, "expert": 4}, "fsdp, expert, tensor": {"fsdp": 2, "expert": 2, "tensor": 2}}
CAPACITY = {"dropless": 0.0, "with room for 1.5": 1.5}
STEPS, BATCH, MICROBATCH, T, E, F = 3, 16, 8, 16, 4, 32


def build(capacity_factor, mesh):
    config, name, variant = recipes.load("configs/grok.py:tiny")
    config.model.update(n_layer=1, n_embd=16, n_inner=F, n_head=2, n_kv_head=2, vocab_size=32, block_size=T, n_expert=E)
    config.model.update(capacity_factor=capacity_factor, balance_loss=0.1, unroll_layers=False, kernels="xla", remat="full")
    config.train.update(steps=STEPS, batch_size=BATCH, microbatch_size=MICROBATCH)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
    config.mesh.update(mesh)
    return recipes.build(config, name, variant)


def run(capacity_factor, mesh, devices):
    """([step, loss, gradient norm, share dropped, loads] of each step, the program, the last state)."""
    recipe = build(capacity_factor, mesh)
    program = make_program(recipe, make_task(recipe, with_data=False), make_mesh(MeshConfig(**mesh), devices))
    state, random, lines = program.init(), np.random.RandomState(0), []
    for step in range(STEPS):
        tokens_BxT = random.randint(0, 32, (BATCH, T)).astype(np.int32)
        batch = to_devices({"tokens": tokens_BxT, "targets": (tokens_BxT + 1) % 32}, BATCH, program.mesh)
        state, metrics = program.step(state, batch)
        metrics = jax.device_get(metrics)
        numbers = [float(metrics[name]) for name in ("loss", "grad_norm", "router_dropped")]
        lines.append([step, *numbers, *metrics["router_load"].ravel().tolist()])
    return lines, program, state, batch


def cut(state):
    """Into how many parts the arrays of the experts are cut."""
    leaves = jax.tree_util.tree_leaves_with_path({"params": state.params, "moments": state.opt_state})
    parts = {path_name(path): x.size // max(s.data.size for s in x.addressable_shards) for path, x in leaves}
    return {name: n for name, n in parts.items() if "experts/" in name}


def rows_a_device_multiplies(program, state, batch):
    """Rows of the experts' products in the forward pass of the compiled step."""
    text = program.step.lower(state, batch).compile().as_text()
    found = re.findall(r'= f32\[([\d,]+)\]\S* dot\(.*op_name="([^"]*moe/experts[^"]*)"', text)
    shapes = [[int(n) for n in shape.split(",")] for shape, name in found if "transpose(" not in name]
    return sorted({math.prod(shape[:-1]) for shape in shapes})


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    out = {"devices": jax.device_count()}
    for how, factor in CAPACITY.items():
        for name, mesh in MESHES.items():
            lines, program, state, batch = run(factor, mesh, jax.devices())
            out[f"{name}, {how}"] = {"lines": lines, "cut": cut(state)}
            if factor:
                out[f"{name}, {how}"]["rows"] = rows_a_device_multiplies(program, state, batch)
    print(json.dumps(out))
