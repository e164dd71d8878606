"""What init, train step and sampling of a recipe need on a card: as a table, plan.json and plan.png.

A plan is the compiler's answer, not a measurement: it compiles the very programs that a run would, and adds up
arguments + temporaries + outputs - outputs that lie where a donated argument was.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import jax

from jaxvram.errors import UserError
from jaxvram.train.average import with_average
from jaxvram.train.program import make_functions
from jaxvram.vram import cards, figures
from jaxvram.vram.bill import make_bill
from jaxvram.vram.cards import Card, size
from jaxvram.vram.compile import compile_for

LARGEST = 30  # buffers listed in plan.json
SHOWN = 6  # of them on the terminal: of those that the program makes


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes it is compiled for."""

    fn: Callable  # of arrays; `state` as a parameter's name is left out of buffers' names
    args: tuple = ()  # pytrees of ShapeDtypeStruct
    donate_argnums: tuple[int, ...] = ()
    from_host_bytes: int = 0  # of the arguments, those that lie on the host while a run trains


def choose_card(name: str | None) -> Card:
    """The card of that name; without a name, the GPU of this machine."""
    if name:
        return cards.find(name)
    card = cards.local_card()
    if card is None:
        raise UserError(
            "this machine has no NVIDIA GPU to plan for; name a card: --card=rtx4070 (--card=list shows all)"
        )
    return card


def programs(recipe, task) -> dict[str, Program]:
    """The three programs of a run, on one card.

    Args:
      recipe: a Recipe; its optimizer, train and sample sections are read.
      task: a task of known shapes; needs no data.
    """
    functions = make_functions(recipe, task)
    batch, state = task.batch_spec(recipe.train.batch_size), jax.eval_shape(functions.init)
    # Frozen weights come from a folder, the others from the seed.
    init = Program(functions.load, (state.frozen,), (0,)) if state.frozen else Program(lambda: functions.init())
    evaluated, moved = state.eval_params, 0
    if recipe.train.ema_on_host:
        evaluated = with_average(recipe.train, state).eval_params
        moved = sum(4 * x.size for x in jax.tree.leaves(state.params))
    return {
        "init": init,
        "train": Program(functions.step, (state, batch), (0,)),
        "sample": Program(*task.sampling(evaluated), from_host_bytes=moved),
    }


def make_plan(programs: dict[str, Program], card: Card, progress: Callable[[str], None] = lambda _: None) -> dict:
    """plan.json of these programs on `card`.

    Args:
      programs: by name, usually init, train, sample.
      progress: called with a line before each compilation.
    Returns:
      card, gpu (NVIDIA's name), capacity_bytes, reserved_bytes, jax (version); for each program argument_bytes,
      temporary_bytes, output_bytes, aliased_bytes, peak_bytes, fits, matmul_flops, largest (name, bytes, shape, source,
      owner of the largest buffers at the peak) and owners (bytes of each at the peak, which they add up to).
    """
    plan = {
        "card": card.name,
        "gpu": card.description,
        "capacity_bytes": card.capacity_bytes,
        "reserved_bytes": card.reserved_bytes,
        "jax": jax.__version__,
    }
    for name, program in programs.items():
        progress(f"compiling {name} for {card.description}")
        compiled = compile_for(card, program.fn, program.args, program.donate_argnums)
        bill = make_bill(compiled)
        plan[name] = {
            "argument_bytes": compiled.argument_bytes,
            "temporary_bytes": compiled.temporary_bytes,
            "output_bytes": compiled.output_bytes,
            "aliased_bytes": compiled.aliased_bytes,
            "peak_bytes": compiled.peak_bytes,
            "from_host_bytes": program.from_host_bytes,
            "fits": compiled.peak_bytes <= card.usable_bytes,
            "matmul_flops": compiled.matmul_flops,
            "largest": bill.largest(LARGEST),
            "owners": bill.owners,
        }
    return plan


def write(plan: dict, workdir: str | os.PathLike) -> list[pathlib.Path]:
    """plan.json and plan.png in `workdir`, which is made if need be; their paths."""
    return write_files(workdir, {"plan.json": json.dumps(plan, indent=2).encode(), "plan.png": figures.png(plan)})


def write_files(workdir: str | os.PathLike, contents: dict[str, bytes]) -> list[pathlib.Path]:
    """Files of these names in `workdir`, which is made if need be; their paths."""
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        half = (workdir / name).with_suffix(".part")  # what is being read is never half a file
        half.write_bytes(content)
        half.replace(workdir / name)
    return [workdir / name for name in contents]


def text(plan: dict, fit_command: str = "--mode=fit") -> str:
    """The plan for a terminal. `fit_command`: what to type when the train step does not fit."""
    names = phases(plan)
    usable = plan["capacity_bytes"] - plan["reserved_bytes"]
    lines = [
        f"{plan['gpu']} ({plan['card']}): {size(plan['capacity_bytes'])}, of which {size(plan['reserved_bytes'])} in reserve"
        f" (CUDA context, libraries, workspaces): {size(usable)} to use",
        "",
        f"{'':8}{'arguments':>12}{'temporaries':>13}{'outputs':>12}{'in place':>12}{'peak':>12}",
    ]
    for name in names:
        part = plan[name]
        counts = (part["argument_bytes"], part["temporary_bytes"], part["output_bytes"], part["aliased_bytes"])
        numbers = "".join(f"{size(count):>{width}}" for count, width in zip(counts, (12, 13, 12, 12), strict=True))
        verdict = f"FITS ({part['peak_bytes'] / usable:.0%} of what is to use)"
        if not part["fits"]:
            verdict = f"DOES NOT FIT (by {size(part['peak_bytes'] - usable)})"
        lines.append(f"{name:8}{numbers}{size(part['peak_bytes']):>12}  {verdict}")
    for name in names:
        made = [buffer for buffer in plan[name]["largest"] if buffer["source"] != "argument"]
        lines += ["", f"the peak of {name}: {_owners(plan[name])}", "largest buffers that it makes:"]
        lines += _buffers(made[:SHOWN])
    advice = _advice(plan, usable, fit_command)
    return "\n".join([*lines, *(["", *advice] if advice else [])])


def phases(plan: dict) -> list[str]:
    return [name for name, part in plan.items() if isinstance(part, dict) and "peak_bytes" in part]


def _owners(part: dict) -> str:
    large = [(owner, count) for owner, count in part["owners"].items() if count >= 0.005 * part["peak_bytes"]]
    return ", ".join(f"{owner} {size(count)}" for owner, count in sorted(large, key=lambda item: -item[1]))


def _buffers(largest: list[dict]) -> list[str]:
    width = max((len(buffer["name"]) for buffer in largest), default=0)
    shape = max((len(buffer["shape"]) for buffer in largest), default=0)
    line = lambda b: f"  {b['bytes'] / 2**20:9.1f} MiB  {b['name']:{width}}  {b['shape']:{shape}}  {b['source']}"
    return [line(buffer).rstrip() for buffer in largest]


def _advice(plan: dict, usable: int, fit_command: str) -> list[str]:
    """What to do about that which does not fit."""
    lines = []
    misfits = [name for name in phases(plan) if not plan[name]["fits"]]
    if "init" in misfits:
        lines.append(
            "the state alone is too large: a smaller model, optimizer.name=adamw_8bit or adafactor, "
            "model.param_dtype=bfloat16"
        )
    elif "train" in misfits:
        lines.append(f"to find the microbatch and remat that fit: {fit_command}")
    if "sample" in misfits:
        lines.append("sampling: fewer sample.num_samples at once, or a shorter sample.prompt")
    elif "sample" in plan and "init" in plan:
        # A run samples at each evaluation, with the training state in memory.
        state = plan["init"]["output_bytes"]
        own = plan["sample"]["argument_bytes"] - plan["sample"]["from_host_bytes"]  # of the state: not there twice
        together = plan["sample"]["peak_bytes"] + state - own
        if together > usable:
            lines.append(
                f"sampling during training, beside the state of {size(state)}, needs {size(together)} and DOES NOT FIT: "
                "fewer sample.num_samples"
            )
    return lines
