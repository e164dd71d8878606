"""The training loop: dispatch a step, then read the metrics of the one before; evaluate, save, recover, stop."""

import contextlib
import json
import math
import pathlib
import signal
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxvram.data.pipeline import batches
from jaxvram.errors import UserError
from jaxvram.train import report
from jaxvram.train.average import make_average
from jaxvram.train.checkpoint import Checkpoints, check_workdir, look
from jaxvram.train.evaluate import Evaluator
from jaxvram.train.interrupt import Interrupt
from jaxvram.train.metrics import MetricsLog, write_atomic, write_samples
from jaxvram.train.program import make_program
from jaxvram.train.progress import Progress
from jaxvram.train.sharding import local_rows, make_mesh, to_devices

REPORT_SECONDS = 60  # at the least between two drawings of report.html


class Loop:
    """One run: trains to `recipe.train.steps`, resuming whatever `workdir` holds. Read `run` first.

    Args:
      recipe: a Recipe.
      task: what is learnt (tasks/).
      workdir: the run folder; made if need be.
      stream: where progress goes; None: standard output.
    Raises:
      UserError: the folder belongs to another recipe, a checkpoint is damaged, the disk is full, or the run diverged
        more often than the guard allows.
    """

    def __init__(self, recipe, task, workdir, stream=None):
        check_workdir(pathlib.Path(workdir), recipe, task.data_identity)
        self.recipe, self.task, self.workdir = recipe, task, pathlib.Path(workdir)
        self.writes = jax.process_index() == 0
        self.program = make_program(recipe, task, make_mesh(recipe.mesh))
        cfg = recipe.train
        self.rows = local_rows(cfg.batch_size, self.program.mesh)
        self.evaluator = Evaluator(task, recipe.eval, cfg.batch_size // cfg.microbatches, self.program.mesh)
        self.checkpoints = Checkpoints(workdir)
        self.average = make_average(cfg, self.program.target)
        self.best_loss, self.best_step, self.evaluations_since_best, self.rollbacks = math.inf, 0, 0, 0
        self.last_evaluation: dict = {}
        self.interrupt, self.stopping = Interrupt(), False
        self.tracing = False
        self.stream = stream

    def run(self, init_params=None) -> dict:
        """The last evaluation. `init_params`: parameters to start from; None: from the seed."""
        cfg = self.recipe.train
        state, start, meta, notes = self._begin(init_params)
        self.progress = Progress(
            cfg.steps, start, cfg.batch_size * self.task.units_per_example, self.task.unit,
            every=cfg.log_every, device=jax.local_devices()[0], stream=self.stream, active=self.writes,
        )  # fmt: skip
        self.progress.restore(meta.get("clock", {}))
        with MetricsLog(self.workdir, active=self.writes) as self.log, self.interrupt.listening():
            dropped = self.log.truncate_after(start)
            for note in [*notes, *([f"dropped {dropped} line(s) of metrics after step {start}"] if dropped else [])]:
                self.progress.note(note)
            status = "failed"
            try:
                self._report("running")
                state = self._steps(state, start)
                self.checkpoints.wait()
                status = "interrupted" if self.stopping else "finished"
            except UserError as error:
                status = f"failed: {error}"
                raise
            finally:
                self._end(status)
        self.final_params = self.average.evaluated(state)
        return self.last_evaluation

    def _begin(self, init_params):
        """The state to go on from: the latest checkpoint's, or a fresh one."""
        found, notes = look(self.workdir), []
        if found.unfinished:
            notes.append(f"found {', '.join(found.unfinished)}: a save that was cut off; it is discarded")
        if self.writes:
            self.checkpoints.discard_unfinished()
        if found.step is not None:
            target = self.program.target.replace(frozen=self.program.frozen(init_params))
            state, meta = self.checkpoints.restore("latest", self.average.saved(target))
            self.best_loss, self.best_step, self.rollbacks = meta["best_loss"], meta["best_step"], meta["rollbacks"]
            self.evaluations_since_best = meta["evaluations_since_best"]
            self.last_evaluation = meta["last_evaluation"]
            if meta["best_step"] == found.step != self.checkpoints.best_step() and self.recipe.checkpoint.best:
                self.checkpoints.save("best", found.step, state, {"loss": self.best_loss})  # a kill came between the two
            notes.append(f"resuming {self.workdir} from its checkpoint of step {found.step}")
        else:
            state, meta = self.program.init(init_params), {}
            if found.unfinished:
                notes.append("no complete checkpoint: starting from step 0")
        if self.writes:
            self.workdir.mkdir(parents=True, exist_ok=True)
            config = self.recipe.as_dict() | {"data_identity": self.task.data_identity}
            write_atomic(self.workdir / "config.json", json.dumps(config, indent=2))
        return self.average.begin(state), found.step or 0, meta, notes

    def _end(self, status: str) -> None:
        """Whatever happened: each of these gets its turn, also when one before it fails (a full disk)."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            stack.callback(self._report, status)
            stack.callback(self.log.flush)
            stack.callback(self.progress.close)
            if self.tracing:
                jax.profiler.stop_trace()

    def _steps(self, state, start):
        """Every step from `start` to the last; after a rollback, from the checkpoint's step on with other batches."""
        cfg = self.recipe.train
        while not self._out_of_patience(start):
            offset = int(state.data_offset)
            pending = None  # the step whose metrics have not been read yet
            stream = batches(self.task.source, "train", start + offset, cfg.batch_size, self.rows)
            for step, (_, batch) in zip(range(start + 1, cfg.steps + 1), stream, strict=False):
                self._profile(step, state)
                state, metrics = self.program.step(state, to_devices(batch, cfg.batch_size, self.program.mesh))
                self.average.after(step, state)
                rolled_back = pending is not None and self._read(*pending)
                pending = (step, metrics)
                if rolled_back:
                    break
                self._agree_to_stop(step)
                if self._due(step):
                    rolled_back, pending = self._read(*pending), None
                    if rolled_back:
                        break
                    if self._evaluate_and_save(state, step):
                        return state
            else:
                self._profile(cfg.steps + 1, state)
                return state
            state, start = self._roll_back(state, step)
        return state

    def _agree_to_stop(self, step: int) -> None:
        """Was a signal received? Several processes must stop at the same step, so they ask each other now and then."""
        if jax.process_count() == 1:
            self.stopping = self.interrupt.received is not None
        elif step % self.recipe.train.log_every == 0:
            received = multihost_utils.process_allgather(np.int32(self.interrupt.received or 0)).max()
            if received:
                self.stopping, self.interrupt.received = True, signal.Signals(int(received))

    def _due(self, step: int) -> bool:
        """Is there something to do that the step at hand must be finished for?"""
        return self.stopping or self._evaluates(step) or self._saves(step)

    def _evaluates(self, step: int) -> bool:
        every = self.recipe.eval.every
        return step == self.recipe.train.steps or bool(every and step % every == 0)

    def _saves(self, step: int) -> bool:
        every = self.recipe.checkpoint.every
        return step % every == 0 if every and step < self.recipe.train.steps else self._evaluates(step)

    def _read(self, step: int, metrics) -> bool:
        """Waits for a step, writes its line where one is due; True if the run must go back to its last checkpoint."""
        metrics["loss"].block_until_ready()
        logs = step % self.recipe.train.log_every == 0 or self._evaluates(step)
        if not logs and not self._due(step):
            return False
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}  # numbers, or lists of them
        streak = values.pop("skipped_in_a_row")
        rate = self.progress.update(step, values)
        if logs:
            self.log.write(step, values if rate is None else values | {f"{self.task.unit}_per_second": rate})
        return streak >= self.recipe.train.guard.patience

    def _evaluate_and_save(self, state, step: int) -> bool:
        """True if the run ends here."""
        with self.progress.pause():
            improved = self._evaluates(step) and self._evaluate(state, step)
            stops = self._out_of_patience(step)
            if self._saves(step) or self.stopping or stops:
                self.log.flush()
                self.checkpoints.save("latest", step, self.average.saved(state), self._meta())
            if improved and self.recipe.checkpoint.best:
                self.checkpoints.save("best", step, self.average.saved(state), {"loss": self.best_loss})
            if time.monotonic() - self.reported > REPORT_SECONDS:
                self._report("running")
        if self.stopping:
            self.checkpoints.wait()
            self.progress.note(f"{self.interrupt.received.name}: saved step {step}; the same command resumes from here")
        return self.stopping or stops

    def _out_of_patience(self, step: int) -> bool:
        patience = self.recipe.checkpoint.stop_without_improvement
        if not patience or self.evaluations_since_best < patience:
            return False
        self.progress.note(f"no better validation loss in {patience} evaluations: stopping at step {step}")
        return True

    def _evaluate(self, state, step: int) -> bool:
        """Losses, scores and samples of the evaluated weights; True if the validation loss is the best so far."""
        params = self.average.evaluated(state)
        if self.recipe.eval.train_split:
            self.log.write(step, self.evaluator(params, "train"), split="train")
        values = self.evaluator(params, "val") | self.task.scores(params)
        loss = values["loss"]
        self.last_evaluation = {"step": step, **values}
        self.log.write(step, values, split="val")
        improved = loss < self.best_loss
        self.evaluations_since_best = 0 if improved else self.evaluations_since_best + 1
        if improved:
            self.best_loss, self.best_step = loss, step
        samples = self.task.show(params)
        if self.writes:
            write_samples(self.workdir, f"step_{step:06d}", samples.files)
        said = {name: x for name, x in values.items() if isinstance(x, float) and not name.startswith("loss_")}
        words = ", ".join(f"{name} {x:.4f}" for name, x in said.items())
        self.progress.note(f"step {step}: validation {words}{' (best so far)' if improved else ''}")
        return improved

    def _report(self, status: str) -> None:
        if self.writes:
            report.write_report(self.workdir, status, self.progress.state())
        self.reported = time.monotonic()

    def _meta(self) -> dict:
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "evaluations_since_best": self.evaluations_since_best,
            "last_evaluation": self.last_evaluation,
            "rollbacks": self.rollbacks,
            "clock": self.progress.state(),
        }

    def _roll_back(self, state, step: int):
        """Back to the last checkpoint, and past the batches that led here (as PaLM did, arXiv:2204.02311, 5.1)."""
        patience, limit = self.recipe.train.guard.patience, self.recipe.train.guard.max_rollbacks
        self.checkpoints.wait()
        found = look(self.workdir)
        if found.step is None or self.rollbacks >= limit:
            why = f"rolled back {limit} times already" if found.step is not None else "there is no checkpoint to go back to"
            raise UserError(
                f"the run diverged: {patience} steps in a row were skipped at step {step}, and {why}; "
                "lower optimizer.learning_rate or lengthen optimizer.warmup_steps"
            )
        self.rollbacks += 1
        jump = int(state.data_offset) + step - found.step
        target = self.average.saved(self.program.target.replace(frozen=state.frozen))
        state = self.average.begin(self.checkpoints.restore("latest", target)[0])
        offset = jax.device_put(state.data_offset * 0 + jump, state.data_offset.sharding)
        state = state.replace(data_offset=offset, guard=state.guard.set_back())
        self.log.truncate_after(found.step)
        self.progress.rewind(found.step)
        self.progress.note(
            f"{patience} steps in a row were skipped: back to step {found.step}, past the batches up to {step} "
            f"(rollback {self.rollbacks} of {limit})"
        )
        return state, found.step

    def _profile(self, step: int, state) -> None:
        """A trace of a few steps, for XProf or Perfetto; `step` is about to begin."""
        cfg = self.recipe.train
        end = min(cfg.profile_start + cfg.profile_steps, cfg.steps + 1)
        if self.tracing and step >= end:
            jax.block_until_ready(state.params)
            jax.profiler.stop_trace()
            self.tracing = False
            self.progress.note(f"traced steps {cfg.profile_start} to {end - 1}: {self.workdir / 'profile'}")
        elif cfg.profile_start and step == cfg.profile_start and self.writes:
            jax.block_until_ready(state.params)
            jax.profiler.start_trace(str(self.workdir / "profile"), create_perfetto_trace=True)
            self.tracing = True
