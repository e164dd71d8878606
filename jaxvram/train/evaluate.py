"""Loss on a fixed set of batches, the same at every evaluation and on every machine."""

import dataclasses

import jax

from jaxvram.errors import UserError
from jaxvram.train.sharding import local_rows, to_devices


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
    """`evaluator(params, split)` -> mean loss over the fixed batches. Compiled once."""

    def __init__(self, task, cfg: EvalConfig, batch_size: int, mesh):
        self.task, self.cfg, self.mesh = task, cfg, mesh
        self.batch_size = cfg.batch_size or batch_size
        self.rows = local_rows(self.batch_size, mesh, "eval.batch_size (0: that of a microbatch)")
        self.loss = jax.jit(lambda params, batch: task.loss(params, batch)[:2])

    def __call__(self, params, split: str) -> float:
        sums = []
        for n in range(self.cfg.batches):
            batch = self.task.source.batch(split, n, self.batch_size, self.rows)
            sums.append(self.loss(params, to_devices(batch, self.batch_size, self.mesh)))
        loss_sum = sum(float(loss) for loss, _ in sums)
        weight = sum(float(weight) for _, weight in sums)
        return loss_sum / max(weight, 1e-9)
