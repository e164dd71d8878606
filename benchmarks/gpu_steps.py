"""Our train steps on the GPU of this machine: their time, and the peak beside what the compiled program says it needs.

  python benchmarks/gpu_steps.py                              # --minutes=8; the 12 GB default of every recipe
  python benchmarks/gpu_steps.py rwkv7:0.1b grok:8x124m       # these; the file keeps its other rows

The step that a run compiles, on random examples, each recipe in a process of its own (jaxvram/compare/measured_side.py),
with two microbatches a step at the most, as from the second on all are alike. benchmarks/gpu_memory.py has PyTorch beside
it, for models that have a twin. Rows go to benchmarks/results/gpu_steps_CARD.json as they come.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_memory import MOST_MICROBATCHES  # noqa: E402

KEPT = ("seconds_per_step", "peak_bytes", "peaks", "compiled_bytes", "owners", "outside_bytes")


def defaults() -> list[str]:
    """Of every recipe the variant that a 12 GB card gets."""
    from jaxvram import recipe

    found = []
    for file in sorted((ROOT / "configs").glob("*.py")):
        _, name, variant = recipe.load(str(file), for_card=True)
        found.append(f"{name}:{variant}")
    return found


def measure(name: str) -> dict:
    """Of one recipe; UserError where it does not fit or cannot run here."""
    from jaxvram import modes, recipe
    from jaxvram.compare import measured
    from jaxvram.vram import nvidia_smi

    file, _, variant = name.partition(":")
    built = recipe.build(*recipe.load(f"{ROOT / 'configs' / file}.py:{variant}"))
    rows = MOST_MICROBATCHES * built.train.microbatch_size
    if 0 < rows < built.train.batch_size:
        built = dataclasses.replace(built, train=dataclasses.replace(built.train, batch_size=rows))
    task = modes.make_task(built, with_data=False)
    built = dataclasses.replace(built, model=task.model.cfg)
    seen = nvidia_smi.look(measured.visible_gpu())
    protocol = {"way": "measured", "device": "cuda", "warm_up": measured.WARM_UP, "timed": measured.STEPS}
    found = measured.ask_ours(built, protocol, {}, seen, lambda line: None)
    units = built.train.batch_size * task.units_per_example
    shape = {"batch_size": built.train.batch_size, "microbatch_size": built.train.microbatch_size}
    per_second = units / found["seconds_per_step"]
    return {name: found.get(name) for name in KEPT} | shape | {"unit": task.unit, "units": units, "per_second": per_second}


def line(name: str, row: dict) -> str:
    if "failed" in row:
        return f"{name}: {row['failed']}"
    gib = {what: row[what] / 2**30 for what in ("peak_bytes", "compiled_bytes")}
    return (
        f"{name}: {row['per_second']:,.0f} {row['unit']} a second ({1e3 * row['seconds_per_step']:.0f} ms a step), peak "
        f"{gib['peak_bytes']:.2f} GiB, {gib['peak_bytes'] / gib['compiled_bytes']:.3f} of what was compiled"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--minutes", type=float, default=8.0, help="no recipe is begun after these")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    from jaxvram.quiet import quiet

    started = time.monotonic()
    with quiet():
        import jax
    jax.config.update("jax_platforms", "cpu")  # in this process: the card is for those that it starts
    from jaxvram.compare import measured
    from jaxvram.errors import UserError
    from jaxvram.vram import nvidia_smi

    seen = nvidia_smi.look(measured.visible_gpu()) if measured.on_gpu() else None
    if seen is None:
        print("error: there is no GPU to measure on here, or nvidia-smi does not know it", file=sys.stderr)
        return 2
    short = seen.name.removeprefix("NVIDIA ").removeprefix("GeForce ").lower().replace(" ", "")
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu_steps_{short}.json"
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    for name in args.recipes or defaults():
        if time.monotonic() - started > 60 * args.minutes:
            print(f"{name}: left out, {args.minutes} minutes are over", flush=True)
            continue
        try:
            rows[name] = measure(name)
        except UserError as error:
            rows[name] = {"failed": str(error)}
        print(line(name, rows[name]), flush=True)
        record = {"card": seen.name, "driver": seen.driver, "jax": jax.__version__, "rows": rows}
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(out)
    return 0 if not any("failed" in row for row in rows.values()) else 1


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
