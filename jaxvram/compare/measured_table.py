"""A measured comparison for a terminal: peaks and speeds, and beside them what our plan had said."""

from jaxvram.compare.sides import OURS, at_once, is_ours, label, like
from jaxvram.vram.cards import size


def text(record: dict) -> str:
    """What `measured.compare` found."""
    driver = f", driver {record['driver']}" if record["driver"] else ""
    lines = [
        f"{record['recipe']}:{record['variant']}, {at_once(record)} at a time, {record['step']['batch_size']} a step, "
        f"measured on {record['gpu']}{driver}",
        "",
        *_rows(record),
        "",
        *(_about_memory(record) if "usable_bytes" in record else [_about_time()]),
    ]
    if record["parameters"] and record["parameters"]["difference"]:
        lines += [f"PyTorch's model is not quite ours: {record['parameters']['difference']}"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    steps = record["steps"]
    return "\n".join([*lines, f"median of {steps['timed']} steps after {steps['warm_up']}; {versions}"])


def _rows(record: dict) -> list[str]:
    with_peaks = "usable_bytes" in record
    head = f"{'peak':>12}{'jaxvram is':>13}" if with_peaks else ""
    lines = [f"{'':30}{head}{'ms a step':>12}{record['unit'] + '/s':>14}{'jaxvram is':>18}"]
    for name, side in record["sides"].items():
        if "refused" in side:
            lines.append(f"{label(name):30}{'-':>12}  {side['refused']}")
            continue
        ours = like(record, name)
        ratio = f"{ours['per_second'] / side['per_second']:.2f} x as fast" if not is_ours(name) else ""
        row = f"{side['seconds_per_step'] * 1e3:12,.1f}{side['per_second']:14,.0f}{ratio:>18}"
        if with_peaks:
            of_it = f"{ours['peak_bytes'] / side['peak_bytes']:.2f} of it" if not is_ours(name) else ""
            row = f"{size(side['peak_bytes']):>12}{of_it:>13}{row}"
        lines.append(f"{label(name):30}{row}".rstrip())
    return lines


def _about_memory(record: dict) -> list[str]:
    ours, peaks = record["sides"][OURS], record["sides"][OURS]["peaks"]
    if "planned_bytes" in record:
        error = f"{ours['peak_bytes'] / record['planned_bytes']:.3f} of that was measured"
        lines = [f"the plan for this card says {size(record['planned_bytes'])} for jaxvram: {error}"]
    else:
        lines = [f"no plan to compare with: {record['planned_refused']}"]
    marks = f"compiling {size(peaks['compile'])}, init {size(peaks['init'])}, the steps {size(peaks['steps'])}"
    whose = "the last is the steps' own" if is_of_steps(ours) else "so the steps need that at most"
    lines.append(f"jaxvram's highest marks since its process began, after {marks}; {whose}")
    if ours["outside_bytes"] is not None:
        reserved = size(record["capacity_bytes"] - record["usable_bytes"])
        held = f"outside its allocator it holds {size(ours['outside_bytes'])} (CUDA's context, libraries, kernels)"
        lines.append(f"{held}; a plan keeps {reserved} of the card in reserve")
    return lines


def is_of_steps(ours: dict) -> bool:
    """Whether the peak is the steps' own, and not of what came before them."""
    return ours["peaks"]["steps"] > max(ours["peaks"]["compile"], ours["peaks"]["init"])


def _about_time() -> str:
    return (
        "on a CPU time alone is measured, as no allocator counts there; one side runs after the other, so whatever else "
        "runs here moves the ratio"
    )
