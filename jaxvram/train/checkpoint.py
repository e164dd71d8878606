"""checkpoints/latest (all that a run is) and checkpoints/best (its weights at the lowest validation loss), by Orbax.

Orbax writes into a temporary folder and renames it when it is complete, so a kill at any moment leaves the checkpoint
before it whole. The old one is deleted only after that. Saving goes on beside the next steps.
"""

import dataclasses
import errno
import gc
import json
import logging
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxvram.errors import UserError
from jaxvram.quiet import quiet
from jaxvram.train.optimizer import path_name

KINDS = ("latest", "best")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # steps between checkpoints; 0: at every evaluation
    best: bool = True  # keep the weights of the lowest validation loss as well
    stop_without_improvement: int = 0  # evaluations without a new best before the run ends; 0: never

    def __post_init__(self):
        if min(self.every, self.stop_without_improvement) < 0:
            raise UserError("checkpoint: every and stop_without_improvement must not be negative")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a workdir holds: the step of its latest complete checkpoint, and what was begun and not finished."""

    step: int | None
    unfinished: list[str]


def look(workdir: pathlib.Path, kind: str = "latest") -> Found:
    """Reads folder names only; nothing is opened, repaired or deleted."""
    folder = workdir / "checkpoints" / kind
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    steps = [int(name) for name in names if name.isdigit()]
    return Found(max(steps, default=None), sorted(name for name in names if re.match(r"\d+\.", name)))


class Checkpoints:
    """Saves and restores a TrainState and a small dict beside it."""

    def __init__(self, workdir: pathlib.Path):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._managers = {}
        _hush_orphans()

    def save(self, kind: str, step: int, state, meta: dict[str, Any]) -> None:
        """Begins to save; weights alone for 'best'. Returns when the state may be changed.

        Raises:
          UserError: the disk is full or not writable.
        """
        weights, rest = split(state)
        parts = {"weights": weights} if kind == "best" else {"weights": weights, "rest": rest}
        items = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
        kept = {"inventory": _inventory(parts), "frozen": _inventory({"frozen": state.frozen}) if state.frozen else {}}
        items["meta"] = ocp.args.JsonSave(meta | {"step": step} | kept)
        if kind == "latest":
            self.wait()  # so that whoever finds it also finds what was best before it
        manager = self._manager(kind)
        # A run that was set back reaches the step of a best checkpoint again, with other weights perhaps: a number of its
        # own keeps the old one until the new one is complete.
        number = max(step, (manager.latest_step() or 0) + 1) if kind == "best" else step
        self._try("save", number, kind, lambda: manager.save(number, args=ocp.args.Composite(**items), force=True))

    def restore(self, kind: str, target):
        """(state, meta) of the latest or best checkpoint.

        Args:
          target: a TrainState of shapes with shardings, but for its frozen parameters: those are there already.
        Raises:
          UserError: there is none, it does not fit the target, it is damaged, or was trained on other frozen parameters.
        """
        weights, rest = split(target)
        items, meta = self._restore(kind, {"weights": weights, "rest": rest})
        self._check_frozen(kind, meta, target)
        return target.replace(**items["weights"], **items["rest"]), meta

    def restore_weights(self, kind: str, target):
        """({'params', 'ema'}, meta) alone: all that evaluation and sampling need."""
        items, meta = self._restore(kind, {"weights": split(target)[0]})
        self._check_frozen(kind, meta, target)
        return {name: items["weights"][name] for name in split(target)[0]}, meta

    def _check_frozen(self, kind: str, meta, target) -> None:
        then, now = meta.get("frozen", {}), _inventory({"frozen": target.frozen}) if target.frozen else {}
        if other := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
            raise UserError(
                f"{self.folder / kind} was trained on other base weights than these ({len(other)} arrays differ, among them "
                f"{other[0]}); set train.init_from and finetune, or train.seed, as they were, or give another --workdir"
            )

    def _restore(self, kind: str, targets: dict[str, Any]):
        step = self._step(kind)
        path, manager = self.folder / kind / str(step), self._manager(kind)
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}

        def read():
            meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            _check_fits(path, meta["inventory"], targets)
            if "rest" not in targets and any(name.startswith("ema/") for name in meta["inventory"]):
                args["weights"] = ocp.args.StandardRestore(_with_average(targets["weights"]))  # Orbax wants all of it
            items = manager.restore(step, args=ocp.args.Composite(**args))
            found = _inventory({name: items[name] for name in targets})
            if any(meta["inventory"][name] != entry for name, entry in found.items()):
                raise ValueError("its arrays are not those that were saved")
            return items, meta

        return self._try("restore", step, kind, read)

    def best_step(self) -> int | None:
        """Step of the weights in checkpoints/best."""
        number = look(self.folder.parent, "best").step
        if number is None:
            return None
        meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._try("restore", number, "best", lambda: self._manager("best").restore(number, args=meta))["meta"]["step"]

    def discard_unfinished(self) -> None:
        """Deletes what a save that was cut off has left; for the process that will save, before it does."""
        for kind in KINDS:
            for name in look(self.folder.parent, kind).unfinished:
                shutil.rmtree(self.folder / kind / name, ignore_errors=True)

    def wait(self) -> None:
        """Until everything begun is on disk."""
        for kind, manager in self._managers.items():
            self._try("save", manager.latest_step(), kind, manager.wait_until_finished)

    def close(self) -> None:
        managers, self._managers = self._managers, {}
        for kind, manager in managers.items():
            self._try("save", manager.latest_step(), kind, manager.close)

    def _step(self, kind: str) -> int:
        if (step := look(self.folder.parent, kind).step) is None:
            raise UserError(f"there is no checkpoint in {self.folder / kind}; train first, or set --workdir")
        return step

    def _manager(self, kind: str) -> ocp.CheckpointManager:
        if kind not in self._managers:
            # With several processes Orbax' background threads meet at barriers of their own, and can miss each other.
            alone = jax.process_count() == 1
            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True, enable_async_checkpointing=alone)
            open_it = lambda: ocp.CheckpointManager(self.folder / kind, options=options)
            self._managers[kind] = self._try("open", None, kind, open_it)
        return self._managers[kind]

    def _try(self, what: str, step: int | None, kind: str, action: Callable[[], Any]):
        """action(); a failure of Orbax or TensorStore, which raise a dozen types, as one line."""
        path = self.folder / kind / str(step or "")
        try:
            with quiet():
                return action()
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            unwritable = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS)
        with warnings.catch_warnings():  # what Orbax had begun beside the read that failed: it never waits for it
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
        if what == "save" or unwritable:
            raise UserError(f"could not write {path} ({reason}); free some space and run the same command")
        others = "delete that folder to start anew, or give another --workdir"
        raise UserError(f"checkpoint {path} is damaged ({reason}); {others}")


def _hush_orphans() -> None:
    """The first array that fails is told. Orbax leaves the others to themselves; Python has a page to say on each."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook
    if getattr(report, "__module__", "") == __name__:
        return

    def hook(unraisable):
        words = f"{unraisable.object!r} {unraisable.exc_value!r}"
        if not any(known in words for known in ("_read_array_index", "Event loop is closed", "was never awaited")):
            report(unraisable)

    sys.unraisablehook = hook


@jax.jit
def _checksums(leaves: list) -> jax.Array:
    """The sum of the bits of each, as integers: exact in any order, so the same on every mesh."""
    words = lambda x: jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.stack([words(x).astype(jnp.uint32).sum() for x in leaves])


def _checksum(x: np.ndarray) -> int:
    """The same of an array of the host, which must not go through the device."""
    return int(np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}").sum(dtype=np.uint32))


def _inventory(parts: dict[str, Any]) -> dict[str, list]:
    """{path: [shape, dtype, checksum]} of every array."""
    entries = {}
    for part in parts.values():
        leaves = jax.tree_util.tree_leaves_with_path(part)
        of_devices = iter(np.asarray(_checksums([x for _, x in leaves if not isinstance(x, np.ndarray)])).tolist())
        sums = [_checksum(x) if isinstance(x, np.ndarray) else next(of_devices) for _, x in leaves]
        entries |= {path_name(p): [*_kind(x), n] for (p, x), n in zip(leaves, sums, strict=True)}
    return entries


def _kind(x) -> list:
    return [list(x.shape), str(x.dtype)]


def _check_fits(path: pathlib.Path, inventory: dict[str, list], targets: dict[str, Any]) -> None:
    """Before anything is read: does a checkpoint have the arrays that are asked for? Orbax would say so at great length."""
    there = {name: entry[:2] for name, entry in inventory.items()}
    here = {path_name(p): _kind(x) for part in targets.values() for p, x in jax.tree_util.tree_leaves_with_path(part)}
    words = lambda kind: "missing" if kind is None else f"{tuple(kind[0])} {kind[1]}"
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name) and (name in here or "rest" in targets):
            raise UserError(
                f"checkpoint {path} does not fit this recipe: {name} is {words(there.get(name))} there and "
                f"{words(here.get(name))} here; set model and optimizer as they were, or give another --workdir"
            )


def _with_average(weights: dict[str, Any]) -> dict[str, Any]:
    in_fp32 = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
    return weights | {"ema": jax.tree.map(in_fp32, weights["params"])}


def split(state) -> tuple[dict, dict]:
    """(what evaluation and sampling need, the rest) of what a TrainState saves."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    fields = {name: value for name, value in fields.items() if name != "frozen" and jax.tree.leaves(value)}
    weights = {name: fields.pop(name) for name in ("params", "ema") if name in fields}
    return weights, fields


def made_by(workdir: pathlib.Path) -> dict | None:
    """config.json of a run folder: the recipe, and `data_identity` of the data it was trained on; None without one.

    Raises:
      UserError: it cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        recipe = json.loads(path.read_text())
        recipe["name"], recipe["variant"], recipe["model"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; delete {workdir} or give another --workdir") from error
    return recipe


def check_workdir(workdir: pathlib.Path, recipe, data_identity: dict | None = None) -> None:
    """A run folder belongs to the recipe that made it, and to data with the same vocabulary.

    Raises:
      UserError: config.json there is of another recipe or variant, of a model with other shapes, fine-tuned otherwise,
        or of other data.
    """
    if (before := made_by(workdir)) is None:
        return
    trained_on = before.get("data_identity")
    if data_identity and trained_on and trained_on != data_identity:
        raise UserError(
            f"{workdir} was trained with another vocabulary ({trained_on['vocabulary']}) than this data has "
            f"({data_identity['vocabulary']}); set data.path or data.dataset as they were, or give another --workdir"
        )
    if (before["name"], before["variant"]) != (recipe.name, recipe.variant):
        raise UserError(
            f"{workdir} was made by {before['name']}:{before['variant']}, not by {recipe.name}:{recipe.variant}; "
            "give another --workdir"
        )
    now = json.loads(json.dumps(recipe.as_dict()))
    free = {  # may change between two starts
        "model": ("remat", "unroll_layers", "dropout", "dtype", "block_size", "kernels"),
        "finetune": ("dropout", "adapter_from"),
    }
    for section, names in free.items():
        for name, value in before.get(section, {}).items():
            if name not in names and (here := now[section].get(name)) != value:
                raise UserError(f"{workdir} was made with {section}.{name}={value}, not {here}; give another --workdir")
