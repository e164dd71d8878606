"""docs/memory.md: the train step of every recipe for a 12 GB card beside PyTorch's, planned, and its picture.

  python benchmarks/memory_table.py                       # needs torch and its libraries; about a minute a row
  python benchmarks/memory_table.py --only=gpt2 --again   # the rows of one recipe, also if they are there already
  python benchmarks/memory_table.py --torch-python=TORCH/bin/python

Rows are kept in benchmarks/results/memory_rtx4070.json as they come, so that an interrupted run goes on; the page is made of
what is there. How both sides are planned, and what neither sees: the page says it.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":  # others import this, and measure on a GPU
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}

from jaxvram.compare.pytorch_side import without_twin  # noqa: E402
from jaxvram.compare.sides import OURS, at_once, best_of_torch, is_ours, label, like, unexplained  # noqa: E402
from jaxvram.recipe import build, load  # noqa: E402
from jaxvram.vram.cards import GIB  # noqa: E402

CARD = "rtx4070"
RESULTS = ROOT / "benchmarks" / "results" / f"memory_{CARD}.json"
PAGE, PICTURE = ROOT / "docs" / "memory.md", ROOT / "docs" / "memory.png"
STATE = ("parameters", "frozen parameters", "weight average", "optimizer state", "gradients")
GOAL = 0.5  # of PyTorch's leanest
WIDEST = 45  # GiB that the picture shows
BEGIN, END = "<!-- table: benchmarks/memory_table.py -->", "<!-- end -->"


def recipes() -> list[str]:
    """configs/NAME.py:VARIANT of every variant whose header says that it is for the card, if PyTorch has its like."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        header = path.read_text().split('"""')[1]
        for name in re.findall(r"^  ([\w.]+) .* RTX 4070 .* GiB", header, re.M):
            recipe = build(*load(f"{path}:{name}"))
            found += [] if without_twin(recipe.model, recipe.finetune) else [f"{path.stem}:{name}"]
    return found


def command(recipe: str, folder: str, torch_python: str | None, *options: str) -> list[str]:
    """`--mode=compare` of a recipe, whose files go into `folder`."""
    name, _, variant = recipe.partition(":")
    words = [sys.executable, str(ROOT / "launch.py"), f"--config={ROOT / 'configs' / name}.py:{variant}"]
    words += ["--mode=compare", f"--workdir={folder}", *options]
    return words + ([f"--torch-python={torch_python}"] if torch_python else [])


def compare(recipe: str, torch_python: str | None) -> dict:
    """The record of `--mode=compare`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command(recipe, folder, torch_python, f"--card={CARD}"), check=True, stdout=subprocess.DEVNULL)
        record = json.loads((pathlib.Path(folder) / "compare.json").read_text())
    if missing := unexplained(record):
        sys.exit(f"error: {recipe}: PyTorch's model has {missing:+,} parameters, and nobody says why")
    for name, side in record["sides"].items():
        if is_ours(name):
            side["largest"] = [b for b in side["largest"] if b["owner"] not in STATE][:3]
    return record


def table(records: dict) -> str:
    """The rows of the page: PyTorch as it comes, its leanest, ours; then both with 8-bit AdamW."""
    lines = [
        "| recipe | at once | PyTorch eager | its leanest | jaxvram | of eager | of its leanest "
        "| 8-bit AdamW: PyTorch | jaxvram | ratio |",
        f"|{'---|' * 10}",
    ]
    for recipe, record in records.items():
        peak = lambda name, record=record: record["sides"].get(name, {}).get("peak_bytes")
        gib = lambda count: "-" if count is None else f"{count / GIB:.2f}"
        ratio = lambda a, b: "-" if None in (a, b) else f"{a / b:.2f}"
        ours, eager = peak(OURS), peak("eager")
        best, best_8bit = (peak(best_of_torch(record, eight_bit)) for eight_bit in (False, True))
        in_8bit = best_8bit and like(record, "8bit")["peak_bytes"]  # the first itself, of a recipe that is in 8 bits
        cells = [f"`{recipe}`", at_once(record), gib(eager), gib(best), f"**{gib(ours)}**", ratio(ours, eager)]
        cells += [ratio(ours, best), gib(best_8bit), gib(in_8bit), ratio(in_8bit, best_8bit)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reasons(records: dict) -> str:
    """Of each row over half of PyTorch's leanest: what we hold beyond the state, which both sides must."""
    lines = []
    for recipe, record in records.items():
        best = best_of_torch(record)
        if best is None:
            continue
        ours, theirs = like(record, best), record["sides"][best]
        ratio = ours["peak_bytes"] / theirs["peak_bytes"]
        if ratio <= GOAL:
            continue
        rest = ours["largest"][0]
        lines.append(
            f"- `{recipe}`, {ratio:.2f} of {label(best)}: {_held(ours)} are state, {_held(theirs)} there; our largest "
            f"buffer beside it: {rest['bytes'] / GIB:.2f} GiB, {rest['shape']}, {rest['owner']}."
        )
    return "\n".join(lines)


def _held(side: dict) -> str:
    return f"{sum(side['owners'].get(owner, 0) for owner in STATE) / GIB:.2f} of {side['peak_bytes'] / GIB:.2f} GiB"


def picture(records: dict) -> bytes:
    """Ours, PyTorch's leanest and PyTorch as it comes, a group a recipe."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaxvram.vram import cards
    from jaxvram.vram.figures import BAD, GRID, INK

    figure = Figure(figsize=(11, 1.2 + 0.4 * len(records)), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.19, 0.7 / figure.get_figheight(), 0.78, 1 - 1.2 / figure.get_figheight()))
    drawn = set()
    for row, record in enumerate(records.values()):
        leanest = best_of_torch(record, eight_bit=False)
        shown = (("eager", "#d3d7de", "PyTorch, as it comes"), (leanest, "#8a919e", "PyTorch, its leanest"))
        for name, colour, text in (*shown, (OURS, "#1d4f9e", "jaxvram")):
            if "peak_bytes" not in record["sides"].get(name, {}):
                continue
            gib = record["sides"][name]["peak_bytes"] / GIB
            height, text_once = 0.36 if name == OURS else 0.8, None if text in drawn else text
            axes.barh(row, min(gib, WIDEST), height=height, color=colour, label=text_once)
            drawn.add(text)
            if gib > WIDEST:
                axes.text(WIDEST, row, f"{gib:.0f} \u2192 ", va="center", ha="right", fontsize=9)
        ours = record["sides"][OURS]["peak_bytes"] / GIB
        axes.text(ours, row, f" {ours:.1f}", va="center", fontsize=9)
    axes.axvline(cards.find(CARD).usable_bytes / GIB, color=BAD)
    axes.set_yticks(range(len(records)), list(records), color=INK)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xlim(0, WIDEST)
    axes.set_xlabel(f"GiB at the peak of a train step, the same optimizer on both sides; the line: what a {CARD} has to use")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="recipes that begin so")
    parser.add_argument("--again", action="store_true", help="rows that are there, too")
    parser.add_argument("--torch-python")
    args = parser.parse_args()
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for recipe in recipes():
        if recipe.startswith(args.only) and (args.again or recipe not in records):
            print(recipe, flush=True)
            records[recipe] = compare(recipe, args.torch_python)
            RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    records = {recipe: records[recipe] for recipe in recipes() if recipe in records}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    versions = {}
    for record in records.values():
        for name, version in record["versions"].items():
            versions.setdefault(name, {})[version] = None
    about = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
    text = f"{before}{BEGIN}\n{table(records)}\n\n{about}\n\n{reasons(records)}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(picture(records))
    print(f"{PAGE}: {len(records)} of {len(recipes())} rows")


if __name__ == "__main__":
    main()
