"""Multi-query associative recall: RWKV-7 and Mamba-2 solve what RWKV-4 of the same width and depth does not.

  python benchmarks/recall.py [--runs=FOLDER]    # trains what has not been trained there; then the table and the picture

The recipes' `recall`: 8 pairs of 32 keys and 32 values told and asked for in 33 tokens, two layers of 64, the same 800
batches of 32 rows for all. RWKV-4 is trained at three rates, of which the best counts. An answer is right if its value is
the most probable token after its key; 4,000 questions of 500 held-out rows. See jaxvram/data/memory_problems.py.
"""

import argparse
import json
import pathlib
import tempfile

from recurrent_runs import COLOURS, ROOT, built, command, finish, parameters, state_bytes

RUNS = {  # recipe, and the peak rates that are tried; None: the recipe's
    "RWKV-7": ("rwkv7.py:recall", (None,)),
    "Mamba-2": ("mamba2.py:recall", (None,)),
    "RWKV-4": ("rwkv4.py:recall", (1e-3, 3e-3, 1e-2)),
}
RESULT = ROOT / "benchmarks/results/recall.json"


def run(name: str, rate: float | None, folder: pathlib.Path) -> dict:
    config, changes = RUNS[name][0], {"optimizer.learning_rate": rate} if rate else {}
    recipe = built(config, changes)
    lines = finish(config, changes, folder / f"{config.replace('.py:', '-')}{f'-{rate:g}' if rate else ''}")
    accuracy = [[line["step"], line["accuracy"]] for line in lines if line.get("split") == "val"]
    return {
        "command": command(config, changes),
        "learning_rate": recipe.optimizer.learning_rate,
        "accuracy": accuracy,
        "final": accuracy[-1][1],
    }


def row_of(name: str, folder: pathlib.Path) -> dict:
    import dataclasses

    config, rates = RUNS[name]
    recipe = built(config, {})
    vocab_size = 2 * recipe.data.symbols + 1
    cfg = dataclasses.replace(recipe.model, vocab_size=vocab_size)
    tried = [run(name, rate, folder) for rate in rates]
    best = max(tried, key=lambda r: r["final"])
    return {
        "parameters": parameters(cfg)[0],
        "bytes_of_state": state_bytes(cfg, recipe.data.length),
        "accuracy": best["final"],
        "runs": sorted(tried, key=lambda r: r is not best),
    }


def draw(rows: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, row in rows.items():
        best, *others = row["runs"]
        for other in others:
            axes.plot(*zip(*other["accuracy"], strict=True), color=COLOURS[name], linewidth=1, alpha=0.45)
        label = f"{name}: {best['final']:.1%}"
        if others:
            label += " (best of three rates; thin: the others)"
        axes.plot(*zip(*best["accuracy"], strict=True), color=COLOURS[name], linewidth=1.8, label=label)
    axes.axhline(1 / 8, color="#999999", linewidth=1, linestyle=":", label="any of the eight values told: 12.5%")
    axes.set(xlabel="step (256 questions each)", ylabel="held-out questions answered", xlim=(0, None), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(fontsize=9, loc="center right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def table(rows: dict) -> str:
    lines = ["| | parameters | bytes of state | rate | questions answered | other rates |", "|---" * 6 + "|"]
    for name, row in rows.items():
        best, *others = row["runs"]
        tried = ", ".join(f"{r['learning_rate']:g}: {r['final']:.1%}" for r in others)
        cells = [name, f"{row['parameters']:,}", f"{row['bytes_of_state']:,}", f"{best['learning_rate']:g}"]
        lines.append("| " + " | ".join([*cells, f"{best['final']:.1%}", tried]) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "jaxvram-recurrent")
    parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "docs/recall.png")
    args = parser.parse_args()
    rows = {name: row_of(name, args.runs) for name in RUNS}
    RESULT.write_text(json.dumps({"questions": 4000, "models": rows}, indent=1) + "\n")
    draw(rows, args.picture)
    print(table(rows))


if __name__ == "__main__":
    main()
