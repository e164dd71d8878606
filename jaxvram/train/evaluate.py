"""Loss on a fixed set of batches, the same at every evaluation and on every machine."""

import dataclasses

import jax
import numpy as np

from jaxvram.errors import UserError
from jaxvram.train.sharding import local_rows, to_devices

KEY = 0x6A617876  # of whatever an evaluation draws (noise, timesteps): the same for every seed, as its batches are


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = 250  # steps between evaluations; 0: only after the last
    batches: int = 20  # of each split, fixed
    batch_size: int = 0  # 0: that of a train step's microbatch
    train_split: bool = False  # the training split as well

    def __post_init__(self):
        if self.batches < 1 or min(self.every, self.batch_size) < 0:
            raise UserError("eval: batches must be at least 1, every and batch_size must not be negative")


class Evaluator:
    """`evaluator(params, split)` -> {name: mean} over the fixed batches, "loss" and what else had weight. Compiled once.

    A mean is a float, or lists of them.
    """

    def __init__(self, task, cfg: EvalConfig, batch_size: int, mesh):
        self.task, self.cfg, self.mesh = task, cfg, mesh
        self.batch_size = cfg.batch_size or batch_size
        self.rows = local_rows(self.batch_size, mesh, "eval.batch_size (0: that of a microbatch)")
        key_of = lambda n: jax.random.fold_in(jax.random.key(KEY), n)
        self.sums = jax.jit(lambda params, batch, n: task.evaluation(params, batch, key_of(n)))

    def __call__(self, params, split: str) -> dict[str, float | list]:
        sums = []
        for n in range(self.cfg.batches):
            batch = self.task.source.batch(split, n, self.batch_size, self.rows)
            sums.append(self.sums(params, to_devices(batch, self.batch_size, self.mesh), n))
        sums = jax.device_get(sums)
        total = lambda name, i: sum(np.asarray(of_batch[name][i], np.float64) for of_batch in sums)
        weights = {name: float(total(name, 1)) for name in sums[0]}
        return {n: (total(n, 0) / max(w, 1e-9)).tolist() for n, w in weights.items() if w > 0 or n == "loss"}
