"""Routers in a run folder and its report: lists in metrics.jsonl, the picture of loads, nothing for runs without routers."""

import json

import numpy as np

from jaxvram.train import metrics, report
from jaxvram.train.report_figures import COLOURS
from jaxvram.train.report_router import load_figure, peaks

LOADS = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]


def write(workdir, **more):
    with metrics.MetricsLog(workdir) as log:
        for step in (10, 20):
            log.write(step, {"loss": 3.0 - step / 20, "grad_norm": 1.0, **more})
        log.write(20, {"loss": 2.5, **({"router_load": LOADS} if more else {})}, split="val")
    return report.write_report(workdir).read_text()


def test_loads_are_kept_as_lists_and_drawn(tmp_path):
    even = np.full((2, 4), 0.25)
    page = write(tmp_path, router_load=even, router_entropy=0.9, balance_loss=1.2, next_token_loss=2.4)
    first, _, val = metrics.read(tmp_path)
    assert first["router_load"] == even.tolist() and val["router_load"] == LOADS
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["router_entropy"] == 0.9
    assert 'href="#routers"' in page and "busiest: layer 0, expert 0, 2.00 of the mean" in page
    assert "Balance loss, 1: even" in page and "Router load" not in page


def test_without_routers_there_is_no_such_section(tmp_path):
    assert "#routers" not in write(tmp_path)


def test_the_busiest_expert_by_step():
    curve = peaks([{"step": 1, "loss": 2.0}, {"step": 2, "router_load": LOADS}, {"step": 3, "router_load": LOADS[1:]}])
    assert curve.steps.tolist() == [2, 3] and curve.values.tolist() == [2.0, 1.0]


def test_the_picture_has_a_cell_for_each_expert_of_each_layer():
    axes = load_figure(np.array(LOADS) * 4, COLOURS).axes[0]
    shades = [patch.get_alpha() for patch in axes.patches]
    assert len(shades) == 8 and shades[3] == 0 and max(shades) == shades[0]
    assert [text.get_text() for text in axes.texts][:2] == ["2.00", "1.00"]
