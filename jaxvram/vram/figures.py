"""plan.png: the programs of a plan against the card, and who owns the peak of the hungriest."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxvram.vram.cards import GIB, size

INK, MUTED, GRID, BAD = "#1b1f27", "#6a7282", "#e4e7ec", "#d1242f"
COLOURS = {  # blues stay for the whole run, warm tones are gradients and copies, greens are activations
    "parameters": "#1d4f9e",
    "weight average": "#4f86d6",
    "optimizer state": "#9cbfee",
    "gradients": "#e2792f",
    "parameter copies": "#f4bb84",
    "saved activations": "#1f8f63",
    "logits and loss": "#b23a77",
    "cache": "#7d5fb8",
    "workspace": "#93cfb3",
    "batch": "#c8b04a",
    "other": "#8a919e",
    "gaps": "#cfd4dc",
}
SMALL = 0.004  # of the peak: owners below this share are not drawn in the lower panel


def png(plan: dict) -> bytes:
    """The picture of a plan (plan.json's content)."""
    programs = {name: part for name, part in plan.items() if isinstance(part, dict) and "peak_bytes" in part}
    hungriest = max(programs, key=lambda name: programs[name]["peak_bytes"])
    shown = "train" if "train" in programs else hungriest
    part = programs[shown]
    owners = {o: n for o, n in part["owners"].items() if n >= SMALL * part["peak_bytes"]}
    figure = Figure(figsize=(12, 3.4 + 0.42 * len(programs) + 0.34 * max(len(owners), 5)), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    heights = [0.62 * len(programs) + 0.5, 0.36 * max(len(owners), 5) + 0.5]
    grid = figure.add_gridspec(
        2, 2, height_ratios=heights, width_ratios=(1, 1.05),
        left=0.13, right=0.975, top=0.86, bottom=0.05, hspace=0.42, wspace=0.08,
    )  # fmt: skip
    _card_panel(figure.add_subplot(grid[0, :]), plan, programs)
    _owners_panel(figure.add_subplot(grid[1, 0]), shown, part, owners)
    made = [buffer for buffer in part["largest"] if buffer["source"] != "argument"]
    _buffers_panel(figure.add_subplot(grid[1, 1]), (made or part["largest"])[:7])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _card_panel(axes, plan: dict, programs: dict) -> None:
    """A stacked bar a program, the reserve hatched, the capacity as the end of the card."""
    capacity, usable = plan["capacity_bytes"] / GIB, (plan["capacity_bytes"] - plan["reserved_bytes"]) / GIB
    end = max([capacity, *(part["peak_bytes"] / GIB * 1.12 for part in programs.values())])
    for row, part in enumerate(programs.values()):
        left = 0.0
        for owner, count in part["owners"].items():
            axes.barh(row, count / GIB, left=left, height=0.62, color=COLOURS[owner], linewidth=0, zorder=3)
            left += count / GIB
        verdict = "fits" if part["fits"] else "DOES NOT FIT"
        colour = INK if part["fits"] else BAD
        # Beside the bar, or inside its right end where the card would end first.
        beside = left + 0.2 * end < (usable if left < usable else end * 1.2)
        axes.annotate(
            f"{size(part['peak_bytes'])}  {verdict}", (left, row), (6 if beside else -6, 0), textcoords="offset points",
            va="center", ha="left" if beside else "right", fontsize=10, color=colour, weight="bold", zorder=6,
            bbox=None if beside else {"boxstyle": "round,pad=0.25", "fc": "white", "ec": "none", "alpha": 0.85},
        )  # fmt: skip
    rows = len(programs)
    axes.add_patch(
        Rectangle(
            (usable, -0.6), capacity - usable, rows + 0.2, fc="#f3f4f7", ec="#c3c8d1", hatch="///", lw=0, zorder=2
        )
    )
    axes.axvline(capacity, color=INK, lw=1.6, zorder=4)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(0, end * 1.012)
    axes.set_yticks(range(rows), programs, fontsize=11, color=INK)
    axes.set_xlabel("GiB of device memory", fontsize=9, color=MUTED)
    _plain(axes)
    axes.grid(axis="x", color=GRID, lw=0.8, zorder=0)
    axes.text(0, 1.30, plan["gpu"], transform=axes.transAxes, fontsize=15, weight="bold", color=INK, va="bottom")
    subtitle = f"{capacity:.2f} GiB, of which {capacity - usable:.2f} GiB in reserve (hatched): {usable:.2f} GiB to use"
    axes.text(0, 1.28, subtitle, transform=axes.transAxes, fontsize=10, color=MUTED, va="top")
    _legend(axes, programs)


def _legend(axes, programs: dict) -> None:
    largest = {}
    for part in programs.values():
        for owner, count in part["owners"].items():
            if count >= SMALL * part["peak_bytes"]:
                largest[owner] = count
    handles = [Rectangle((0, 0), 1, 1, fc=COLOURS[owner], lw=0) for owner in COLOURS if owner in largest]
    names = [owner for owner in COLOURS if owner in largest]
    axes.legend(
        handles, names, loc="lower left", bbox_to_anchor=(-0.008, 0.985), ncols=len(names), frameon=False, fontsize=9,
        handlelength=0.9, handleheight=0.9, handletextpad=0.45, columnspacing=1.2, labelcolor=INK, borderpad=0.2,
    )  # fmt: skip


def _owners_panel(axes, name: str, part: dict, owners: dict) -> None:
    peak = part["peak_bytes"]
    ordered = sorted(owners.items(), key=lambda item: -item[1])
    for row, (owner, count) in enumerate(ordered):
        axes.barh(row, count / GIB, height=0.66, color=COLOURS[owner], linewidth=0, zorder=3)
        label = f"{size(count)}  {count / peak:.0%}"
        axes.annotate(
            label, (count / GIB, row), (5, 0), textcoords="offset points", va="center", fontsize=9.5, color=INK
        )
    axes.set_yticks(range(len(ordered)), [owner for owner, _ in ordered], fontsize=10, color=INK)
    axes.set_ylim(max(len(ordered), 5) - 0.4, -0.6)
    axes.set_xlim(0, max(owners.values()) / GIB * 1.32)
    axes.set_xticks([])
    _plain(axes)
    axes.set_title(f"Who owns the peak of {name}", loc="left", fontsize=12, weight="bold", color=INK, pad=8)


def _buffers_panel(axes, largest: list[dict]) -> None:
    """The largest buffers: size, name, shape and the line that made each."""
    axes.set_axis_off()
    axes.set_title("Largest buffers that it makes", loc="left", fontsize=12, weight="bold", color=INK, pad=8)
    step = 1 / max(len(largest), 1)
    for row, buffer in enumerate(largest):
        y = 1 - (row + 0.5) * step
        axes.add_patch(Rectangle((0, y - 0.3 * step), 0.012, 0.6 * step, fc=COLOURS[buffer["owner"]], lw=0))
        axes.text(0.17, y, f"{buffer['bytes'] / 2**20:,.1f} MiB", fontsize=9.5, color=INK, ha="right", va="center")
        axes.text(0.19, y + 0.2 * step, _cut(buffer["name"], 62), fontsize=8.8, color=INK, va="center")
        below = "   ".join(filter(None, (buffer["shape"], buffer["source"])))
        axes.text(0.19, y - 0.22 * step, _cut(below, 78), fontsize=7.6, color=MUTED, va="center", family="monospace")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _plain(axes) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=9, labelcolor=MUTED)
