"""The `tiny` recipes of GPT-2 and of all recurrent models on the same batches, with as many parameters: curves and a table.

  python benchmarks/recurrent_tiny.py [--runs=FOLDER] [--only=GPT-2 --only=Mamba]   # trains those that have not been
  python benchmarks/recurrent_tiny.py --time                                      # processor time of a step as well

The recipes agree on text, vocabulary, seed, batch (8 x 64 tokens), steps, peak rate and its schedule. MODELS has what makes
their sizes agree, too: a head of its own for those that would share it with the table, and as many layers of 64 channels as
come nearest to 130,000 parameters beside the two. Adam's b2, eps and what decays are each author's, as the recipes have
them. The time of a step is the processor's (all threads), of steps in turns, so that other jobs slow all sides alike.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

from recurrent_runs import COLOURS, ROOT, built, command, finish, parameters

UNTIED = {"model.tie_head": False}
PLAIN = {"task.l2wrap": 0.0}  # cross-entropy alone, for all
MODELS = {  # by name: recipe, and what it is changed in
    "GPT-2": ("gpt2.py:tiny", UNTIED | {"model.n_layer": 3}),
    "Mamba": ("mamba.py:tiny", UNTIED | {"model.n_layer": 4}),
    "Mamba-2": ("mamba2.py:tiny", UNTIED),
    "RetNet": ("retnet.py:tiny", UNTIED),
    "RWKV-4": ("rwkv4.py:tiny", PLAIN | {"model.n_layer": 2}),
    "RWKV-6": ("rwkv6.py:tiny", PLAIN | {"model.n_layer": 2}),
    "RWKV-7": ("rwkv7.py:tiny", PLAIN | {"model.n_layer": 2}),
}
ROUNDS, STEPS_A_ROUND = 7, 3
RUNS = pathlib.Path(tempfile.gettempdir()) / "jaxvram-recurrent"
RESULT = ROOT / "benchmarks/results/recurrent_tiny.json"


def folder_of(name: str, runs: pathlib.Path) -> pathlib.Path:
    return runs / MODELS[name][0].replace(".py:", "-")


def check_equal(recipes: dict) -> None:
    """Exits unless all learn the same batches, as long, at one rate."""
    seen = {}
    for name, r in recipes.items():
        data = dataclasses.replace(r.data, fineweb_shards=1)  # which nobody reads here
        rates = (
            r.optimizer.learning_rate,
            r.optimizer.schedule,
            r.optimizer.warmup_steps,
            r.optimizer.final_lr_fraction,
        )
        seen[str((data, r.train, r.eval, rates, r.model.block_size, r.model.vocab_size))] = name
    if len(seen) > 1:
        raise SystemExit("these recipes do not agree:\n" + "\n".join(f"{name}: {what}" for what, name in seen.items()))


def row_of(name: str, r, runs: pathlib.Path) -> dict:
    lines = finish(*MODELS[name], folder_of(name, runs))
    total, of_layers = parameters(r.model)
    return {
        "command": command(*MODELS[name]),
        "parameters": total,
        "parameters_of_layers": of_layers,
        "layers": r.model.n_layer,
        "train": [[line["step"], line["loss"]] for line in lines if "split" not in line],
        "val": [[line["step"], line["loss"]] for line in lines if line.get("split") == "val"],
    }


def processor_seconds(recipes: dict) -> dict[str, float]:
    """Of a train step, by model: the median of ROUNDS turns, all threads."""
    import jax

    from jaxvram.modes import make_task
    from jaxvram.train.program import make_program
    from jaxvram.train.sharding import make_mesh, to_devices

    sides, taken = {}, {name: [] for name in recipes}
    for name, r in recipes.items():
        task, mesh = make_task(r), make_mesh(r.mesh)
        program = make_program(r, task, mesh)
        batch = to_devices(task.source.batch("train", 0, r.train.batch_size), r.train.batch_size, mesh)
        state, _ = program.step(program.init(), batch)
        sides[name] = [program.step, jax.block_until_ready(state), batch]
    for _ in range(ROUNDS):
        for name, side in sides.items():
            step, state, batch = side
            begun = time.process_time()
            for _ in range(STEPS_A_ROUND):
                state, _ = step(state, batch)
            side[1] = jax.block_until_ready(state)
            taken[name].append((time.process_time() - begun) / STEPS_A_ROUND)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def draw(rows: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["val"][-1][1]):
        style = {"color": COLOURS[name], "linestyle": "--" if name == "GPT-2" else "-"}
        axes.plot(*zip(*row["train"], strict=True), label=f"{name}: {row['val'][-1][1]:.2f}", linewidth=1.3, **style)
        axes.plot(*zip(*row["val"], strict=True), "o", color=COLOURS[name], markersize=5)
    axes.set(xlabel="step (512 tokens each, the same for all)", ylabel="loss, nats a token", xlim=(0, None))
    axes.legend(title="held out, at the end (points)", fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def table(rows: dict) -> str:
    lines = [
        "| | layers | parameters | of them in layers | val at 100 | at 200 | CPU s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        val, seconds = dict(map(tuple, row["val"])), row.get("processor_seconds_a_step")
        cells = [name, row["layers"], f"{row['parameters']:,}", f"{row['parameters_of_layers']:,}"]
        cells += [f"{val[100]:.3f}", f"{val[200]:.3f}", f"{seconds:.2f}" if seconds else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=pathlib.Path, default=RUNS)
    parser.add_argument("--only", action="append", choices=MODELS, help="train this one alone, and draw nothing")
    parser.add_argument("--time", action="store_true", help="measure the processor time of a step")
    parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "docs/recurrent_tiny.png")
    args = parser.parse_args()
    recipes = {name: built(*of_name) for name, of_name in MODELS.items()}
    check_equal(recipes)
    rows = {name: row_of(name, recipes[name], args.runs) for name in args.only or MODELS}
    if args.only:
        return
    before = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
    seconds = processor_seconds(recipes) if args.time else {}
    for name, row in rows.items():
        row["processor_seconds_a_step"] = seconds.get(name, before.get(name, {}).get("processor_seconds_a_step"))
    RESULT.write_text(json.dumps({"tokens_a_step": 512, "models": rows}, indent=1) + "\n")
    draw(rows, args.picture)
    print(table(rows))


if __name__ == "__main__":
    main()
