"""Every recipe, in every variant, plans within the budget that its header states for a 12 GB card."""

import pathlib
import re

import pytest

from jaxvram import modes, recipe
from jaxvram.vram import cards
from jaxvram.vram import plan as planner
from jaxvram.vram.compile import compile_for

CONFIGS = sorted(pathlib.Path(__file__).parents[1].glob("configs/*.py"))


def budgets(path):
    """{variant: GiB} from the rows of a recipe's header."""
    header = path.read_text().split('"""')[1]
    return {name: float(gib) for name, gib in re.findall(r"^  (\w+) .*? ([\d.]+) GiB", header, re.M)}


def names(path):
    """The variants of a recipe."""
    return re.search(r"^VARIANTS = \((.*?)\)", path.read_text(), re.M)[1].replace('"', "").replace(",", " ").split()


RECIPES = [(path, variant) for path in CONFIGS for variant in names(path)]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "variant"), RECIPES, ids=lambda x: getattr(x, "stem", x))
def test_the_train_step_plans_within_the_headers_budget(path, variant):
    card = cards.find("rtx4070")
    built = recipe.build(*recipe.load(f"{path}:{variant}"))
    train = planner.programs(built, modes.make_task(built, with_data=False))["train"]
    compiled = compile_for(card, train.fn, train.args, train.donate_argnums)
    peak, budget = compiled.peak_bytes / 2**30, budgets(path)[variant]
    assert peak <= budget, f"plans at {peak:.2f} GiB; the header says {budget}"
    assert peak >= 0.7 * budget - 0.1, f"plans at {peak:.2f} GiB; the header's {budget} tells nobody much"
    assert compiled.peak_bytes <= card.usable_bytes
