"""One train step as people write it, and all that it works on."""

import contextlib
import dataclasses

import models
import optimizers
import torch
from tracker import Tracker


@dataclasses.dataclass
class Job:
    """A variant of a request, ready to step."""

    twin: models.Twin
    optimizer: torch.optim.Optimizer
    average: optimizers.WeightAverage | None
    batch: dict
    rows: int  # of a microbatch
    microbatches: int
    clip_norm: float
    device: str
    autocast: bool

    def step(self, enter=lambda phase: None, at_most: int = 0) -> None:
        """Gradients of all microbatches, then the update.

        Args:
          enter: called with the phase that begins, forward or update.
          at_most: microbatches, of which a plan needs only so many as differ in memory; 0: all.
        """
        self.gradients(enter, min(at_most or self.microbatches, self.microbatches))
        self.update(enter)

    def gradients(self, enter, microbatches: int) -> None:
        for i in range(microbatches):
            enter("forward")
            part = {name: x[i * self.rows : (i + 1) * self.rows] for name, x in self.batch.items()}
            with torch.autocast(self.device, torch.bfloat16) if self.autocast else contextlib.nullcontext():
                loss = self.twin.loss(part)
            (loss / self.microbatches).backward()
            del loss

    def update(self, enter=lambda phase: None) -> None:
        enter("update")
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.twin.trained, self.clip_norm, foreach=self.device == "cuda")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()


def prepare(request, variant, fake: bool) -> Job:
    """Everything made on the device, nothing run."""
    device, step = request.device, request.step
    twin = models.build(request.model, request.finetune, variant, device, fake)
    optimizer = optimizers.make(step.optimizer, twin.trained, variant, device, fake)
    return Job(
        twin=twin,
        optimizer=optimizer,
        average=optimizers.WeightAverage(twin.trained) if step.ema else None,
        batch=twin.batch(step.batch_size),
        rows=step.rows,
        microbatches=step.batch_size // step.rows,
        clip_norm=step.optimizer.get("clip_norm", 0),
        device=device,
        autocast=request.model["dtype"] == "bfloat16",
    )


def track(job: Job, tracker: Tracker) -> None:
    """Tell the tracker whose everything is; the optimizer's state once it is there."""
    parameters = list(job.twin.model.parameters())
    tracker.own("frozen parameters", [p for p in parameters if not p.requires_grad])
    tracker.own("frozen parameters", [*job.twin.model.buffers(), *job.twin.held])
    tracker.own("parameters", job.twin.trained)
    tracker.own("optimizer state", optimizers.state_of(job.optimizer))
    tracker.own("weight average", job.average.copies if job.average else [])
    tracker.own("batch", job.batch.values())


def tracked(job: Job) -> dict[str, int]:
    """Bytes of each owner between two steps."""
    tracker = Tracker(job.device)
    track(job, tracker)
    tracker.restart()
    return tracker.owners()
