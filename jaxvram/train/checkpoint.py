"""checkpoints/latest (all that a run is) and checkpoints/best (its weights at the lowest validation loss), by Orbax.

Orbax writes into a temporary folder and renames it when it is complete, so a kill at any moment leaves the checkpoint
before it whole. The old one is deleted only after that. Saving goes on beside the next steps.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxvram.errors import UserError

KINDS = ("latest", "best")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # steps between checkpoints; 0: at every evaluation
    best: bool = True  # keep the weights of the lowest validation loss as well
    stop_without_improvement: int = 0  # evaluations without a new best before the run ends; 0: never


@dataclasses.dataclass(frozen=True)
class Found:
    """What a workdir holds: the step of its latest complete checkpoint, and what was begun and not finished."""

    step: int | None
    unfinished: list[str]


def look(workdir: pathlib.Path) -> Found:
    """Reads folder names only; nothing is opened, repaired or deleted."""
    folder = workdir / "checkpoints" / "latest"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    steps = [int(name) for name in names if name.isdigit()]
    return Found(max(steps, default=None), sorted(name for name in names if re.match(r"\d+\.", name)))


class Checkpoints:
    """Saves and restores a TrainState and a small dict beside it."""

    def __init__(self, workdir: pathlib.Path):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._managers = {}

    def save(self, kind: str, step: int, state, meta: dict[str, Any]) -> None:
        """Begins to save; weights alone for 'best'. Returns when the state may be changed.

        Raises:
          UserError: the disk is full or not writable.
        """
        weights, rest = split(state)
        items = {"weights": ocp.args.StandardSave(weights), "meta": ocp.args.JsonSave(meta)}
        if kind == "latest":
            items["rest"] = ocp.args.StandardSave(rest)
        with self._explain("save", step, kind):
            self._manager(kind).save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, kind: str, target):
        """(state, meta) of the latest or best checkpoint. `target`: a TrainState of shapes with shardings.

        Raises:
          UserError: there is none, it does not fit the target, or it is damaged.
        """
        step = self._step(kind)
        weights, rest = split(target)
        args = {"weights": ocp.args.StandardRestore(weights), "rest": ocp.args.StandardRestore(rest)}
        with self._explain("restore", step, kind):
            items = self._manager(kind).restore(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonRestore()))
        return target.replace(**items["weights"], **items["rest"]), items["meta"]

    def restore_weights(self, kind: str, target):
        """({'params', 'ema'}, meta) alone: all that evaluation and sampling need."""
        step = self._step(kind)
        args = ocp.args.Composite(weights=ocp.args.StandardRestore(split(target)[0]), meta=ocp.args.JsonRestore())
        with self._explain("restore", step, kind):
            items = self._manager(kind).restore(step, args=args)
        return items["weights"], items["meta"]

    def best_loss(self) -> float:
        """Validation loss of checkpoints/best, infinite without one."""
        step = self._manager("best").latest_step() if (self.folder / "best").is_dir() else None
        if step is None:
            return float("inf")
        with self._explain("restore", step, "best"):
            meta = self._manager("best").restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return meta["loss"]

    def wait(self) -> None:
        """Until everything begun is on disk."""
        for kind, manager in self._managers.items():
            with self._explain("save", manager.latest_step(), kind):
                manager.wait_until_finished()

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
        self._managers = {}

    def _step(self, kind: str) -> int:
        step = self._manager(kind).latest_step() if (self.folder / kind).is_dir() else None
        if step is None:
            raise UserError(f"there is no checkpoint in {self.folder / kind}; train first, or set --workdir")
        return step

    def _manager(self, kind: str) -> ocp.CheckpointManager:
        if kind not in self._managers:
            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
            with self._explain("open", None, kind):
                self._managers[kind] = ocp.CheckpointManager(self.folder / kind, options=options)
        return self._managers[kind]

    @contextlib.contextmanager
    def _explain(self, what: str, step: int | None, kind: str):
        path = self.folder / kind / str(step)
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise a dozen types, and chain the one that tells
            reason = " ".join(str(error).split())[:300]
            if what == "save" or isinstance(error, OSError) and error.errno in (28, 13, 30):
                raise UserError(f"could not write {path}: {reason}; free some space and run the same command") from error
            if "hape" in reason or "tree" in reason.lower() and "match" in reason.lower():
                raise UserError(f"checkpoint {path} is of another model than this recipe's: {reason}") from error
            others = "delete that folder to start anew, or give another --workdir"
            raise UserError(f"checkpoint {path} is damaged ({type(error).__name__}: {reason}); {others}") from error


def split(state) -> tuple[dict, dict]:
    """(what evaluation and sampling need, the rest) of a TrainState."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    fields = {name: value for name, value in fields.items() if jax.tree.leaves(value)}
    weights = {name: fields.pop(name) for name in ("params", "ema") if name in fields}
    return weights, fields


def check_workdir(workdir: pathlib.Path, recipe) -> None:
    """A run folder belongs to the recipe that made it.

    Raises:
      UserError: config.json there is of another recipe or variant, or of a model with other shapes.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        made_by = json.loads(path.read_text())
        before = (made_by["name"], made_by["variant"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete {workdir} or give another --workdir") from error
    if before != (recipe.name, recipe.variant):
        raise UserError(
            f"{workdir} was made by {before[0]}:{before[1]}, not by {recipe.name}:{recipe.variant}; give another --workdir"
        )
    now = json.loads(json.dumps(recipe.as_dict()))["model"]
    free = ("remat", "unroll_layers", "dropout", "dtype", "block_size")  # may change between two starts
    for name, value in made_by["model"].items():
        if name not in free and now.get(name) != value:
            raise UserError(f"{workdir} was made with model.{name}={value}, not {now.get(name)}; give another --workdir")
