"""report.html: self-contained, escaped, true to the folder, and made from any part of one."""

import html.parser
import json
import math
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxvram.errors import UserError
from jaxvram.train import report_figures
from jaxvram.train.metrics import MetricsLog
from jaxvram.train.report import Run, write_report
from jaxvram.train.report_figures import COLOURS, Curve

CLOCK = {"compile_seconds": 14.0, "train_seconds": 302.0, "pause_seconds": 44.0, "timed_steps": 99.0}
EVIL = "<script>alert(1)</script> & \"quoted\" 'too'"
VOID = {"meta", "link", "img", "br", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """Well-formed tags, their attributes, and the text a reader sees."""

    def __init__(self, path):
        super().__init__()
        self.attributes, self.seen, self.text, self.stack = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.stack, f"not closed: {self.stack}"
        self.words = re.sub(r"\s+", " ", " ".join(self.text))

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data.strip())


def write_metrics(workdir, steps=100, evals=True):
    with MetricsLog(workdir) as log:
        for step in range(1, steps + 1):
            loss, skipped = 2 + 2 * math.exp(-step / 20), int(step >= 40) + int(step >= 70)
            loss = {40: float("nan"), 70: 90.0}.get(step, loss)
            values = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "skipped": skipped}
            log.write(step, values if step == 1 else values | {"tokens_per_second": 12345.0})
            if evals and step % 25 == 0:
                log.write(
                    step, {"loss": 3 - 0.01 * step + (0.7 if step == 100 else 0), "exact_match": 0.25}, split="val"
                )


def write_plan(workdir, gib=2.0, **changes):
    program = {
        "argument_bytes": 2**30, "temporary_bytes": int((gib - 1) * 2**30), "output_bytes": 2**30,
        "aliased_bytes": 2**30, "peak_bytes": int(gib * 2**30), "fits": gib < 11,
        "largest": [{"name": "residual", "bytes": 2**28, "shape": "bf16[8,1024]", "source": "stack.py:44"}],
    }  # fmt: skip
    plan = {"card": "rtx4070", "capacity_bytes": 12 * 2**30, "reserved_bytes": 2**30}
    content = plan | dict.fromkeys(("init", "train", "sample"), program) | changes
    (workdir / "plan.json").write_text(json.dumps(content))


def write_picture(path):
    figure = Figure(figsize=(1, 1), dpi=20)
    FigureCanvasAgg(figure).print_png(path)


@pytest.fixture
def run(tmp_path):
    workdir = tmp_path / "some_run-tiny"
    write_metrics(workdir)
    write_plan(workdir)
    write_picture(workdir / "plan.png")
    config = {
        "name": "some_run",
        "variant": "tiny",
        "model": {"n_embd": 384},
        "train": {"steps": 100, "guard": {"window": 128}},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    samples = workdir / "samples"
    samples.mkdir()
    for step in (50, 100):
        (samples / f"step_{step:06d}.txt").write_text(f"first of {step}\n{'-' * 80}\nsecond of {step} -- still\n")
    write_picture(samples / "step_000100.png")
    return workdir


def test_the_page_tells_the_run(run):
    page = Page(write_report(run, "finished", CLOCK))
    for said in (
        "Best validation loss 2.2500 at step 75", "Final validation loss 2.7000 at step 100", "Tokens per second 12.3k",
        "Steps 100 of 100", "Skipped steps 2", "Wall time 6:00", "5:02 training", "0:44 pauses", "0:14 compiling",
        "finished", "Exact match 0.25", "Planned peak memory 2.00 GiB", "rtx4070", "FITS", "residual", "stack.py:44",
        "some_run:tiny", "n_embd 384", "guard.window 128", "first of 100", "second of 50 -- still", "jax 0.",
        "best 2.2500",
    ):  # fmt: skip
        assert said in page.words, said
    assert page.words.index("first of 100") < page.words.index("first of 50")  # the latest first
    assert page.source.count("<pre>") == 4
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_asks_for_nothing_outside_itself(run):
    page = Page(write_report(run, "running", CLOCK))
    assert "script" not in page.seen
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), (name, value[:80])
    addresses = set(re.findall(r"https?://[^\"' <)]+", page.source))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert page.source.count("data:image/png;base64,") == 2
    # Every reference inside the drawings finds its target.
    targets = {value for name, value in page.attributes if name == "id"}
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= targets
    assert {
        value[1:] for name, value in page.attributes if name in ("href", "xlink:href") and value[0] == "#"
    } <= targets


def test_everything_from_outside_is_escaped(tmp_path):
    workdir = tmp_path / "a<b>&'c'"
    with MetricsLog(workdir) as log:
        log.write(1, {"loss": 1.0, "tokens_per_second": 1.0})
        log.write(1, {"loss": 1.0, "<script>score": 0.5}, split="val")
    (workdir / "samples").mkdir()
    (workdir / "samples" / "step_000001.txt").write_text(EVIL)
    (workdir / "config.json").write_text(json.dumps({"name": EVIL, "model": {EVIL: EVIL}, EVIL: {"x": [EVIL]}}))
    evil_buffer = {"name": EVIL, "bytes": 1, "shape": EVIL, "source": EVIL}
    write_plan(workdir, card=EVIL, train={"largest": [evil_buffer], "peak_bytes": 1})
    page = Page(write_report(workdir, f"failed: {EVIL}"))
    assert "script" not in page.seen and "b" in page.seen
    assert page.words.count("<script>alert(1)</script>") >= 9
    assert "a<b>&'c'" in page.words


def test_status_failed_shows_why(run):
    page = Page(write_report(run, "failed: the run diverged: 8 steps in a row", CLOCK))
    assert 'class="pill bad">failed<' in page.source and "the run diverged: 8 steps in a row" in page.words


def test_facts_of_the_run_outlive_a_redrawing_elsewhere(run):
    write_report(run, "interrupted", CLOCK)
    before = (run / "run.json").read_text()
    page = Page(write_report(run))
    assert (run / "run.json").read_text() == before
    assert "interrupted" in page.words and "Wall time 6:00" in page.words


def no_metrics(workdir):
    pass


def only_config(workdir):
    (workdir / "config.json").write_text('{"train": {"steps": 10}, "task": null}')


def one_step(workdir):
    write_metrics(workdir, steps=1)


def no_evaluation(workdir):
    write_metrics(workdir, evals=False)


def only_evaluation(workdir):
    with MetricsLog(workdir) as log:
        log.write(0, {"loss": 4.0}, split="val")


def nothing_finite(workdir):
    with MetricsLog(workdir) as log:
        for step in (1, 2):
            log.write(step, {"loss": float("nan"), "grad_norm": float("inf"), "skipped": step})
        log.write(2, {"loss": float("nan")}, split="val")


def all_zero(workdir):
    with MetricsLog(workdir) as log:
        for step in (1, 2):
            log.write(step, {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "tokens_per_second": 0.0})


def negative(workdir):
    with MetricsLog(workdir) as log:
        for step in range(50):
            log.write(step, {"loss": -float(step), "grad_norm": 1e9 ** (step % 2)})


def images_only(workdir):
    (workdir / "samples").mkdir()
    write_picture(workdir / "samples" / "step_000010.png")
    (workdir / "samples" / "README").write_text("not a sample")


def odd_plan(workdir):
    write_plan(workdir, train=None, init={"peak_bytes": None, "largest": None}, capacity_bytes="much")
    (workdir / "plan.json").read_text()


@pytest.mark.parametrize(
    "fill",
    [
        no_metrics, only_config, one_step, no_evaluation, only_evaluation, nothing_finite, all_zero, negative,
        images_only, odd_plan,
    ],
)  # fmt: skip
def test_partial_folders(tmp_path, fill):
    fill(tmp_path)
    page = Page(write_report(tmp_path))
    assert "Steps" in page.words and "nan" not in re.findall(r'd="[^"]*"', page.source)
    assert (tmp_path / "loss.png").exists() == (tmp_path / "metrics.jsonl").exists() * (fill is not nothing_finite)
    assert ("Skipped steps 2" in page.words) == (fill in (no_evaluation, nothing_finite))


@pytest.mark.parametrize("content", ["", '{"train": ', "[1, 2]", "\0"])
def test_damaged_parts_are_named_and_the_rest_is_shown(run, content):
    for name in ("config.json", "plan.json", "run.json"):
        (run / name).write_text(content)
    page = Page(write_report(run))
    for name in ("config.json", "plan.json", "run.json"):
        assert f"{name} is damaged and was left out." in page.words
    assert "Best validation loss 2.2500" in page.words


def test_a_missing_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no run folder .*runs/NAME"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_plan_that_does_not_fit_says_so(run):
    write_plan(run, gib=14)
    page = Page(write_report(run))
    assert page.words.count("DOES NOT FIT") == 3
    widths = [float(width) for width in re.findall(r'class="rest" style="width:([\d.]+)%', page.source)]
    assert widths == pytest.approx([100 * 3 / 14] * 3, abs=0.01)  # 2 GiB too much and 1 in reserve, of 14


def test_loss_by_timestep_is_one_curve_and_no_score(run):
    buckets = {f"loss_t{t:03d}": 1.0 - t / 1000 for t in range(0, 1000, 100)}
    with MetricsLog(run) as log:
        log.write(125, {"loss": 1.5, "accuracy": 0.5} | buckets, split="val")
    words = Page(write_report(run)).words
    assert "Validation loss by timestep" in words and "Loss t900" not in words and "last 0.1" in words


def test_many_samples_are_thinned_but_keep_both_ends(run):
    for step in range(1, 200):
        (run / "samples" / f"step_{step:06d}.txt").write_text(f"text of {step}!")
    page = Page(write_report(run))
    assert (
        "text of 1!" in page.words and "text of 199!" in page.words and "175 more steps are in samples/." in page.words
    )


def test_thinning_keeps_spikes_and_ends():
    values = np.sin(np.arange(50_000) / 500)
    values[31_234], values[100:200] = 40.0, np.nan
    thin = Curve(np.arange(50_000), values).thinned()
    assert len(thin.values) <= report_figures.POINTS + 2
    assert np.nanmax(thin.values) == 40 and 31_234 in thin.steps and {0, 49_999} <= set(thin.steps)
    assert (np.diff(thin.steps) > 0).all()


def test_smoothing_keeps_a_constant_follows_a_line_and_skips_nan():
    steps = np.arange(600.0)
    assert Curve(steps, np.full(600, 3.0)).smoothed().values == pytest.approx(np.full(600, 3.0))
    line = Curve(steps, steps).smoothed().values
    assert line[:590] == pytest.approx(steps[:590])  # no lag
    noise = np.random.default_rng(0).normal(size=600)
    assert Curve(steps, noise).smoothed().values[50:].std() < 0.4
    noise[300] = np.nan
    assert np.isfinite(Curve(steps, noise).smoothed().values).all()


def test_a_skipped_spike_neither_bends_the_smoothed_loss_nor_flattens_the_picture(run):
    loaded = Run.load(run)
    assert loaded.skipped.tolist() == [40, 70]
    figure = report_figures.loss_figure(loaded.train, loaded.val, loaded.train_eval, loaded.skipped, COLOURS)
    assert 4 < figure.axes[0].get_ylim()[1] < 5  # the loss starts at 3.9; the spike is 90
    assert re.search(r"Final training loss 2\.0\d", Page(write_report(run)).words)
    assert loaded.train.without(loaded.skipped).smoothed().values.max() < 4


def test_the_svg_takes_its_colours_from_the_page():
    curve = Curve(np.arange(5.0), np.arange(5.0))
    empty = Curve(np.array([]), np.array([]))
    skipped = np.array([2.0])
    text = report_figures.svg(lambda c: report_figures.loss_figure(curve, curve, empty, skipped, c), "x")
    for role in ("train", "val", "muted", "grid", "bad"):
        assert f"var(--{role})" in text
    drawn = re.sub(r"<defs>.*?</defs>", "", text, flags=re.DOTALL)
    assert not set(re.findall(r"#[0-9a-f]{6}\b", drawn)) - {"#000000", "#ffffff"}, "a fixed colour"
    assert not any(colour in text for colour in COLOURS.values())
    assert "<metadata" not in text and "DOCTYPE" not in text
