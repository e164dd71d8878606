"""Our side of a measurement, in a process of its own: `python -m jaxvram.compare.measured_side < request.json`.

Request:
  way          measured
  device       cuda | cpu
  kind, recipe the model's name, and Recipe.as_dict() with the vocabulary known
  warm_up, timed   steps before, and steps of which the median time is told
  gpu          the card for nvidia-smi; used_bytes: what of it was in use before this process, null where not known
Answer:
  seconds_per_step
  on a GPU also card (fields of vram/cards.py's Card), peak_bytes, owners (what lies there between steps; the rest is
  workspace), compiled_bytes (the program's own sizes, compiled for this very card), peaks (the highest mark after
  compilation, after init and after the steps) and outside_bytes (of this process, outside JAX's allocator; null)
Memory is JAX's allocator's count, `peak_bytes_in_use`. That is since the process began, so the order is: compile, which may
autotune on the card while nothing else lies there; make the state; step. Where the last mark is above the others it is the
steps' own, and where it is not the steps need that at most.
"""

import dataclasses
import json
import statistics
import sys
import time

import jax
import numpy as np

from jaxvram import host, modes
from jaxvram import recipe as recipes
from jaxvram.errors import UserError
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh, to_devices
from jaxvram.vram import cards, nvidia_smi
from jaxvram.vram.compile import settle_platform

INSTALL = "pip install -e '.[cuda12]'"
BLOCK = 1 << 20  # random numbers that a frozen array is made of


def main() -> int:
    try:
        answer = answer_to(json.load(sys.stdin))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: out of memory: {' '.join(str(error).split())[:160]}", file=sys.stderr)
        return 2
    json.dump(answer, sys.stdout)
    return 0


def answer_to(request: dict) -> dict:
    host.keep_compiled_programs()
    if request["device"] == "cpu":
        host.keep_freed_memory()  # as launch.py does
    settle_platform()
    device = cards.local_device()
    if request["device"] == "cuda" and device is None:
        raise UserError(f"JAX {jax.__version__} here does not see the GPU of this machine: {INSTALL}")
    recipe = recipes.of_sections(request["recipe"], request["kind"])
    task = modes.make_task(recipe, with_data=False)
    return Measurement(request, recipe, task, device).run()


class Measurement:
    """The recipe's true train step, on random examples of the right shapes."""

    def __init__(self, request: dict, recipe, task, device):
        self.request, self.recipe, self.device = request, recipe, device
        self.program = make_program(recipe, task, make_mesh(recipe.mesh, jax.local_devices()[:1]))
        rows = recipe.train.batch_size
        self.batch = to_devices(random_batch(task, rows), rows, self.program.mesh)
        self.peaks = {}

    def run(self) -> dict:
        self._say("compiling")
        step = self.program.step.lower(self.program.target, self.batch).compile()
        self._mark("compile")
        state = self.program.init(self._frozen())
        jax.block_until_ready(state)
        self._mark("init")
        self._say(f"{self.request['warm_up']} + {self.request['timed']} steps")
        seconds = []
        for _ in range(self.request["warm_up"] + self.request["timed"]):
            start = time.perf_counter()
            state, _ = step(state, self.batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
        self._mark("steps")
        found = {"seconds_per_step": statistics.median(seconds[self.request["warm_up"] :])}
        return found | (self._memory(state, step.memory_analysis()) if self.device else {})

    def _frozen(self):
        """Weights that would come from a folder: leaf by leaf from the host, so that the card never holds them twice."""
        return jax.tree.map(random_like, self.program.target.frozen) or None

    def _mark(self, stage: str) -> None:
        if self.device:
            self.peaks[stage] = self.device.memory_stats()["peak_bytes_in_use"]

    def _memory(self, state, sizes) -> dict:
        between = {
            "parameters": state.params,
            "frozen parameters": state.frozen,
            "weight average": state.ema,
            "optimizer state": (state.opt_state, state.guard),
            "batch": self.batch,
        }
        owners = {owner: sum(x.nbytes for x in jax.tree.leaves(tree)) for owner, tree in between.items()}
        peak = self.peaks["steps"]
        return {
            "card": dataclasses.asdict(cards.local_card()),
            "peak_bytes": peak,
            "owners": owners | {"workspace": peak - sum(owners.values())},
            "compiled_bytes": sizes.argument_size_in_bytes
            + sizes.temp_size_in_bytes
            + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes,
            "peaks": self.peaks,
            "outside_bytes": self._outside(),
        }

    def _outside(self) -> int | None:
        """CUDA's context, libraries, kernels: what the card has in use more than before, less what the allocator holds."""
        seen, before = nvidia_smi.look(self.request["gpu"]), self.request["used_bytes"]
        pool = self.device.memory_stats().get("pool_bytes")
        if None in (seen, before, pool) or seen.used_bytes is None:
            return None
        return seen.used_bytes - before - pool

    def _say(self, what: str) -> None:
        print(f"{self.request['way']} {what}", file=sys.stderr, flush=True)


def random_batch(task, rows: int) -> dict:
    """A batch as the task's data would give it, of random numbers."""
    rng, cfg = np.random.default_rng(0), task.model.cfg
    below = {"segments": 1} | dict.fromkeys(("tokens", "targets"), getattr(cfg, "vocab_size", 0))
    below["labels"] = getattr(cfg, "num_classes", 0) or 1

    def random(name, spec):
        if np.issubdtype(spec.dtype, np.integer):
            # One example a row: it is segment 1, as 0 is the padding.
            return rng.integers(below[name], size=spec.shape, dtype=spec.dtype) + (name == "segments")
        return rng.standard_normal(spec.shape, spec.dtype)

    return {name: random(name, spec) for name, spec in task.batch_spec(rows).items()}


def random_like(spec) -> np.ndarray:
    """An array of random weights that takes no memory but for a block: its rows are that, each a number further on."""
    rng, rows = np.random.default_rng(0), spec.shape[0] if len(spec.shape) > 1 else 1
    width = int(np.prod(spec.shape)) // rows
    block = rng.integers(256, size=min(BLOCK, width + rows - 1), dtype=np.uint8)
    if not np.issubdtype(spec.dtype, np.integer):
        block = 0.02 * rng.standard_normal(block.size, np.float32)
    block = np.resize(block.astype(spec.dtype), width + rows - 1)
    return np.lib.stride_tricks.sliding_window_view(block, width).reshape(spec.shape)


if __name__ == "__main__":
    sys.exit(main())
