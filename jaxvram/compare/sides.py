"""Our side of a comparison, and both as one record: same owners, same units."""

import dataclasses
import importlib.metadata

from jaxvram.compare import pytorch_side
from jaxvram.vram import plan as planner
from jaxvram.vram.bill import make_bill
from jaxvram.vram.cards import Card
from jaxvram.vram.compile import compile_for

OURS = "jaxvram"
OWNERS = (  # of both sides, in the order of the picture
    "parameters", "frozen parameters", "weight average", "optimizer state", "gradients", "saved activations",
    "logits and loss", "workspace", "batch",
)  # fmt: skip
MERGED = {"parameter copies": "workspace", "cache": "workspace", "other": "workspace", "gaps": "workspace"}
LARGEST = 3  # buffers that are named


def plan_ours(recipe, task, card: Card) -> dict:
    """peak_bytes and owners of the train step on `card`, by XLA's buffers, and its largest own buffers."""
    train = planner.programs(recipe, task)["train"]
    compiled = compile_for(card, train.fn, train.args, train.donate_argnums)
    bill = make_bill(compiled)
    owners = dict.fromkeys(OWNERS, 0)
    for owner, count in bill.owners.items():
        owners[MERGED.get(owner, owner)] += count
    made = [buffer for buffer in bill.largest(64) if buffer["source"] != "argument"][:LARGEST]
    return {"peak_bytes": compiled.peak_bytes, "owners": owners, "largest": made}


def compare(recipe, task, card: Card, python: str | None = None, progress=lambda line: None) -> dict:
    """compare.json of a recipe: planned peaks of both sides for one train step on `card`.

    Args:
      task: of known shapes; needs no data.
      python: an interpreter with PyTorch; None: this one.
    Returns:
      recipe, variant, card, way, capacity_bytes, usable_bytes, versions, parameters (of the twin), sides: name ->
      peak_bytes and owners, or refused; `jaxvram` is the first.
    """
    answer = pytorch_side.ask(pytorch_side.request_of(recipe, task.model.cfg), python, progress)
    progress(f"JAX: compiling the train step for {card.description}")
    return {
        "recipe": recipe.name,
        "variant": recipe.variant,
        "card": card.name,
        "gpu": card.description,
        "way": "planned",
        "usable_bytes": card.usable_bytes,
        "versions": {"jax": importlib.metadata.version("jax")} | answer["versions"],
        "parameters": answer["parameters"],
        "step": dataclasses.asdict(recipe.train) | {"tokens": getattr(task.model.cfg, "block_size", None)},
        "sides": {OURS: plan_ours(recipe, task, card)} | answer["variants"],
    }


def best_of_torch(record: dict) -> str | None:
    """The leanest PyTorch variant; None: there is none."""
    peaks = {name: side["peak_bytes"] for name, side in record["sides"].items() if name != OURS and "peak_bytes" in side}
    return min(peaks, key=peaks.get) if peaks else None
