"""A comparison for a terminal: the peaks, then the bill of both sides, owner by owner."""

from jaxvram.compare.sides import OWNERS, at_once, best_of_torch, is_ours, label, like, unexplained
from jaxvram.vram.cards import GIB, size


def text(record: dict) -> str:
    """What `sides.compare` found. Beside a PyTorch with 8-bit AdamW stands ours with 8-bit AdamW."""
    sides, parameters, best = record["sides"], record["parameters"], best_of_torch(record)
    lines = [
        f"{record['recipe']}:{record['variant']}, {at_once(record)} at a time, one train step, {record['way']} for "
        f"{record['gpu']} ({size(record['usable_bytes'])} to use)",
        "",
        f"{'':30}{'peak':>12}{'jaxvram is':>13}",
    ]
    for name, side in sides.items():
        if "refused" in side:
            lines.append(f"{label(name):30}{'-':>12}{'':13}  {side['refused']}")
            continue
        ratio = "" if is_ours(name) else f"{like(record, name)['peak_bytes'] / side['peak_bytes']:.2f} of it"
        fits = "" if side["peak_bytes"] <= record["usable_bytes"] else "  does not fit"
        lines.append(f"{label(name):30}{size(side['peak_bytes']):>12}{ratio:>13}{fits}")
    if best is not None:
        lines += ["", *_bills(like(record, best), sides[best], best)]
    if parameters:
        lines += ["", f"{parameters['ours']['all']:,} parameters in ours, {parameters['all']:,} in PyTorch's"]
        if parameters["difference"]:
            lines[-1] += f": {parameters['difference']}"
        if unexplained(record):
            lines.append(f"warning: nobody knows why PyTorch's has {unexplained(record):+,} of them")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join([*lines, "", versions])


def _bills(ours: dict, theirs: dict, best: str) -> list[str]:
    lines = [f"{'GiB at the peak':30}{'jaxvram':>12}{'PyTorch':>13}  ({best}, its leanest; ours with the same optimizer)"]
    for owner in OWNERS:
        a, b = ours["owners"].get(owner, 0), theirs["owners"].get(owner, 0)
        if max(a, b) >= 0.005 * max(ours["peak_bytes"], theirs["peak_bytes"]):
            lines.append(f"{owner:30}{a / GIB:12.2f}{b / GIB:13.2f}")
    return lines
