"""The fastest microbatch and remat that fit a card: fewest recomputed FLOPs first, then the largest microbatch."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from jaxvram.vram import plan
from jaxvram.vram.cards import Card, size
from jaxvram.vram.compile import compile_for
from jaxvram.vram.flops import matmul_flops

REMATS = ("none", "dots", "full", "nested")


@dataclasses.dataclass(frozen=True)
class Trial:
    microbatch: int
    remat: str
    peak_bytes: int
    matmul_flops: int  # of a step
    fits: bool


@dataclasses.dataclass(frozen=True)
class Fit:
    card: Card
    trials: tuple[Trial, ...]  # in the order they were made
    least_flops: int  # of a step under the remat that recomputes least
    best: Trial | None  # None: nothing fits

    @property
    def override(self) -> str:
        """The flags to paste."""
        return f"--config.train.microbatch_size={self.best.microbatch} --config.model.remat={self.best.remat}"


def find_fit(
    build: Callable[[int, str], plan.Program],
    batch_size: int,
    card: Card,
    remats: tuple[str, ...] = REMATS,
    progress: Callable[[str], None] = lambda _: None,
) -> Fit:
    """Searches with few compilations: two for a remat that is hopeless, about four for the one that is chosen.

    Args:
      build: (microbatch, remat) -> the train step's Program; microbatch divides batch_size.
      remats: choices of remat.
      progress: called with a line at the start and after each compilation.
    """
    trials = []

    def attempt(microbatch, remat):
        program = build(microbatch, remat)
        compiled = compile_for(card, program.fn, program.args, program.donate_argnums)
        peak = compiled.peak_bytes
        trials.append(Trial(microbatch, remat, peak, compiled.matmul_flops, peak <= card.usable_bytes))
        verdict = "fits" if trials[-1].fits else "too much"
        progress(f"microbatch {microbatch}, remat {remat}: {size(peak)}, {verdict}")
        return trials[-1]

    progress(f"counting the FLOPs of remat {', '.join(remats)}")
    cost = {remat: _flops(build(batch_size, remat)) for remat in remats}
    best = None
    for remat in sorted(remats, key=cost.get):  # sorted is stable: of equals the one named first
        best = _largest_microbatch(functools.partial(attempt, remat=remat), batch_size, card.usable_bytes)
        if best:
            break
    return Fit(card, tuple(trials), min(cost.values()), best)


def _largest_microbatch(attempt: Callable[[int], Trial], batch_size: int, usable_bytes: int) -> Trial | None:
    """The whole batch first: without microbatches there is no second tree of gradients, so it may need less than half of it.

    Below it memory grows with the microbatch, nearly in a straight line: that line says where to look for the edge.
    """
    whole = attempt(batch_size)
    if whole.fits:
        return whole
    sizes = [size for size in range(1, batch_size) if batch_size % size == 0]
    if not sizes or not (least := attempt(sizes[0])).fits:
        return None
    best, last = least, whole
    low, high = 0, len(sizes)  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        a_row = max(1, (last.peak_bytes - least.peak_bytes) / (last.microbatch - least.microbatch))
        reach = best.microbatch + (usable_bytes - best.peak_bytes) / a_row
        guess = max(index for index, size in enumerate(sizes) if size <= reach)
        middle = min(max(guess, low + 1), high - 1)
        last = attempt(sizes[middle])
        if last.fits:
            low, best = middle, last
        else:
            high = middle
    return best


def _flops(program: plan.Program) -> int:
    return matmul_flops(jax.make_jaxpr(program.fn)(*program.args))


def fit_recipe(recipe, make_task: Callable, card: Card, progress: Callable[[str], None] = lambda _: None) -> Fit:
    """`find_fit` for a recipe's train step. `make_task`: recipe -> task, as for a plan."""

    def build(microbatch, remat):
        changed = dataclasses.replace(
            recipe,
            train=dataclasses.replace(recipe.train, microbatch_size=microbatch),
            model=dataclasses.replace(recipe.model, remat=remat),
        )
        return plan.programs(changed, make_task(changed))["train"]

    remats = getattr(recipe.model, "REMATS", REMATS)  # a model of few blocks, each of its own size, has fewer
    return find_fit(build, recipe.train.batch_size, card, remats, progress)


def text(fit: Fit) -> str:
    """What was tried, and the line to paste."""
    lines = [f"{'microbatch':>10}  {'remat':8}{'peak':>12}  {'recomputed':>12}"]
    for trial in fit.trials:
        again = f"+{trial.matmul_flops / fit.least_flops - 1:.0%} FLOPs"
        verdict = "  <- the fastest that fits" if trial is fit.best else "" if trial.fits else "  too much"
        lines.append(f"{trial.microbatch:>10}  {trial.remat:8}{size(trial.peak_bytes):>12}  {again:>12}{verdict}")
    usable = f"{fit.card.description} has {size(fit.card.usable_bytes)} to use"
    if fit.best is None:
        leanest = min(fit.trials, key=lambda trial: trial.peak_bytes)
        lines += [
            "",
            f"nothing fits: {usable}, and the leanest choice, microbatch {leanest.microbatch} with remat {leanest.remat}, "
            f"needs {size(leanest.peak_bytes)}. Try optimizer.name=adamw_8bit or adafactor, "
            "model.param_dtype=bfloat16, a shorter model.block_size or a smaller model.",
        ]
        return "\n".join(lines)
    ideal = fit.best.matmul_flops / (fit.card.tensor_tflops * 1e12)
    lines += [
        "",
        f"{usable}; a step's matrix products are {fit.best.matmul_flops / 1e12:.1f} TFLOP, {ideal:.3f} s at the card's peak",
        fit.override,
    ]
    return "\n".join(lines)
