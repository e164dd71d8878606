"""report.html: everything a run folder knows on one page that opens without a server or a network, and loss.png.

Reads config.json, metrics.jsonl, samples/, plan.json, plan.png and run.json, each if it is there. run.json is ours:
what only the running process knows (status, clock, device, versions), so that the page can be drawn again anywhere.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxvram.errors import UserError
from jaxvram.train import metrics
from jaxvram.train.progress import amount, duration, peak_bytes
from jaxvram.train.report_figures import COLOURS, SMALL, WIDE, Curve, curve_figure, loss_figure, png, short, svg
from jaxvram.train.report_html import CSS, GIB, escape, image, mapping, number, words
from jaxvram.train.report_plan import memory_section
from jaxvram.train.report_router import router_section

SAMPLES = 24  # steps on show, the first and the last among them
SAMPLE_CHARACTERS = 20_000  # of one file
BUCKET = re.compile(r"loss_t(\d+)")  # loss of the timesteps from that one on
RATE = "_per_second"  # tokens_per_second, images_per_second
MOODS = {"finished": "good", "running": "info", "interrupted": "warn", "failed": "bad"}


def write_report(workdir: str | os.PathLike, status: str | None = None, clock: Mapping | None = None) -> Path:
    """Write report.html and loss.png into a run folder, however much of a run it holds; returns the page's path.

    The running process gives `status`, "running", "finished", "interrupted" or "failed: why", and `clock`, the dict
    from Progress.state(): both go to run.json with the device and the versions. Without them the folder is only drawn.
    UserError: no such folder, a damaged metrics.jsonl, a full disk.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no run folder {str(workdir)!r}; give the one that training wrote, such as runs/NAME")
    if status is not None:
        facts = {"status": status, "clock": dict(clock or {}), **_this_process()}
        metrics.write_atomic(workdir / "run.json", json.dumps(facts, indent=2))
    run = Run.load(workdir)
    if run.train or run.val:
        metrics.write_atomic(workdir / "loss.png", png(_loss_figure(run, COLOURS, (9, 4.5))))
    metrics.write_atomic(workdir / "report.html", _page(run))
    return workdir / "report.html"


@dataclasses.dataclass
class Run:
    """What the folder holds, read once; absent parts are empty."""

    workdir: Path
    config: dict
    plan: dict
    facts: dict
    lines: list[dict]  # of training
    evals: list[dict]  # of the validation split
    train_evals: list[dict]  # of the training split, where the recipe asks for it
    notices: list[str]  # what could not be read

    @classmethod
    def load(cls, workdir: Path) -> "Run":
        notices: list[str] = []
        read = lambda name: _read_json(workdir / name, notices)
        lines = metrics.read(workdir)
        return cls(
            workdir=workdir.resolve(),
            config=read("config.json"),
            plan=read("plan.json"),
            facts=read("run.json"),
            lines=[line for line in lines if "split" not in line],
            evals=[line for line in lines if line.get("split") == "val"],
            train_evals=[line for line in lines if line.get("split") == "train"],
            notices=notices,
        )

    def __post_init__(self):
        self.train, self.val = Curve.of(self.lines, "loss"), Curve.of(self.evals, "loss")
        self.train_eval = Curve.of(self.train_evals, "loss")
        # `skipped` counts from the start of the run: a line on which it has grown, or whose loss is not finite.
        counts = np.array([line.get("skipped", 0) for line in self.lines])
        finite = np.array([np.isfinite(line.get("loss", 0.0)) for line in self.lines], bool)
        self.skipped_total = int(counts.max(initial=0))
        grown = np.diff(counts, prepend=0) > 0
        self.skipped = np.array([line["step"] for line in self.lines])[grown | ~finite] if self.lines else np.array([])
        self.step = max((line["step"] for line in self.lines + self.evals), default=0)
        section = self.config.get("train")
        steps = section.get("steps") if isinstance(section, dict) else None
        self.total_steps = steps if isinstance(steps, int) and steps > 0 else None
        rates = (name for line in reversed(self.lines) for name in line if name.endswith(RATE))
        self.rate_name = next(rates, "")

    @property
    def status(self) -> str:
        if status := self.facts.get("status"):
            return str(status)
        return "finished" if self.total_steps and self.step >= self.total_steps else "unknown"


def _read_json(path: Path, notices: list[str]) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        return {}
    except (ValueError, OSError):
        pass
    notices.append(f"{path.name} is damaged and was left out.")
    return {}


def _this_process() -> dict:
    import jax

    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"CPU, {os.cpu_count()} cores"
    versions = {"python": platform.python_version()}
    for name in ("jaxvram", "jax", "jaxlib", "flax", "optax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # jaxvram, when it runs from a checkout that was never installed
    return {
        "device": kind if jax.device_count() == 1 else f"{jax.device_count()} x {kind}",
        "peak_bytes": peak_bytes(device),
        "versions": versions,
        "written": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }


def _page(run: Run) -> str:
    sections = {
        "Curves": _curves(run),
        "Routers": _routers(run),
        "Samples": _samples(run),
        "Memory plan": memory_section(run.plan, run.workdir / "plan.png"),
        "Configuration": _config(run),
    }
    sections = {title: body for title, body in sections.items() if body}
    anchor = lambda title: title.lower().replace(" ", "-")
    links = "".join(f'<a href="#{anchor(title)}">{title}</a>' for title in sections)
    body = "".join(
        f'<section><h2 id="{anchor(title)}">{title}</h2>{text}</section>' for title, text in sections.items()
    )
    name = escape(run.workdir.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name} · jaxvram</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{CSS}</style></head>\n"
        f"<body><main>{_header(run, links)}{_tiles(run)}{body}{_footer(run)}</main></body></html>\n"
    )


def _header(run: Run, links: str) -> str:
    word, _, why = run.status.partition(":")
    mood = MOODS.get(word, "")
    recipe = ":".join(str(run.config[key]) for key in ("name", "variant") if run.config.get(key))
    about = " · ".join(escape(part) for part in (recipe, run.facts.get("device"), _date(run)) if part)
    share = (
        f'<div class="done"><i style="width:{100 * min(1, run.step / run.total_steps):.1f}%"></i></div>'
        if run.total_steps
        else ""
    )
    notices = [why.strip()] * bool(why.strip()) + run.notices
    return (
        f'<header><div class="title"><h1>{escape(run.workdir.name)}</h1>'
        + (f'<span class="pill {mood}">{escape(word)}</span>' if word != "unknown" else "")
        + f'</div><div class="muted">{about}</div><nav>{links}</nav>'
        + "".join(f'<p class="notice">{escape(notice)}</p>' for notice in notices)
        + f"</header>{share or '<p></p>'}"
    )


def _date(run: Run) -> str:
    return str(run.facts.get("written", ""))[:16].replace("T", " ")


def _tiles(run: Run) -> str:
    tiles = []
    train, val = run.train.without(run.skipped).smoothed(), run.val.finite()
    if val:
        best = int(val.values.argmin())
        tiles.append(("Best validation loss", f"{val.values[best]:.4f}", f"at step {int(val.steps[best]):,}"))
        tiles.append(("Final validation loss", f"{val.values[-1]:.4f}", f"at step {int(val.steps[-1]):,}"))
    if train:
        tiles.append(("Final training loss", f"{train.values[-1]:.4f}", f"smoothed; started at {train.values[0]:.4f}"))
    for name, curve in _scores(run):
        best = curve.finite().values.max()
        tiles.append((words(name), f"{curve.finite().values[-1]:.4g}", f"last evaluation; highest {best:.4g}"))
    if rate := Curve.of(run.lines, run.rate_name):
        unit = run.rate_name.removesuffix(RATE)
        tiles.append(
            (
                f"{unit.capitalize()} per second",
                amount(float(np.median(rate.finite().values))),
                "median, training time only",
            )
        )
    of_total = f"of {run.total_steps:,}" if run.total_steps else ""
    tiles.append(("Steps", f"{run.step:,}", of_total))
    if run.lines:
        tiles.append(("Skipped steps", f"{run.skipped_total:,}", "by the guard"))
    tiles += _time_and_memory(run)
    return '<div class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</div>"


def _time_and_memory(run: Run) -> list[tuple]:
    tiles = []
    parts = {name: run.facts.get("clock", {}).get(f"{name}_seconds") for name in ("train", "pause", "compile")}
    if all(value is not None for value in parts.values()):
        verbs = {"train": "training", "pause": "pauses", "compile": "compiling"}
        split = ", ".join(f"{duration(value)} {verbs[name]}" for name, value in parts.items())
        tiles.append(("Wall time", duration(sum(parts.values())), split))
    planned = number(mapping(run.plan.get("train")).get("peak_bytes"))
    if peak := run.facts.get("peak_bytes"):
        tiles.append(("Peak memory", f"{peak / GIB:.2f} GiB", f"planned {planned / GIB:.2f} GiB" if planned else ""))
    elif planned:
        tiles.append(
            ("Planned peak memory", f"{planned / GIB:.2f} GiB", f"train step, on {run.plan.get('card', 'the card')}")
        )
    if device := run.facts.get("device"):
        tiles.append(("Device", device, ""))
    return tiles


def _tile(name: str, value: str, note: str) -> str:
    size = ' class="words"' if len(value) > 12 else ""
    return (
        f'<div class="tile"><span>{escape(name)}</span><b{size}>{escape(value)}</b><small>{escape(note)}</small></div>'
    )


def _curves(run: Run) -> str:
    charts = []
    keys = {"train": "training, each logged step pale, smoothed bold"} if run.train else {}
    keys |= {"val": "validation"} if run.val else {}
    keys |= {"third": "training split, evaluated"} if run.train_eval else {}
    keys |= {"bad": "skipped or not finite"} if len(run.skipped) else {}
    if run.train or run.val:
        draw = lambda size: lambda colours: _loss_figure(run, colours, size)
        both = f'<div class="wide">{svg(draw(WIDE), "Loss by step")}</div>'
        both += f'<div class="narrow">{svg(draw(SMALL), "Loss by step")}</div>'
        charts.append(_chart("Loss", keys, both))
    small = []
    smooth = ("grad_norm", run.rate_name)
    for name, title in (("learning_rate", ""), ("grad_norm", "Gradient norm"), (run.rate_name, "")):
        if curve := Curve.of(run.lines, name):
            small.append(_small_chart(title or words(name), curve, run.skipped, "train", name in smooth))
    small += [_small_chart(words(name), curve, np.array([]), "val", False) for name, curve in _scores(run)]
    if curve := _loss_by_timestep(run):
        small.append(_small_chart("Validation loss by timestep", curve, np.array([]), "val", False))
    return "".join(charts) + (f'<div class="charts">{"".join(small)}</div>' if small else "")


def _loss_figure(run: Run, colours: dict, size):
    return loss_figure(run.train, run.val, run.train_eval, run.skipped, colours, size)


def _small_chart(title: str, curve: Curve, skipped: np.ndarray, role: str, smooth: bool) -> str:
    picture = svg(lambda colours: curve_figure(curve, skipped, colours, role, smooth), "by step")
    return _chart(title, {}, picture, f"last {short(float(f'{curve.finite().values[-1]:.3g}'))}")


def _chart(title: str, keys: dict[str, str], picture: str, note: str = "") -> str:
    keys = "".join(f'<span class="key" style="--c:var(--{role})">{text}</span>' for role, text in keys.items())
    note = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="card"><div class="chart-head"><h3>{escape(title)}</h3>{keys}{note}</div>{picture}</div>'


def _routers(run: Run) -> str:
    small_chart = lambda title, curve: _small_chart(title, curve, np.array([]), "train", False)
    return router_section(run.lines, run.evals, small_chart, lambda title, picture, note: _chart(title, {}, picture, note))


def _scores(run: Run) -> list[tuple[str, Curve]]:
    """What evaluations measure besides the loss (exact match, accuracy...)."""
    names = dict.fromkeys(name for line in run.evals for name in line if name not in ("step", "split", "loss"))
    names = [name for name in names if not BUCKET.fullmatch(name)]
    return [(name, curve) for name in names if (curve := Curve.of(run.evals, name))]


def _loss_by_timestep(run: Run) -> Curve | None:
    """Of the last evaluation, where the task tells it."""
    last = run.evals[-1] if run.evals else {}
    found = sorted((int(match[1]), value) for name, value in last.items() if (match := BUCKET.fullmatch(name)))
    return Curve(*np.array(found, np.float64).T) if found else None


def _samples(run: Run) -> str:
    by_step: dict[int, list[Path]] = {}
    for path in sorted((run.workdir / "samples").glob("*")):
        if path.suffix in (".txt", ".png") and (number := re.search(r"\d+", path.stem)):
            by_step.setdefault(int(number.group()), []).append(path)
    steps = sorted(by_step)
    if not steps:
        return ""
    chosen = sorted({steps[i] for i in np.linspace(0, len(steps) - 1, min(SAMPLES, len(steps))).round().astype(int)})
    parts = []
    for step in reversed(chosen):
        bodies = [body for path in by_step[step] for body in _sample_bodies(path)]
        peek = next((text for text in (re.sub(r"<[^>]*>", "", body).split() for body in bodies) if text), [])
        is_open, words_of_it = " open" if step == chosen[-1] else "", " ".join(peek)[:200]
        parts.append(
            f'<details class="card"{is_open}><summary>Step {step:,}<span class="peek">{words_of_it}</span></summary>'
            f'<div class="samples">{"".join(bodies)}</div></details>'
        )
    left_out = len(steps) - len(chosen)
    return "".join(parts) + (f"<small>{left_out} more steps are in samples/.</small>" if left_out else "")


def _sample_bodies(path: Path) -> Iterable[str]:
    if path.suffix == ".png":
        return [image(path)]
    text = path.read_text(encoding="utf-8", errors="replace")
    cut = "\n… the rest is in the file" if len(text) > SAMPLE_CHARACTERS else ""
    samples = re.split(r"(?m)^-{3,}[ \t]*$", text[:SAMPLE_CHARACTERS] + cut)
    return [f"<pre>{escape(sample.strip(chr(10)))}</pre>" for sample in samples if sample.strip()]


def _config(run: Run) -> str:
    sections = {name: value for name, value in run.config.items() if isinstance(value, dict)}
    loose = {name: value for name, value in run.config.items() if not isinstance(value, dict)}
    parts = []
    for name, section in (({"general": loose} if loose else {}) | sections).items():
        fields = dict(_flat(section))
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td><code>{escape(_value(value))}</code></td></tr>"
            for key, value in fields.items()
        )
        parts.append(
            f'<details class="card" open><summary>{escape(name)}<span class="muted">{len(fields)}</span></summary>'
            f"<table>{rows}</table></details>"
        )
    return f'<div class="config">{"".join(parts)}</div>' if parts else ""


def _flat(section: dict, prefix: str = ""):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value(value) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _footer(run: Run) -> str:
    versions = mapping(run.facts.get("versions"))
    listed = " · ".join(f"{escape(name)} {escape(version)}" for name, version in versions.items())
    return f"<footer>{listed}<br>{escape(run.workdir)}</footer>"
