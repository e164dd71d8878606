"""The plan against the card: both sides of recipes measured on the GPU of this machine, under 9 minutes.

  python benchmarks/gpu_memory.py                          # --minutes=8.5; the most telling recipes first
  python benchmarks/gpu_memory.py --only=gpt2 --again      # the rows of one recipe, also if they are there already
  python benchmarks/gpu_memory.py --torch-python=TORCH/bin/python

Each row is `--mode=compare --measure` of a recipe for a 12 GB card, with a step of two microbatches at the most: from the
second on, all are alike in memory. Rows are kept in benchmarks/results/gpu_memory_CARD.json as they come, and the same
command goes on with those that are not there. No row is begun that would take longer than is left if it took as long as
the longest so far; one that takes longer all the same is ended.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from memory_table import command, recipes  # noqa: E402

FIRST = ("gpt2:124m", "llama_qlora:7b", "dit:b2", "mamba2:130m", "gpt2:xl", "llama_lora:1b", "mamba:130m")
MOST_MICROBATCHES = 2


def in_order(found: list[str]) -> list[str]:
    """The most telling first: of every kind of model one, of every kind of optimizer and base one."""
    return [name for name in FIRST if name in found] + [name for name in found if name not in FIRST]


def rows(todo: list[str], seconds: float, measure: Callable, clock=time.monotonic) -> Iterator[tuple[str, dict]]:
    """(recipe, its record) of as many as end in time.

    Args:
      measure: (recipe, seconds that are left) -> record.
    """
    start, longest = clock(), 0.0
    for recipe in todo:
        began = clock()
        left = seconds - (began - start)
        if left <= longest:
            return
        record = measure(recipe, left)
        longest = max(longest, clock() - began)
        yield recipe, record | {"seconds": round(clock() - began, 1)}


def measure(recipe: str, seconds: float, torch_python: str | None = None) -> dict:
    """The record of `--mode=compare --measure`, or {"failed": why in a line}."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        asked = command(recipe, folder, torch_python, "--measure", *_smaller(recipe))
        # A session of its own: whatever runs on the card for it ends with it.
        process = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in the {seconds:.0f} s that were left"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status == 0:
            return json.loads((pathlib.Path(folder) / "compare_measured.json").read_text())
        from jaxvram.compare.child import last_word

        said.seek(0)
        return {"failed": last_word([line.strip() for line in said]) or f"status {status}, without a word"}


def _smaller(recipe: str) -> list[str]:
    """The override that leaves a step two microbatches, where it has more."""
    from jaxvram.recipe import load

    name, _, variant = recipe.partition(":")
    train = load(f"{ROOT / 'configs' / name}.py:{variant}")[0].train
    rows = MOST_MICROBATCHES * train.microbatch_size
    return [f"--config.train.batch_size={rows}"] if 0 < rows < train.batch_size else []


def reserve(record: dict) -> dict[str, int]:
    """Bytes: beyond the plan within JAX's allocator, outside of it, the reserve in use, and the one that would follow."""
    beyond = record["sides"]["jaxvram"]["peak_bytes"] - record["planned_bytes"]
    outside = record["sides"]["jaxvram"]["outside_bytes"]
    kept_from_jax = round((1 - record["memory_fraction"]) * record["capacity_bytes"])
    follows = None if outside is None else max(outside, kept_from_jax) + max(0, beyond)
    in_use = record["capacity_bytes"] - record["usable_bytes"]
    return {"beyond": beyond, "outside": outside, "in_use": in_use, "follows": follows}


def table(records: dict[str, dict]) -> str:
    """Markdown: what was measured, the error of the plan, and PyTorch at its leanest and at its fastest."""
    from jaxvram.compare.measured_table import is_of_steps
    from jaxvram.compare.sides import at_once, best_of_torch, fastest_of_torch
    from jaxvram.vram.cards import GIB

    gib = lambda count: "-" if count is None else f"{count / GIB:.2f}"
    lines = [
        "| recipe | at once | planned | measured | of the plan | outside | reserve | PyTorch's leanest | of it | /s "
        "| times PyTorch's fastest |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, record in records.items():
        if "failed" in record:
            lines.append(f"| `{recipe}` | {record['failed']} |" + " |" * 9)
            continue
        sides, ours = record["sides"], record["sides"]["jaxvram"]
        cells = [f"`{recipe}`", at_once(record), gib(record.get("planned_bytes"))]
        cells.append(("" if is_of_steps(ours) else "at most ") + gib(ours["peak_bytes"]))
        if "planned_bytes" in record:
            cells.append(f"{ours['peak_bytes'] / record['planned_bytes']:.3f}")
            cells += [gib(ours["outside_bytes"]), gib(reserve(record)["follows"])]
        else:
            cells += ["-", gib(ours["outside_bytes"]), "-"]
        if best := best_of_torch(record, eight_bit=False):  # the recipe's own optimizer on both sides
            leanest, fastest = sides[best]["peak_bytes"], sides[fastest_of_torch(record)]["per_second"]
            cells += [f"{gib(leanest)} ({best})", f"{ours['peak_bytes'] / leanest:.2f}"]
            cells += [f"{ours['per_second']:,.0f} {record['unit']}", f"{ours['per_second'] / fastest:.2f}"]
        else:
            cells += ["-", "-", f"{ours['per_second']:,.0f} {record['unit']}", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(records: dict[str, dict]) -> str:
    """What the rows say of the plan and of the reserve (jaxvram/vram/cards.py)."""
    from jaxvram.vram.cards import CONTEXT_BYTES, GIB

    compared = {name: record for name, record in records.items() if "planned_bytes" in record}
    if not compared:
        return "no row has both a plan and a measurement: nothing can be said of the reserve"
    errors = {name: r["sides"]["jaxvram"]["peak_bytes"] / r["planned_bytes"] - 1 for name, r in compared.items()}
    worst = max(errors, key=lambda name: abs(errors[name]))
    lines = [f"The plan is off by {errors[worst]:+.1%} at the most ({worst})."]
    bytes_of = {name: reserve(record) for name, record in compared.items()}
    known = {name: b for name, b in bytes_of.items() if b["follows"] is not None}
    if not known:
        return f"{lines[0]} nvidia-smi does not tell what the card has in use: no reserve follows."
    most = max(known, key=lambda name: known[name]["follows"])
    outside = max(b["outside"] for b in known.values())
    lines.append(
        f"Reserve in use {known[most]['in_use'] / GIB:.2f} GiB; it would be {known[most]['follows'] / GIB:.2f} ({most}: "
        f"{known[most]['beyond'] / GIB:+.2f} beyond the plan). Outside JAX's allocator lie up to {outside / GIB:.2f}, for "
        f"which CONTEXT_BYTES allows {CONTEXT_BYTES / GIB:.2f}."
    )
    return " ".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--only", default="", help="recipes that begin so")
    parser.add_argument("--again", action="store_true", help="rows that are there, too")
    parser.add_argument("--torch-python")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    from jaxvram.quiet import quiet

    started = time.monotonic()
    with quiet():
        import jax
    jax.config.update("jax_platforms", "cpu")  # in this process: the card is for those that it starts
    from jaxvram.compare.measured import on_gpu, visible_gpu
    from jaxvram.vram import nvidia_smi

    seen = nvidia_smi.look(visible_gpu()) if on_gpu() else None
    if seen is None:
        print("error: there is no GPU to measure on here, or nvidia-smi does not know it", file=sys.stderr)
        return 2
    short = seen.name.removeprefix("NVIDIA ").removeprefix("GeForce ").lower().replace(" ", "")
    out = args.results / f"gpu_memory_{short}.json"
    records = json.loads(out.read_text())["rows"] if out.exists() else {}
    is_there = lambda recipe: recipe in records and "failed" not in records[recipe]
    todo = [name for name in in_order(recipes()) if name.startswith(args.only) and (args.again or not is_there(name))]
    one = lambda recipe, left: measure(recipe, left, args.torch_python)
    done = []
    for recipe, record in rows(todo, 60 * args.minutes - (time.monotonic() - started), one):
        records[recipe] = record
        done.append(recipe)
        versions = next((r["versions"] for r in reversed(records.values()) if "versions" in r), {})
        about = {"card": seen.name, "driver": seen.driver, "versions": versions}
        out.write_text(json.dumps(about | {"rows": records}, indent=1) + "\n")
        print(f"{recipe}: {record.get('failed', 'measured')}, {record['seconds']} s", flush=True)
    if left_out := todo[len(done) :]:
        print(f"left out, as {args.minutes} minutes are over: {', '.join(left_out)}")
    print(f"\n{seen.name}, driver {seen.driver}; GiB\n\n{table(records)}\n\n{verdict(records)}\n\n{out}")
    return 0 if all("failed" not in records[recipe] for recipe in done) else 1


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
