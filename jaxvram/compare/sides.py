"""Our side of a comparison, and both as one record: same owners, same units."""

import dataclasses
import importlib.metadata

import jax
from flax import traverse_util

from jaxvram.compare import pytorch_side
from jaxvram.kernels.nf4 import NF4
from jaxvram.vram import plan as planner
from jaxvram.vram.cards import Card

OURS, OURS_8BIT = "jaxvram", "jaxvram+8bit"
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
      recipe, variant, card, gpu, way, usable_bytes, versions, parameters (the twin's all, trained, difference and extra;
      ours: all, trained), step (the recipe's train section, tokens of a sequence), sides: name -> peak_bytes, owners and,
      of ours, the largest buffers; or refused. `jaxvram` is the first, and `jaxvram+8bit` next where PyTorch's has 8 bits.
    """
    answer = pytorch_side.ask(pytorch_side.request_of(recipe, task.model.cfg), python, progress)
    return about(recipe, task, answer) | {
        "card": card.name,
        "gpu": card.description,
        "way": "planned",
        "usable_bytes": card.usable_bytes,
        "sides": {name: plan_ours(of, task, card, progress) for name, of in ours(recipe).items()} | answer["variants"],
    }


def about(recipe, task, answer: dict) -> dict:
    """What a record says whatever its way: the recipe, its step, and the twin's versions and parameters."""
    return {
        "recipe": recipe.name,
        "variant": recipe.variant,
        "versions": {"jax": importlib.metadata.version("jax")} | answer["versions"],
        "parameters": answer["parameters"] and answer["parameters"] | {"ours": parameters(recipe, task)},
        "step": dataclasses.asdict(recipe.train) | {"tokens": getattr(task.model.cfg, "block_size", None)},
    }


def ours(recipe) -> dict:
    """Our sides' names, and the recipe of each: as it is and, where that is in fp32, with AdamW's moments in 8 bits."""
    if recipe.optimizer.name != "adamw":
        return {OURS: recipe}
    in_8bit = dataclasses.replace(recipe.optimizer, name="adamw_8bit")
    return {OURS: recipe, OURS_8BIT: dataclasses.replace(recipe, optimizer=in_8bit)}


def parameters(recipe, task) -> dict:
    """How many ours has, all and trained; a weight in NF4 is one, a switch of an adapter's layer none."""
    state, _ = planner.programs(recipe, task)["train"].args
    count = lambda leaf: 2 * leaf.codes.size if isinstance(leaf, NF4) else leaf.size
    frozen = traverse_util.flatten_dict(state.frozen or {})
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {"all": trained + sum(count(x) for path, x in frozen.items() if path[-1] != "adapter_active"), "trained": trained}


def unexplained(record: dict) -> int:
    """Parameters of PyTorch's model that ours has not, and nobody says why: 0."""
    p = record["parameters"]
    return max((p[which] - p["extra"] - p["ours"][which] for which in ("all", "trained")), key=abs)


def like(record: dict, side: str) -> dict:
    """Our side whose optimizer is that of PyTorch's `side`."""
    sides = record["sides"]
    return sides[OURS_8BIT] if side.endswith("8bit") and OURS_8BIT in sides else sides[OURS]


def label(side: str) -> str:
    """A side's name for a reader."""
    return side if is_ours(side) else f"PyTorch {side}"


def is_ours(side: str) -> bool:
    return side in (OURS, OURS_8BIT)


def at_once(record: dict) -> str:
    """What a microbatch holds."""
    step = record["step"]
    rows = step["microbatch_size"] or step["batch_size"]
    return f"{rows} x {step['tokens']}" if step["tokens"] else f"{rows} images"


def best_of_torch(record: dict, eight_bit: bool | None = None) -> str | None:
    """The leanest PyTorch variant; None: there is none.

    Args:
      eight_bit: only of those whose optimizer's state is in 8 bits, or is not; None: of all.
    """
    return _least(record, "peak_bytes", lambda name: eight_bit in (None, name.endswith("8bit")))


def fastest_of_torch(record: dict) -> str | None:
    """Likewise, of what was measured."""
    return _least(record, "seconds_per_step")


def _least(record: dict, figure: str, is_wanted=lambda name: True) -> str | None:
    wanted = lambda name: not is_ours(name) and is_wanted(name)
    figures = {name: side[figure] for name, side in record["sides"].items() if wanted(name) and figure in side}
    return min(figures, key=figures.get) if figures else None
