"""Run by test_adam8bit.py in a process with two simulated devices: a few steps of adamw_8bit, printed."""

import json

import jax

from jaxvram import recipe as recipes
from jaxvram.modes import make_task
from jaxvram.train.optimizer import path_name
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh, to_devices


def run(mesh):
    """(losses, {path of an array of the optimizer's state: devices it is cut over})."""
    config, name, variant = recipes.load("configs/mingpt_sort.py")
    config.model.update(n_layer=2, n_head=2, n_embd=256, vocab_size=4, unroll_layers=False, dropout=0.0)
    config.train.update(steps=6, batch_size=16)
    config.optimizer.update(name="adamw_8bit", learning_rate=1e-3, schedule="constant", warmup_steps=0)
    config.mesh.update(mesh)
    recipe = recipes.build(config, name, variant)
    task, mesh = make_task(recipe), make_mesh(recipe.mesh)
    program = make_program(recipe, task, mesh)
    state, losses = program.init(), []
    for n in range(6):
        state, metrics = program.step(state, to_devices(task.source.batch("train", n, 16), 16, mesh))
        losses.append(float(metrics["loss"]))
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return losses, {path_name(path): x.size // max(s.data.size for s in x.addressable_shards) for path, x in leaves}


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    losses, parts = run({"fsdp": 2})
    print(json.dumps({"losses": losses, "parts": parts}))
