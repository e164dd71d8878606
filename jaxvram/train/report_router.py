"""How even the experts' loads are, as a section of report.html: a picture of layers by experts, and curves by step."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxvram.train.report_figures import Curve, svg

LOAD = "router_load"  # in metrics.jsonl: for each layer, the share of choices that fell on each expert
MOST_NUMBERS = 400  # cells up to which each says its number
CURVES = {"router_entropy": "Entropy of a token's router, 1: undecided", "balance_loss": "Balance loss, 1: even",
          "router_dropped": "Choices dropped", "next_token_loss": "Loss of the next token alone"}  # fmt: skip


def peaks(lines: list[dict]) -> Curve:
    """By step, the load of the busiest expert of any layer, in units of the mean."""
    found = [(line["step"], np.asarray(line[LOAD])) for line in lines if LOAD in line]
    return Curve(np.array([step for step, _ in found]), np.array([load.max() * load.shape[1] for _, load in found]))


def router_section(lines: list[dict], evals: list[dict], small_chart: Callable, chart: Callable) -> str:
    """The section, or nothing for a run without routers.

    Args:
      lines, evals: of metrics.jsonl, of training and of the validation split.
      small_chart: (title, Curve) -> HTML; chart: (title, picture, note) -> HTML.
    """
    told = [line for line in (*lines, *evals) if LOAD in line]
    if not told:
        return ""
    last = max(told, key=lambda line: (line["step"], "split" in line))
    load_LxE = np.asarray(last[LOAD]) * len(last[LOAD][0])
    layer, expert = np.unravel_index(load_LxE.argmax(), load_LxE.shape)
    where = "the validation split" if "split" in last else "one training step"
    note = f"step {last['step']:,}, {where}; busiest: layer {layer}, expert {expert}, {load_LxE.max():.2f} of the mean"
    picture = svg(lambda colours: load_figure(load_LxE, colours), "Load of each expert by layer")
    charts = [small_chart("Busiest expert, 1: even", peaks(lines))] if any(LOAD in line for line in lines) else []
    charts += [small_chart(title, curve) for name, title in CURVES.items() if (curve := Curve.of(lines, name))]
    return chart("Load of each expert, 1: the mean", picture, note) + f'<div class="charts">{"".join(charts)}</div>'


def load_figure(load_LxE: np.ndarray, colours: dict) -> Figure:
    """A row a layer, a column an expert: the darker the busier, white where none comes."""
    L, E = load_LxE.shape
    figure = Figure(figsize=(10.4, 0.7 + 0.3 * L), dpi=100, facecolor="none")
    figure.subplots_adjust(left=0.06, right=0.995, bottom=0.45 / (0.7 + 0.3 * L), top=0.98)
    axes = figure.add_subplot(facecolor="none")
    darkest = max(2.0, load_LxE.max())
    for (layer, expert), load in np.ndenumerate(load_LxE):
        shade = {"facecolor": colours["train"], "alpha": 0.85 * load / darkest, "linewidth": 0}
        axes.add_patch(Rectangle((expert, layer), 0.96, 0.9, **shade))
        if L * E <= MOST_NUMBERS:
            middle = {"ha": "center", "va": "center", "fontsize": 9.5, "color": colours["ink"]}
            axes.text(expert + 0.48, layer + 0.45, f"{load:.2f}", **middle)
    axes.set(xlim=(0, E), ylim=(L, 0))
    for axis, count, name in ((axes.xaxis, E, "expert"), (axes.yaxis, L, "layer")):
        every = -(-count // 32)
        axis.set_ticks(np.arange(0, count, every) + 0.47, [str(i) for i in range(0, count, every)])
        axis.set_label_text(name, color=colours["muted"], fontsize=10.5)
    axes.tick_params(which="both", length=0, labelsize=10, labelcolor=colours["muted"])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure
