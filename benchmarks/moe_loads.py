"""Draws docs/moe_loads.png: loads of experts by layer after two runs of grok.py:tiny, with its balance loss and without.

  python launch.py --config=configs/grok.py:tiny --workdir=runs/with
  python launch.py --config=configs/grok.py:tiny --workdir=runs/without --config.model.balance_loss=0.0
  python benchmarks/moe_loads.py runs/with runs/without docs/moe_loads.png
"""

import io
import sys

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from jaxvram.train import metrics
from jaxvram.train.report_figures import COLOURS
from jaxvram.train.report_router import LOAD, load_figure


def picture(workdir: str) -> Image.Image:
    """The last evaluation's loads, with the folder's name and the validation loss above."""
    last = [line for line in metrics.read(workdir) if line.get("split") == "val"][-1]
    load_LxE = np.asarray(last[LOAD]) * len(last[LOAD][0])
    figure = load_figure(load_LxE, COLOURS)
    figure.set_facecolor("white")
    height = figure.get_figheight()
    figure.set_figheight(height + 0.4)
    figure.subplots_adjust(bottom=0.5 / (height + 0.4), top=height / (height + 0.4))
    name = workdir.rstrip("/").rpartition("/")[2]
    title = f"{name}: busiest {load_LxE.max():.2f} of the mean, validation loss {last['loss']:.3f}"
    figure.axes[0].set_title(title, loc="left", fontsize=12, color=COLOURS["ink"])
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")


if __name__ == "__main__":
    *workdirs, out = sys.argv[1:]
    pictures = [picture(workdir) for workdir in workdirs]
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for one in pictures:
        whole.paste(one, (0, top))
        top += one.height
    whole.save(out, optimize=True)
