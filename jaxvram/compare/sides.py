"""Our side of a comparison, and both as one record: same owners, same units."""

import dataclasses
import importlib.metadata

from jaxvram.compare import pytorch_side
from jaxvram.vram import plan as planner
from jaxvram.vram.cards import Card

OURS = "jaxvram"
OWNERS = (  # of both sides, in the order of the picture
    "parameters", "frozen parameters", "weight average", "optimizer state", "gradients", "saved activations",
    "logits and loss", "workspace", "batch",
)  # fmt: skip
MERGED = {"parameter copies": "workspace", "cache": "workspace", "other": "workspace", "gaps": "workspace"}


def plan_ours(recipe, task, card: Card, progress=lambda line: None) -> dict:
    """peak_bytes, owners and the largest buffers of the train step on `card`, as its plan has them."""
    train = {"train": planner.programs(recipe, task)["train"]}
    part = planner.make_plan(train, card, progress)["train"]
    owners = dict.fromkeys(OWNERS, 0)
    for owner, count in part["owners"].items():
        owners[MERGED.get(owner, owner)] += count
    return {"peak_bytes": part["peak_bytes"], "owners": owners, "largest": part["largest"]}


def compare(recipe, task, card: Card, python: str | None = None, progress=lambda line: None) -> dict:
    """compare.json of a recipe: planned peaks of both sides for one train step on `card`.

    Args:
      task: of known shapes; needs no data.
      python: an interpreter with PyTorch; None: this one.
    Returns:
      recipe, variant, card, gpu, way, usable_bytes, versions, parameters (of the twin), step (the recipe's train section,
      tokens of a sequence), sides: name -> peak_bytes and owners, or refused; `jaxvram` is the first.
    """
    answer = pytorch_side.ask(pytorch_side.request_of(recipe, task.model.cfg), python, progress)
    return about(recipe, task, answer) | {
        "card": card.name,
        "gpu": card.description,
        "way": "planned",
        "usable_bytes": card.usable_bytes,
        "sides": {OURS: plan_ours(recipe, task, card, progress)} | answer["variants"],
    }


def about(recipe, task, answer: dict) -> dict:
    """What a record says whatever its way: the recipe, its step, and the twin's versions and parameters."""
    return {
        "recipe": recipe.name,
        "variant": recipe.variant,
        "versions": {"jax": importlib.metadata.version("jax")} | answer["versions"],
        "parameters": answer["parameters"],
        "step": dataclasses.asdict(recipe.train) | {"tokens": getattr(task.model.cfg, "block_size", None)},
    }


def label(side: str) -> str:
    """A side's name for a reader."""
    return side if side == OURS else f"PyTorch {side}"


def at_once(record: dict) -> str:
    """What a microbatch holds."""
    step = record["step"]
    rows = step["microbatch_size"] or step["batch_size"]
    return f"{rows} x {step['tokens']}" if step["tokens"] else f"{rows} images"


def best_of_torch(record: dict) -> str | None:
    """The leanest PyTorch variant; None: there is none."""
    return _least(record, "peak_bytes")


def fastest_of_torch(record: dict) -> str | None:
    """Likewise, of what was measured."""
    return _least(record, "seconds_per_step")


def _least(record: dict, figure: str) -> str | None:
    figures = {name: side[figure] for name, side in record["sides"].items() if name != OURS and figure in side}
    return min(figures, key=figures.get) if figures else None
