"""What the comparisons of recurrent models share: a run by launch.py that is made once, sizes, colours."""

import math
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
COLOURS = {
    "GPT-2": "#555555", "Mamba": "#1f77b4", "Mamba-2": "#17becf", "RetNet": "#2ca02c",
    "RWKV-4": "#e8a33d", "RWKV-6": "#d6604d", "RWKV-7": "#8e1b54",
}  # fmt: skip


def built(config: str, changes: dict):
    """The recipe configs/FILE.py:VARIANT, changed."""
    from jaxvram import recipe

    loaded, *rest = recipe.load(str(ROOT / "configs" / config))
    loaded.update_from_flattened_dict(changes)
    return recipe.build(loaded, *rest)


def command(config: str, changes: dict) -> str:
    return " ".join([f"python launch.py --config=configs/{config}", *(f"--config.{k}={v}" for k, v in changes.items())])


def finish(config: str, changes: dict, folder: pathlib.Path) -> list[dict]:
    """The lines of the run's metrics; it is trained, or trained to its end, unless it has been."""
    from jaxvram.train import metrics

    steps = built(config, changes).train.steps
    done = lambda: any(line["step"] == steps and line.get("split") == "val" for line in metrics.read(folder))
    if not done():
        arguments = command(config, changes).split()[1:]
        subprocess.run([sys.executable, *arguments, f"--workdir={folder}"], cwd=ROOT, check=True)
    return metrics.read(folder)


def parameters(cfg) -> tuple[int, int]:
    """(all of a model, those that are neither in the table nor in the head)."""
    import jax
    import jax.numpy as jnp

    from jaxvram import models

    model, rows = models.build(cfg), -(-cfg.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple
    shapes = jax.tree.leaves(
        jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)), jax.random.key(0))
    )
    total = sum(x.size for x in shapes)
    return total, total - sum(x.size for x in shapes if rows in x.shape)


def state_bytes(cfg, tokens: int) -> int:
    """What a model remembers of one sequence of so many tokens, all layers."""
    import jax

    from jaxvram import models

    model = models.build(cfg)
    state = jax.eval_shape(lambda: model.apply({}, 1, tokens, method="initial_state"))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
