"""Both sides of a comparison measured on this machine, one after the other, each in a process of its own.

On a GPU, peak memory and time. This process must not hold any of the card, so here JAX computes on the CPU (launch.py sees
to that). On a machine without one, time alone: there no allocator counts.
"""

import dataclasses
import os
import pathlib
import platform
import sys

from jaxvram.compare import child, pytorch_side, sides
from jaxvram.errors import UserError
from jaxvram.models import name_of
from jaxvram.vram import cards, nvidia_smi
from jaxvram.vram.compile import gpu_visible

WARM_UP, STEPS = 3, 10
OUR_SIDE = (sys.executable, "-m", "jaxvram.compare.measured_side")
ROOT = pathlib.Path(__file__).parents[2]
TIMES = ("seconds_per_step", "refused")  # of PyTorch's answer on a CPU: the rest is no measurement there


def on_gpu() -> bool:
    """Whether there is a GPU to measure on, and the environment does not keep JAX or CUDA from it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return gpu_visible() and visible_gpu() not in ("", "-1") and (not platforms or "cuda" in platforms or "gpu" in platforms)


def compare(recipe, task, python: str | None = None, progress=lambda line: None) -> dict:
    """compare_measured.json of a recipe: time of both sides for one train step, and on a GPU their peaks.

    Args:
      task: of known shapes; needs no data.
      python: an interpreter with PyTorch; None: this one.
    Returns:
      as `sides.compare`, with way measured, driver, steps (warm_up, timed), unit (tokens | images), and for each side
      seconds_per_step and per_second. On a GPU also what measured_side.py says of ours, capacity_bytes, memory_fraction and
      planned_bytes of ours for this card (or planned_refused: why there is no plan); on a CPU no bytes at all.
    Raises:
      UserError: a side cannot measure here, or ours does not fit.
    """
    recipe = dataclasses.replace(recipe, model=task.model.cfg)  # the vocabulary: looked up once
    gpu = on_gpu()
    protocol = {"way": "measured", "device": "cuda" if gpu else "cpu", "warm_up": WARM_UP, "timed": STEPS}
    request = pytorch_side.request_of(recipe, recipe.model) | protocol
    # The first card alone, by the number that nvidia-smi gives it too.
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible_gpu()} if gpu else {}
    ask_torch = lambda variants: pytorch_side.ask(request | {"variants": variants}, python, progress, **environment)
    ask_torch(())  # what is wrong there is told in seconds, not after minutes of ours
    seen = nvidia_smi.look(visible_gpu()) if gpu else None
    ours = {
        name: ask_ours(of, protocol, environment, seen, lambda line, name=name: progress(f"{name}: {line}"))
        for name, of in sides.ours(recipe).items()
    }
    answer = ask_torch(pytorch_side.variants_of(recipe.model, "measured"))
    record = sides.about(recipe, task, answer) | {
        "way": "measured",
        "driver": seen.driver if seen else None,
        "steps": {"warm_up": WARM_UP, "timed": STEPS},
        "unit": task.unit,
    }
    found = [side.pop("card", None) for side in ours.values()]
    record |= _card(recipe, task, found[0], progress)
    record["sides"] = ours | answer["variants"]
    if not gpu:
        kept = lambda side: {name: side[name] for name in TIMES if name in side}
        record["sides"] = {name: kept(side) for name, side in record["sides"].items()}
    units = recipe.train.batch_size * task.units_per_example
    for side in record["sides"].values():
        if "seconds_per_step" in side:
            side["per_second"] = units / side["seconds_per_step"]
    return record


def visible_gpu() -> str:
    """The card that CUDA shows first: its number, or its UUID."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def ask_ours(recipe, protocol: dict, environment: dict, seen, progress) -> dict:
    """Our side's answer; `seen` is what nvidia-smi said before anything ran."""
    request = protocol | {"kind": name_of(recipe.model), "recipe": recipe.as_dict(), "gpu": visible_gpu()}
    request["used_bytes"] = seen.used_bytes if seen else None
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    environment = os.environ | environment | {"PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.pop("XLA_PYTHON_CLIENT_ALLOCATOR", None)  # of JAX's allocators only the default one counts
    if protocol["device"] == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    try:
        return child.ask([*OUR_SIDE], request, environment, progress)
    except child.ChildError as error:
        raise UserError(f"jaxvram's side: {error}") from error


def _card(recipe, task, fields: dict | None, progress) -> dict:
    """What was measured on, and what our plan said for it; `fields` are a Card's, None: a CPU."""
    if fields is None:
        return {"card": "cpu", "gpu": f"the CPU of this machine ({os.cpu_count()} cores, {platform.machine()})"}
    card = cards.Card(**fields | {"compute_capability": tuple(fields["compute_capability"])})
    found = {
        "card": card.name,
        "gpu": card.description,
        "usable_bytes": card.usable_bytes,
        "capacity_bytes": card.capacity_bytes,
        "memory_fraction": card.memory_fraction,
    }
    try:
        return found | {"planned_bytes": sides.plan_ours(recipe, task, card, progress)["peak_bytes"]}
    except UserError as error:  # such as: no compiler for cards that JAX does not hold
        return found | {"planned_refused": str(error)}
