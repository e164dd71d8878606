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
CARD = "rtx4070"
RESULTS = ROOT / "benchmarks" / "results" / f"memory_{CARD}.json"
PAGE, PICTURE = ROOT / "docs" / "memory.md", ROOT / "docs" / "memory.png"
BEGIN, END = "<!-- table: benchmarks/memory_table.py -->", "<!-- end -->"


def recipes() -> list[str]:
    """configs/NAME.py:VARIANT of every variant whose header says that it is for the card."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        header = path.read_text().split('"""')[1]
        found += [f"{path.stem}:{name}" for name in re.findall(r"^  ([\w.]+) .* RTX 4070 .* GiB", header, re.M)]
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
        return json.loads((pathlib.Path(folder) / "compare.json").read_text())


def table(records: dict) -> str:
    """The rows of the page: ours, PyTorch as it comes, and its leanest."""
    from jaxvram.compare.sides import OURS, at_once, best_of_torch
    from jaxvram.vram.cards import GIB

    lines = [
        "| recipe | at once | jaxvram | PyTorch eager | its leanest | which | of eager | of its leanest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, record in records.items():
        peak = lambda name, record=record: record["sides"].get(name, {}).get("peak_bytes")
        ours, eager, best = peak(OURS), peak("eager"), best_of_torch(record)
        gib = lambda count: "-" if count is None else f"{count / GIB:.2f}"
        ratio = lambda count, ours=ours: "-" if count is None else f"{ours / count:.2f}"
        least = None if best is None else peak(best)
        cells = [f"`{recipe}`", at_once(record), f"**{gib(ours)}**", gib(eager), gib(least), best or "-"]
        cells += [ratio(eager), ratio(least)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(records: dict) -> bytes:
    """Ours, PyTorch's leanest and PyTorch as it comes, a group a recipe."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaxvram.compare.sides import OURS, best_of_torch
    from jaxvram.vram import cards
    from jaxvram.vram.figures import BAD, GRID, INK

    figure = Figure(figsize=(11, 1.2 + 0.52 * len(records)), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.18, 0.8 / figure.get_figheight(), 0.78, 1 - 1.3 / figure.get_figheight()))
    for row, record in enumerate(records.values()):
        sides = record["sides"]
        shown = (("eager", "#d3d7de", "PyTorch, as it comes"), (best_of_torch(record), "#8a919e", "PyTorch, its leanest"))
        for name, colour, label in (*shown, (OURS, "#1d4f9e", "jaxvram")):
            if "peak_bytes" in sides.get(name, {}):
                gib = sides[name]["peak_bytes"] / cards.GIB
                axes.barh(row, gib, height=0.3 if name == OURS else 0.72, color=colour, label=label if row == 0 else None)
        axes.text(sides[OURS]["peak_bytes"] / cards.GIB, row, f" {sides[OURS]['peak_bytes'] / cards.GIB:.1f}", va="center")
    axes.axvline(cards.find(CARD).usable_bytes / cards.GIB, color=BAD)
    axes.set_yticks(range(len(records)), list(records), color=INK)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xlabel(f"GiB at the peak of a train step; the line: what a {CARD} has to use")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False)
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
    about = ", ".join(f"{name} {version}" for name, version in next(iter(records.values()))["versions"].items())
    text = f"{before}{BEGIN}\n{table(records)}\n\n{about}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(picture(records))
    print(f"{PAGE}: {len(records)} of {len(recipes())} rows")


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    sys.path.insert(0, str(ROOT))
    main()
