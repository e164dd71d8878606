"""The curves of a run, drawn by matplotlib: as SVG that takes its colours from the page's CSS, and as PNG."""

import dataclasses
import io
import re
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.markers import TICKUP
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDE, SMALL = (13.2, 4.3), (4.2, 2.5)  # inches; on the page all charts are shown at about 1.1 times this
ROUND = (1, 2, 2.5, 5, 10)  # between ticks
POINTS = 900  # of a curve, at most: more than the pixels it gets

# Role of a line -> its colour in PNG. In SVG each becomes var(--role), so that one drawing serves light and dark pages.
COLOURS = {
    "ink": "#1b1f27",
    "muted": "#6a7282",
    "grid": "#e4e7ec",
    "train": "#2f6feb",
    "val": "#d9580d",
    "third": "#0f8a6a",
    "bad": "#d1242f",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values by step; NaN where a step had none."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, lines: list[dict], name: str) -> "Curve":
        chosen = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float | int)]
        steps_values_Nx2 = np.array(chosen, np.float64).reshape(-1, 2)
        return cls(steps_values_Nx2[:, 0], steps_values_Nx2[:, 1])

    def __bool__(self):
        return bool(np.isfinite(self.values).any())

    def finite(self) -> "Curve":
        good = np.isfinite(self.values)
        return Curve(self.steps[good], self.values[good])

    def without(self, steps: np.ndarray) -> "Curve":
        keep = ~np.isin(self.steps, steps)
        return Curve(self.steps[keep], self.values[keep])

    def smoothed(self) -> "Curve":
        """Mean over about a thirtieth of the run around each step (narrower at the start, where it falls), no NaNs."""
        curve = self.finite()
        n = len(curve.values)
        index = np.arange(n)
        half = np.minimum(index, max(1, n // 60) if n > 10 else 0)
        first, last = index - half, np.minimum(index + half, n - 1)
        sums = np.concatenate([[0.0], np.cumsum(curve.values)])
        return Curve(curve.steps, (sums[last + 1] - sums[first]) / (last + 1 - first))

    def thinned(self) -> "Curve":
        """The lowest and highest point of each of POINTS / 2 stretches, so that spikes stay; NaN gaps may close."""
        if len(self.values) <= POINTS:
            return self
        keep = {0, len(self.values) - 1}
        for part in np.array_split(np.arange(len(self.values)), POINTS // 2):
            if np.isfinite(self.values[part]).any():
                keep |= {part[np.nanargmin(self.values[part])], part[np.nanargmax(self.values[part])]}
        keep = sorted(keep)
        return Curve(self.steps[keep], self.values[keep])


def loss_figure(train: Curve, val: Curve, train_eval: Curve, skipped: np.ndarray, colours: dict, size=WIDE) -> Figure:
    """Train loss raw and smoothed, validation loss with its best point named, skipped steps as ticks on the axis."""
    figure, axes = _axes(size, colours)
    smooth = train.without(skipped).smoothed()
    one = len(train.finite().values) == 1
    raw = train.thinned()
    axes.plot(raw.steps, raw.values, color=colours["train"], alpha=0.4, linewidth=1, marker="o" if one else None)
    axes.plot(*_xy(smooth.thinned()), color=colours["train"], linewidth=2, label="training" if train else None)
    for role, curve, label in (("third", train_eval, "training split, evaluated"), ("val", val, "validation")):
        points = curve.finite()
        marker = "o" if len(points.values) <= 60 else None
        label = label if curve else None
        axes.plot(*_xy(points.thinned()), color=colours[role], linewidth=2, marker=marker, markersize=4, label=label)
    if val:
        points = val.finite()
        best = int(points.values.argmin())
        beside = np.interp(points.steps[best], smooth.steps, smooth.values) if train else -np.inf
        _name_best(axes, points.steps[best], points.values[best], colours, below=beside > points.values[best])
    shown = np.concatenate([train.without(skipped).finite().values, val.finite().values, train_eval.finite().values])
    if len(shown):
        # A spike may leave the picture: it is marked, and would flatten everything else.
        kept = np.concatenate([smooth.values, val.finite().values, [np.quantile(shown, 0.995)]])
        _limits(axes, shown.min(), kept.max())
    _mark_skipped(axes, skipped, colours)
    return figure


def curve_figure(curve: Curve, skipped: np.ndarray, colours: dict, role: str = "train", smooth: bool = False) -> Figure:
    """One quantity; on a logarithmic axis where it spans more than a factor of 30 far from zero."""
    figure, axes = _axes(SMALL, colours)
    points = curve.finite()
    marker = "o" if len(points.values) <= 30 else None
    line = axes.plot(*_xy(points.thinned()), color=colours[role], linewidth=1.8, marker=marker, markersize=3.5)[0]
    if smooth and len(points.values) > 30:
        line.set(alpha=0.4, linewidth=1)
        axes.plot(*_xy(curve.without(skipped).smoothed().thinned()), color=colours[role], linewidth=1.8)
    low, high = points.values.min(), points.values.max()
    if smooth and low > 0 and high > 30 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(short))  # set_yscale brought its own
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    else:
        _limits(axes, min(0.0, low) if smooth or low >= 0 else low, high)
    _mark_skipped(axes, skipped, colours)
    return figure


def svg(draw: Callable[[dict], Figure], label: str) -> str:
    """`<svg>` for inlining: theme colours as CSS variables, text as text, no metadata, ids or references outside it."""
    # Stand-ins that no colour map would produce; alpha is kept beside them as opacity.
    stand_in = {role: f"#f0{number:02x}0d" for number, role in enumerate(COLOURS)}
    figure = draw(stand_in)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    for role, colour in stand_in.items():
        text = text.replace(colour, f"var(--{role})")
    head = re.search(r'viewBox="[^"]*"', text).group()
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"^<svg[^>]*>", f'<svg {head} {namespaces} role="img" aria-label="{label}">', text)


def png(figure: Figure) -> bytes:
    """With a legend, which on the page is HTML."""
    figure.set_facecolor("white")
    figure.axes[0].legend(loc="upper right", frameon=False, fontsize=11, labelcolor="linecolor")
    figure.axes[0].set_title("loss by step", loc="left", fontsize=11, color=COLOURS["muted"], y=1, pad=-2)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def short(value: float, _position=None) -> str:
    """A tick: 500, 1.5k, 2M, 0.0006, 3e-05."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:.4g}"


def _axes(size, colours):
    figure = Figure(figsize=size, dpi=100, facecolor="none")
    width, height = size
    # Fixed room for labels (inches): a layout engine would cost more than all the rest of the drawing.
    figure.subplots_adjust(left=0.68 / width, right=1 - 0.12 / width, bottom=0.34 / height, top=1 - 0.12 / height)
    axes = figure.add_subplot(facecolor="none")
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=colours["muted"], linewidth=0.8)
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=10.5, labelcolor=colours["muted"], pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(8 if size[0] > 6 else 4, integer=True, steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(6 if size[1] > 3 else 4, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.margins(x=0.015)
    return figure, axes


def _xy(curve: Curve):
    return curve.steps, curve.values


def _limits(axes, low: float, high: float) -> None:
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin if low else 0 if high > 0 else -margin, high + margin)


def _name_best(axes, step: float, value: float, colours: dict, below: bool) -> None:
    axes.plot([step], [value], color=colours["val"], marker="o", markersize=8, markerfacecolor="none")
    left, right = axes.get_xlim()
    anchor = "right" if step > (left + right) / 2 else "left"
    axes.annotate(
        f"best {value:.4f}",
        (step, value),
        (0, -18 if below else 10),
        textcoords="offset points",
        ha=anchor,
        fontsize=11,
        color=colours["val"],
    )


def _mark_skipped(axes, skipped: np.ndarray, colours: dict) -> None:
    if len(skipped):
        height = np.zeros(len(skipped))
        marks = axes.plot(skipped, height, marker=TICKUP, linestyle="none", markersize=9, markeredgewidth=1.8)[0]
        marks.set(color=colours["bad"], transform=axes.get_xaxis_transform(), clip_on=False)
