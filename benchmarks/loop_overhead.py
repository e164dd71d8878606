"""What the training loop adds to a train step: the loop beside its own jitted step on batches that wait ready made.

  python benchmarks/loop_overhead.py [--rounds=10] [--steps=120] [--out=benchmarks/results/loop_overhead.json]

Both sides run the `cpu` recipe of nanogpt_shakespeare in turns, in one process; a machine that gets faster or slower
does so for both. The bare side waits for a step after the next is dispatched, as the loop does, and does nothing else.
Evaluation, checkpoints and the report are not a step's and are not timed.
"""

import argparse
import io
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WARM_UP = 20  # steps of each round that are not counted


class Clock:
    """The jitted step, with the moment of each dispatch noted."""

    def __init__(self, step):
        self.step, self.marks = step, []

    def __call__(self, state, batch):
        self.marks.append((time.perf_counter(), time.thread_time()))
        return self.step(state, batch)

    def median_ms(self) -> tuple[float, float]:
        """(wall, processor time of this thread) from one dispatch to the next; forgets them."""
        marks, self.marks = self.marks[WARM_UP:], []
        gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
        return tuple(1e3 * statistics.median(column) for column in zip(*gaps, strict=True))


def run(rounds: int, steps: int) -> dict:
    from jaxvram import host

    host.keep_freed_memory()
    import jax

    host.keep_compiled_programs()
    from jaxvram import recipe
    from jaxvram.modes import make_task
    from jaxvram.train.loop import Loop
    from jaxvram.train.sharding import to_devices

    config, name, variant = recipe.load(f"{ROOT / 'configs/nanogpt_shakespeare.py'}:cpu")
    config.train.steps, config.eval.batches, config.checkpoint.best = steps, 1, False
    config.eval.every, config.sample.max_new_tokens = 0, 1
    built = recipe.build(config, name, variant)
    task = make_task(built)
    walls, threads = {"bare": [], "loop": []}, {"bare": [], "loop": []}
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(built, task, pathlib.Path(folder) / "0", io.StringIO())
        program, size = loop.program, built.train.batch_size
        ready = [to_devices(task.source.batch("train", i, size), size, program.mesh) for i in range(steps)]
        clock = program.step = Clock(program.step)

        def bare():
            state, before = program.init(), None
            for batch in ready:
                state, metrics = clock(state, batch)
                if before is not None:
                    before["loss"].block_until_ready()
                before = metrics
            before["loss"].block_until_ready()

        def looped(number):
            again = Loop(built, task, pathlib.Path(folder) / str(number), io.StringIO())
            again.program, again.evaluator = program, loop.evaluator  # compiled once
            again.run()

        for number in range(1, rounds + 2):
            for side, go in (("bare", bare), ("loop", lambda number=number: looped(number))):
                go()
                wall, thread = clock.median_ms()
                if number > 1:  # the first round compiles
                    walls[side].append(wall)
                    threads[side].append(thread)
                    print(f"round {number - 1} {side}: {wall:.2f} ms a step, this thread {thread:.2f} ms", flush=True)
    ratios = sorted(b / a for a, b in zip(walls["bare"], walls["loop"], strict=True))
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "steps": steps,
        "step_ms": {side: statistics.median(values) for side, values in walls.items()},
        "main_thread_ms": {side: statistics.median(values) for side, values in threads.items()},
        "loop_over_bare": {"median": statistics.median(ratios), "all": ratios},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/loop_overhead.json"))
    options = parser.parse_args()
    result = run(options.rounds, options.steps)
    pathlib.Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    ratio = result["loop_over_bare"]
    print(f"loop over bare step: {ratio['median']:.4f} (rounds {ratio['all'][0]:.3f} to {ratio['all'][-1]:.3f})")
