"""The largest batch, or the longest context, of which a train step fits a card: ours, and each PyTorch variant's."""

import dataclasses
from collections.abc import Callable

from jaxvram.compare import pytorch_side, sides
from jaxvram.errors import UserError
from jaxvram.vram.cards import Card, size

UNITS = {"batch": 1, "context": 128}  # a context is looked for in such steps
MOST = {"batch": 4096, "context": 1 << 20}  # no answer beyond is of use


def search(
    recipe, make_task: Callable, what: str, card: Card, python: str | None = None, progress=lambda line: None
) -> dict:
    """Like `sides.compare`, with for each side `points` [(n, peak_bytes)] and `largest` n (0: not even the least fits).

    Args:
      make_task: recipe -> its task without data.
      what: batch, sequences or images at once (no microbatches) | context, tokens of a sequence, of a microbatch at once.
    Raises:
      UserError: the model has no context to look for.
    """
    if what == "context" and not hasattr(make_task(recipe).model.cfg, "block_size"):
        raise UserError(f"--search=context: a {recipe.name} has no context; there is --search=batch")
    sized = lambda n: _sized(recipe, what, n)

    found = {}
    for name in sides.ours(recipe):

        def ours(n, name=name):
            progress(f"{name}: {what} {n}")
            changed = sides.ours(sized(n))[name]
            return sides.plan_ours(changed, make_task(changed), card)["peak_bytes"]

        found[name] = _side(ours, what, card)
    for name in pytorch_side.variants_of(make_task(recipe).model.cfg):

        def theirs(n, name=name):
            changed = sized(n)
            request = pytorch_side.request_of(changed, make_task(changed).model.cfg) | {"variants": [name]}
            progress(f"PyTorch {name}: {what} {n}")
            side = pytorch_side.ask(request, python)["variants"][name]
            if "refused" in side:
                raise _Refused(side["refused"])
            return side["peak_bytes"]

        try:
            found[name] = _side(theirs, what, card)
        except _Refused as refusal:
            found[name] = {"refused": str(refusal)}
    about = {"recipe": recipe.name, "variant": recipe.variant, "card": card.name, "gpu": card.description}
    return about | {"search": what, "usable_bytes": card.usable_bytes, "sides": found}


def find_largest(peak_of: Callable[[int], int], usable_bytes: int, unit: int, most: int) -> tuple[int, dict[int, int]]:
    """(largest n that fits in multiples of `unit`, {n: peak_bytes} of all that was looked at).

    Memory grows with n in nearly a straight line: two points say where to look, the neighbours of the edge decide.
    """
    points = {}

    def fits(n):
        if n not in points:
            points[n] = peak_of(n * unit)
        return points[n] <= usable_bytes

    low, high = 0, 1
    while fits(high):
        low, high = high, min(2 * high, most // unit)
        if low == high:
            break
    while high - low > 1:
        middle = (low + high) // 2
        if low:
            slope = max(1, (points[high] - points[low]) / (high - low))
            guess = low + int((usable_bytes - points[low]) / slope)
            middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit, {n * unit: peak for n, peak in sorted(points.items())}


def text(record: dict) -> str:
    """What `search` found, for a terminal."""
    lines = [
        f"{record['recipe']}:{record['variant']}: the largest {record['search']} whose train step fits {record['gpu']} "
        f"({size(record['usable_bytes'])} to use), planned",
        "",
        f"{'':30}{record['search']:>10}{'its peak':>14}",
    ]
    for name, side in record["sides"].items():
        if "refused" in side:
            lines.append(f"{sides.label(name):30}{'-':>10}{'':14}  {side['refused']}")
            continue
        peak = dict(side["points"]).get(side["largest"])
        lines.append(f"{sides.label(name):30}{side['largest']:>10,}{size(peak) if peak else 'nothing fits':>14}")
    return "\n".join(lines)


class _Refused(Exception):
    """A variant that PyTorch's side does not have."""


def _side(peak_of, what: str, card: Card) -> dict:
    largest, points = find_largest(peak_of, card.usable_bytes, UNITS[what], MOST[what])
    return {"largest": largest, "points": list(points.items())}


def _sized(recipe, what: str, n: int):
    if what == "batch":
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch_size=n, microbatch_size=0))
    rows = recipe.train.microbatch_size or recipe.train.batch_size
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, batch_size=rows, microbatch_size=0),
        model=dataclasses.replace(recipe.model, block_size=n),
    )
