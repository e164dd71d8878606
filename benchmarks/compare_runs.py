"""The losses of several runs in one picture: training as a running mean, validation as points.

  python benchmarks/compare_runs.py runs/gpt2-tiny runs/mamba-tiny runs/mamba2-tiny --out=docs/mamba_tiny.png
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SMOOTHED = 3  # logged lines on either side


def main():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from jaxvram.train import metrics

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run in args.runs:
        lines = metrics.read(run)
        train = [(line["step"], line["loss"]) for line in lines if "split" not in line]
        val = [(line["step"], line["loss"]) for line in lines if line.get("split") == "val"]
        window = lambda i, train=train: [loss for _, loss in train[max(0, i - SMOOTHED) : i + SMOOTHED + 1]]
        means = [sum(window(i)) / len(window(i)) for i in range(len(train))]
        (curve,) = axes.plot([step for step, _ in train], means, label=run.name, linewidth=1.2)
        axes.plot(*zip(*val, strict=True), "o", color=curve.get_color(), markersize=4)
        print(f"{run.name}: training {means[-1]:.3f}, validation {val[-1][1]:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats a token (points: held out)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
