"""Two or more sides of one benchmark, each in a process of its own, in short rounds that alternate in random order.

All start from the same weights and see the same batches, and nothing is timed unless their first losses agree. Ratios are
taken within a round, so that what slows a round down slows all sides. `others` is the processor time that went to anyone
else meanwhile: with more than a few per cent the figures are not worth much, as PyTorch's threads spin where XLA's sleep,
and either may lose by it.
"""

import json
import multiprocessing
import os
import pathlib
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable

COMPARED_STEPS = 10  # whose losses must agree before anything is timed
WARM_UP_STEPS = 20
SIDES = ("jaxvram", "torch", "torch fused")


def jaxvram_side(recipe, task, params):
    """`run(batches) -> losses`, with the train step that launch.py compiles.

    As the loop does: a step's metrics are read after the next one is dispatched.
    """
    from jaxvram.train.program import make_program
    from jaxvram.train.sharding import make_mesh, to_devices

    mesh = make_mesh(recipe.mesh)
    program = make_program(recipe, task, mesh)
    state = program.init(params)

    def run(batches):
        nonlocal state
        losses, pending = [], None
        for batch in batches:
            state, metrics = program.step(state, to_devices(batch, recipe.train.batch_size, mesh))
            if pending is not None:
                losses.append(float(pending["loss"]))
            pending = metrics
        return [*losses, float(pending["loss"])]

    return run


def serve(pipe, side: str, make: Callable):
    """One side in its own process: answers `(first batch, batches)` with seconds, processor seconds and losses.

    Args:
      make: (side, weights or None) -> (run, batch_of, weights to send to the others).
    """
    from jaxvram.host import keep_freed_memory

    if side == "jaxvram":
        keep_freed_memory()  # as launch.py does
        run, batch_of, weights = make(side, None)
        pipe.send(weights)
    else:
        run, batch_of, _ = make(side, pipe.recv())
    while (asked := pipe.recv()) is not None:
        first, count = asked
        batches = [batch_of(n) for n in range(first, first + count)]
        wall, own = time.perf_counter(), time.process_time()
        losses = run(batches)
        pipe.send((time.perf_counter() - wall, time.process_time() - own, losses))


def start(make: Callable):
    """A pipe to each side, all with the same weights."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, side, make), daemon=True).start()
    params = pipes["jaxvram"].recv()
    for side in SIDES[1:]:
        pipes[side].send(params)
    return pipes


def ask(pipe, first: int, count: int):
    """(seconds, processor seconds of the side, of anyone else, losses) of `count` steps."""
    before = busy_seconds()
    pipe.send((first, count))
    wall, own, losses = pipe.recv()
    return wall, own, max(0.0, busy_seconds() - before - own), losses


def busy_seconds() -> float:
    """Processor seconds that all processes of the machine have taken together; 0 where /proc does not tell."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def compare_losses(pipes, tolerance: float) -> dict[str, list[float]]:
    """The first losses of each side; stops the program unless they agree: weights, model, step and batches are the same."""
    losses = {side: ask(pipe, 0, COMPARED_STEPS)[-1] for side, pipe in pipes.items()}
    for side in SIDES[1:]:
        for step, (ours, theirs) in enumerate(zip(losses["jaxvram"], losses[side], strict=True)):
            if abs(ours - theirs) > tolerance * theirs:
                sys.exit(f"error: loss of step {step} is {ours:.7f} in jaxvram, {theirs:.7f} in {side}")
    first, last = losses["jaxvram"][0], losses["jaxvram"][-1]
    print(f"losses of {COMPARED_STEPS} steps agree: {first:.6f} ... {last:.6f}", flush=True)
    return losses


def measure(pipes, rounds: int, steps: int, pause: float):
    """Seconds a step of each side, own and others' processor seconds a step; one list entry a round."""
    names = ("wall", "own", "others")
    figures = {side: {name: [] for name in names} for side in SIDES}
    at = dict.fromkeys(SIDES, COMPARED_STEPS)
    for n in range(-1, rounds):
        count = min(WARM_UP_STEPS, 2 * steps) if n < 0 else steps
        for side in random.sample(SIDES, len(SIDES)):
            time.sleep(pause)
            *seconds, _ = ask(pipes[side], at[side], count)
            at[side] += count
            if n >= 0:
                for name, value in zip(names, seconds, strict=True):
                    figures[side][name].append(value / count)
    return figures


def summary(figures, units: int, unit: str) -> dict:
    """Medians, and the spread of jaxvram's speed over each PyTorch's, round by round."""
    table = {}
    for side, of in figures.items():
        ms = {name: round(1e3 * statistics.median(values), 2) for name, values in of.items()}
        share = statistics.median(o / (w * os.cpu_count()) for o, w in zip(of["others"], of["wall"], strict=True))
        table[side] = {
            "ms_a_step": ms["wall"],
            "ms_a_step_best": round(1e3 * min(of["wall"]), 2),
            f"{unit}_per_second": round(units / statistics.median(of["wall"]), 1),
            "own_cpu_ms_a_step": ms["own"],
            "others_share_of_cores": round(share, 3),
        }
        if side != "jaxvram":
            pairs = zip(of["wall"], figures["jaxvram"]["wall"], strict=True)
            ratios = sorted(theirs / ours for theirs, ours in pairs)
            low, median, high = statistics.quantiles(ratios, n=4)
            best = min(of["wall"]) / min(figures["jaxvram"]["wall"])
            table[side]["jaxvram_over_this"] = {
                "median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)], "best_round": round(best, 3),
            }  # fmt: skip
    return table


def machine() -> dict:
    """What the figures belong to."""
    from importlib.metadata import version

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch", "numpy")}
    return {
        "cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()], **versions,
    }  # fmt: skip


def print_table(table, unit: str) -> None:
    print(
        f"\n{'side':12s} {'ms/step':>8} {'best':>7} {f'{unit}/s':>9} {'own cpu ms':>11} {'others':>7}   jaxvram over it"
    )
    for side, row in table.items():
        ratio = row.get("jaxvram_over_this")
        words = ""
        if ratio:
            low, high = ratio["quartiles"]
            words = f"{ratio['median']:.2f} ({low:.2f} to {high:.2f}), best rounds {ratio['best_round']:.2f}"
        print(
            f"{side:12s} {row['ms_a_step']:8.2f} {row['ms_a_step_best']:7.2f} {row[f'{unit}_per_second']:9,.0f} "
            f"{row['own_cpu_ms_a_step']:11.2f} {row['others_share_of_cores']:7.1%}   {words}"
        )


def benchmark(make: Callable, args, about: dict, units: int, unit: str, tolerance: float) -> None:
    """Runs all sides, prints the table and writes `args.out`.

    Args:
      make: see `serve`.
      args: rounds, steps, pause, out.
      about: what is measured, for the result file.
      units: tokens or images a step, `unit` their name.
    """
    pipes = start(make)
    losses = compare_losses(pipes, tolerance)
    about = about | {"machine": machine(), f"{unit}_a_step": units, "steps_a_round": args.steps, "first_losses": losses}
    figures = measure(pipes, args.rounds, args.steps, args.pause)
    for pipe in pipes.values():
        pipe.send(None)
    table = summary(figures, units, unit)
    print_table(table, unit)
    rounds_ms = {side: [round(1e3 * wall, 2) for wall in of["wall"]] for side, of in figures.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(about | {"sides": table, "rounds_ms_a_step": rounds_ms}, indent=1) + "\n")
    print(f"\n{args.out}")


def arguments(parser, steps: int, out: pathlib.Path):
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=steps, help="of each side in a round")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between turns, for spinning threads to settle")
    parser.add_argument("--out", type=pathlib.Path, default=out)
    return parser.parse_args()
