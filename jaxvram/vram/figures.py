"""plan.png: the programs of a plan against the card, and who owns the peak of the hungriest."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxvram.vram.cards import GIB, size

INK, MUTED, GRID, BAD = "#1b1f27", "#6a7282", "#e4e7ec", "#d1242f"
COLOURS = {  # blues stay for the whole run, warm tones are gradients and copies, greens are activations
    "parameters": "#1d4f9e",
    "frozen parameters": "#5f7f9e",
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
    shown = "train" if "train" in programs else max(programs, key=lambda name: programs[name]["peak_bytes"])
    part = programs[shown]
    owners = {o: n for o, n in part["owners"].items() if n >= SMALL * part["peak_bytes"]}
    # In inches, from the top: title, the card's panel, the two panels on the peak.
    width, title, bars, lower = 12.0, 1.15, 0.62 * len(programs) + 0.12, 0.36 * max(len(owners), 6) + 0.1
    height = title + bars + 1.1 + lower + 0.3
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def panel(left, top, right, tall):
        return figure.add_axes((left / width, 1 - (top + tall) / height, (right - left) / width, tall / height))

    capacity, usable = plan["capacity_bytes"], plan["capacity_bytes"] - plan["reserved_bytes"]
    room = f"{size(capacity)}, of which {size(plan['reserved_bytes'])} in reserve (hatched): {size(usable)} to use"
    figure.text(1.6 / width, 1 - 0.42 / height, plan["gpu"], fontsize=15, weight="bold", color=INK)
    figure.text(1.6 / width, 1 - 0.64 / height, room, fontsize=10, color=MUTED)
    card = panel(1.6, title, 11.7, bars)
    _card_panel(card, capacity / GIB, usable / GIB, programs)
    _legend(card, programs)
    below = title + bars + 1.1
    _owners_panel(panel(1.6, below, 6.4, lower), shown, part, owners)
    made = [buffer for buffer in part["largest"] if buffer["source"] != "argument"]
    _buffers_panel(panel(6.75, below, 11.85, lower), (made or part["largest"])[:7])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _card_panel(axes, capacity: float, usable: float, programs: dict) -> None:
    """A stacked bar a program, the reserve hatched, the capacity as the end of the card. Sizes in GiB."""
    end = capacity * 1.012
    for part in programs.values():  # a verdict stands inside a bar that ends near the end of the card, else beside it
        peak = part["peak_bytes"] / GIB
        end = max(end, peak * 1.28 if not part["fits"] else peak * 1.012)
    for row, part in enumerate(programs.values()):
        left = 0.0
        for owner, count in part["owners"].items():
            axes.barh(row, count / GIB, left=left, height=0.62, color=COLOURS[owner], linewidth=0, zorder=3)
            left += count / GIB
        beside = not part["fits"] or left + 0.17 * end < usable
        axes.annotate(
            f"{size(part['peak_bytes'])}  {'fits' if part['fits'] else 'DOES NOT FIT'}", (left, row),
            (6 if beside else -6, -0.5), textcoords="offset points", va="center", ha="left" if beside else "right",
            fontsize=10, color=INK if part["fits"] else BAD, weight="bold", zorder=6,
            bbox=None if beside else {"boxstyle": "round,pad=0.25", "fc": "white", "ec": "none", "alpha": 0.85},
        )  # fmt: skip
    rows = len(programs)
    reserve = {"fc": "#f3f4f7", "ec": "#c3c8d1", "hatch": "///", "lw": 0, "zorder": 2}
    axes.add_patch(Rectangle((usable, -0.6), capacity - usable, rows + 0.2, **reserve))
    axes.axvline(capacity, color=INK, lw=1.6, zorder=4)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.set_yticks(range(rows), programs, fontsize=11, va="center_baseline")
    axes.set_xlabel("GiB of device memory", fontsize=9, color=MUTED)
    _plain(axes)
    axes.grid(axis="x", color=GRID, lw=0.8, zorder=0)


def _legend(axes, programs: dict) -> None:
    """A key for the owners that can be seen."""
    seen = {o for part in programs.values() for o, n in part["owners"].items() if n >= SMALL * part["peak_bytes"]}
    names = [owner for owner in COLOURS if owner in seen]
    axes.legend(
        [Rectangle((0, 0), 1, 1, fc=COLOURS[owner], lw=0) for owner in names], names, loc="lower left",
        bbox_to_anchor=(-0.008, 1.0), ncols=len(names), frameon=False, fontsize=9, handlelength=0.9, handleheight=0.9,
        handletextpad=0.45, columnspacing=1.2 if len(names) < 9 else 0.8, labelcolor=INK, borderpad=0.2, borderaxespad=0.1,
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
    axes.set_yticks(range(len(ordered)), [owner for owner, _ in ordered], fontsize=10, va="center_baseline")
    axes.set_ylim(max(len(ordered), 6) - 0.4, -0.6)
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
