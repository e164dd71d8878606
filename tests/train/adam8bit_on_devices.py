"""Run by test_adam8bit.py in a process with two simulated devices: steps of 8-bit Adam on arrays that are cut, printed."""

import json
import sys

import jax
import numpy as np

from jaxvram.train.adam8bit import scale_by_adam_8bit
from jaxvram.train.optimizer import path_name
from jaxvram.train.sharding import MeshConfig, make_mesh, shardings

# Cut between blocks, through blocks, and not at all: its blocks are no parts of its rows.
SHAPES = {"c_attn": (2, 64, 1024), "c_proj": (2, 64, 256), "c_fc": (2, 64, 1001)}


def run(mesh):
    """(the codes of all moments after each step, one under another; {path in the state: devices it is cut over})."""
    arrays = lambda n: {"h": {name: {"kernel": normal(n, shape)} for name, shape in SHAPES.items()}}
    normal = lambda n, shape: np.random.default_rng(n).normal(0, 0.1, shape).astype(np.float32)
    mesh = make_mesh(MeshConfig(**mesh))
    tx, grads = scale_by_adam_8bit(), arrays(0)
    homes = shardings((grads, jax.eval_shape(tx.init, grads)), mesh)
    state = jax.jit(tx.init, out_shardings=homes[1])(grads)
    update, codes = jax.jit(tx.update, out_shardings=homes, donate_argnums=1), []
    for n in range(4):
        _, state = update(jax.device_put(arrays(n), homes[0]), state)
        codes.append(np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves((state.mu, state.nu))]))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    parts = {path_name(path): x.size // max(s.data.size for s in x.addressable_shards) for path, x in leaves}
    return np.stack(codes), parts


if __name__ == "__main__":
    codes, parts = run({"fsdp": 2})
    np.save(sys.argv[1], codes)
    print(json.dumps(parts))
