"""compare.png: a bar a side, divided by owners, on the scale of the card."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxvram.compare.sides import OWNERS, is_ours, label
from jaxvram.vram.cards import GIB
from jaxvram.vram.figures import BAD, COLOURS, GRID, INK, MUTED


def png(record: dict) -> bytes:
    """The picture of what `sides.compare` found."""
    sides = {name: side for name, side in record["sides"].items() if "peak_bytes" in side}
    height = 1.6 + 0.5 * len(sides)
    figure = Figure(figsize=(11.0, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.24, 0.62 / height, 0.58, (height - 1.35) / height))
    for row, side in enumerate(sides.values()):
        left = 0.0
        for owner in OWNERS:
            width = side["owners"].get(owner, 0) / GIB
            axes.barh(row, width, left=left, height=0.66, color=COLOURS[owner])
            left += width
        axes.text(left, row, f"  {left:.2f} GiB", va="center", fontsize=10, color=INK)
    usable = record["usable_bytes"] / GIB
    axes.axvline(usable, color=BAD, linewidth=1.2)
    axes.text(usable, -0.75, f"{record['card']} has {usable:.2f}", ha="center", fontsize=9, color=BAD)
    axes.set_yticks(range(len(sides)), [label(name) for name in sides], color=INK)
    axes.set_ylim(len(sides) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(usable, *(side["peak_bytes"] / GIB for side in sides.values())))
    axes.set_xlabel("GiB at the peak of a train step", color=MUTED, fontsize=9)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
    shown = [owner for owner in OWNERS if any(side["owners"].get(owner, 0) > 0.005 * GIB for side in sides.values())]
    figure.legend(
        [Patch(color=COLOURS[owner]) for owner in shown], shown, loc="center right", fontsize=8, frameon=False,
        bbox_to_anchor=(0.995, 0.5),
    )  # fmt: skip
    title = f"{record['recipe']}:{record['variant']}, {record['way']}"
    figure.text(0.24, 1 - 0.35 / height, title, fontsize=13, weight="bold", color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def curve(record: dict) -> bytes:
    """The picture of what `search.search` found: peaks over batch or context, and the card's line."""
    figure = Figure(figsize=(8.0, 5.0), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.13, 0.86, 0.75))
    for name, side in record["sides"].items():
        if "points" in side:
            n, peaks = zip(*side["points"], strict=True)
            largest = f"{label(name)}: {side['largest']:,}"
            axes.plot(n, [peak / GIB for peak in peaks], marker="o", linewidth=2.4 if is_ours(name) else 1.2, label=largest)
    usable = record["usable_bytes"] / GIB
    axes.axhline(usable, color=BAD, linewidth=1.2)
    axes.text(0.0, usable, f" {record['card']} has {usable:.2f}", va="bottom", fontsize=9, color=BAD)
    axes.set_ylim(0, 1.6 * usable)
    axes.set_xlabel(record["search"], color=MUTED)
    axes.set_ylabel("GiB at the peak of a train step", color=MUTED)
    axes.grid(color=GRID)
    axes.legend(fontsize=8, frameon=False, title="largest that fits", title_fontsize=8)
    title = f"{record['recipe']}:{record['variant']}, planned"
    figure.text(0.1, 0.93, title, fontsize=13, weight="bold", color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
