"""Run by test_sharding.py in a process with eight simulated devices: trains on several meshes, prints what came out."""

import io
import json
import pathlib
import sys

import jax
import numpy as np

from jaxvram import recipe as recipes
from jaxvram.modes import make_task
from jaxvram.tasks.samples import Samples
from jaxvram.train import metrics, report
from jaxvram.train.checkpoint import Checkpoints
from jaxvram.train.loop import Loop
from jaxvram.train.optimizer import path_name

MESHES = {"4x2": {"data": 4, "fsdp": 2}, "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}}


def tiny_recipe(mesh):
    config, name, variant = recipes.load("configs/mingpt_sort.py")
    config.model.update(n_layer=1, n_head=2, n_embd=16, vocab_size=4, unroll_layers=False)
    config.train.update(steps=6, batch_size=16, microbatch_size=8, log_every=1)
    config.optimizer.learning_rate = 1e-2
    config.eval.update(every=3, batches=2)
    config.task.score_problems = 8
    config.mesh.update(mesh)
    return recipes.build(config, name, variant)


def make_loop(folder, mesh):
    recipe = tiny_recipe(mesh)
    task = make_task(recipe)
    task.scores, task.show = lambda params: {}, lambda params: Samples.of_texts([])
    return Loop(recipe, task, folder, io.StringIO())


def run(folder, mesh):
    loop = make_loop(folder, mesh)
    loop.run()
    lines = [[line["step"], line["loss"], line.get("grad_norm", 0)] for line in metrics.read(folder)]
    return loop, lines


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    jax.config.update("jax_disable_most_optimizations", True)
    report.write_report = lambda *args: None
    out = {"devices": jax.device_count()}
    for name, mesh in MESHES.items():
        loop, out[name] = run(folder / name, mesh)
        state, _ = Checkpoints(folder / name).restore("latest", loop.program.target)
        leaves = jax.tree_util.tree_leaves_with_path({"params": state.params, "moments": state.opt_state})
        out[f"{name} parts"] = {
            path_name(path): x.size // max(s.data.size for s in x.addressable_shards) for path, x in leaves
        }
    # half of the steps on one mesh, half on the other
    loop = make_loop(folder / "moved", MESHES["4x2"])
    loop._out_of_patience = lambda step: step == 3
    loop.run()
    loop, out["moved"] = run(folder / "moved", MESHES["2x2x2"])
    out["embedding"] = np.asarray(jax.device_get(loop.final_params["wte"]["embedding"])).tolist()
    out["shown"] = make_task(loop.recipe).show(loop.final_params).text.split("\n")
    print(json.dumps(out))
