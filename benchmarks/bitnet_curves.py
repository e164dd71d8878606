"""Trains a BitNet and a Llama of equal size on the offline text, and draws both losses: docs/bitnet_curves.png.

  python benchmarks/bitnet_curves.py [--steps=500] [--only='BitNet b1.58']          # some 10 minutes on 2 cores

The same batches, seed, widths, starting deviation, rate, schedule (two stages, decay up to halfway) and optimizer; `subln`
has two norms a layer more.
Losses are kept in benchmarks/results/bitnet_curves.json; with --only the other side's are those of before.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxvram import modes  # noqa: E402
from jaxvram import recipe as recipes  # noqa: E402
from jaxvram.models.llama import LlamaConfig  # noqa: E402
from jaxvram.train import metrics  # noqa: E402
from jaxvram.train.loop import Loop  # noqa: E402

SIZE = {"vocab_size": 0, "block_size": 128, "n_layer": 4, "n_embd": 128, "n_inner": 384, "n_head": 4, "n_kv_head": 4}
SIDES = {"full precision": ("llama", 4e-3, 0.09), "BitNet b1.58": ("subln", 4e-3, 0.09)}  # norms, rate, init_std
RESULTS = ROOT / "benchmarks/results/bitnet_curves.json"
LAST = 50  # steps whose mean is the final loss


def recipe_of(kind: str, learning_rate: float, init_std: float, steps: int):
    """configs/bitnet.py:tiny, on characters, a little larger; or a Llama of that size."""
    config, name, variant = recipes.load(f"{ROOT}/configs/bitnet.py:tiny")
    config.model.update(SIZE, init_std=init_std)
    config.data.tokenizer = "char"
    config.optimizer.update(learning_rate=learning_rate, warmup_steps=min(50, steps // 4))
    config.train.update(steps=steps, batch_size=16, log_every=1)
    config.eval.update(every=0, batches=40)
    config.checkpoint.best = False
    config.sample.update(max_new_tokens=1, num_samples=1)
    built = recipes.build(config, name, variant)
    if kind == "llama":
        fields = {field.name: getattr(built.model, field.name) for field in dataclasses.fields(LlamaConfig)}
        return dataclasses.replace(built, model=LlamaConfig(**fields))
    return dataclasses.replace(built, model=dataclasses.replace(built.model, norms=kind))


def train(kind: str, learning_rate: float, init_std: float, steps: int) -> dict:
    """Training losses, their last mean, and the loss on held-out text after the last step."""
    recipe = recipe_of(kind, learning_rate, init_std, steps)
    with tempfile.TemporaryDirectory() as folder:
        held_out = Loop(recipe, modes.make_task(recipe), pathlib.Path(folder) / "run").run()
        lines = metrics.read(pathlib.Path(folder) / "run")
    losses = [round(line["loss"], 4) for line in lines if "split" not in line]
    found = {"learning_rate": learning_rate, "init_std": init_std, "last": round(statistics.fmean(losses[-LAST:]), 4)}
    return found | {"held_out": round(held_out["loss"], 4), "losses": losses}


def draw(curves: dict, out: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, found in curves.items():
        losses, held_out = found["losses"], found["held_out"]
        window = max(1, len(losses) // 50)
        smooth = [statistics.fmean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]
        axes.plot(range(1, len(losses) + 1), smooth, label=f"{name}: {held_out:.3f} held out")
    axes.axvline(len(losses) / 2, color="0.7", linewidth=1, linestyle=":")
    axes.set(xlabel="step (dotted: the second stage begins)", ylabel="training loss, nats a character", ylim=(None, 3.2))
    axes.legend(frameon=False)
    figure.savefig(out, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs/bitnet_curves.png")
    options = parser.parse_args()
    curves = json.loads(RESULTS.read_text()) if options.only else {}
    for name in [options.only] if options.only else SIDES:
        curves[name] = train(*SIDES[name], options.steps)
        print(name, {key: value for key, value in curves[name].items() if key != "losses"}, flush=True)
        jax.clear_caches()
    RESULTS.write_text(json.dumps(curves) + "\n")
    draw(curves, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
