"""What the compiler for a card says of a mixture of experts: memory follows the tokens, whatever they choose."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxvram import modes, recipe
from jaxvram.models.moe import GROK, MoE, MoEConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig, LanguageTask
from jaxvram.vram import cards
from jaxvram.vram import plan as planner
from jaxvram.vram.compile import compile_for

GROK_RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "grok.py"
SMALL = MoEConfig(
    **GROK, vocab_size=512, block_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, n_inner=512, n_expert=8
)


def compiled_for(batch, **fields):
    """Loss and gradient of a small Grok, on an RTX 4070."""
    cfg = dataclasses.replace(SMALL, **fields)
    task = LanguageTask(MoE(cfg), None, LanguageConfig(), SampleConfig())
    gradient = jax.grad(lambda params, tokens, key: task.loss(params, {"tokens": tokens, "targets": tokens}, key)[0])
    args = jax.eval_shape(lambda: (task.init(jax.random.key(0)), jnp.zeros((batch, 512), jnp.int32), jax.random.key(0)))
    return compile_for(cards.find("rtx4070"), gradient, args)


def shapes(compiled):
    of = lambda shape: [d for part in shape.parts for d in of(part)] if shape.parts else [shape.dims]
    return {dims for i in compiled.module.instructions.values() for dims in of(i.shape)}


@pytest.mark.slow
def test_dropless_memory_is_linear_in_tokens():
    """And no array is of all tokens for each expert: neither their streams nor what is E times as wide."""
    plans = {batch: compiled_for(batch) for batch in (4, 8, 16)}
    need = {batch: plan.temporary_bytes for batch, plan in plans.items()}
    first, second = need[8] - need[4], need[16] - need[8]
    assert second == pytest.approx(2 * first, rel=0.1), need
    widest = 2 * 16 * 512 * SMALL.n_inner  # of two choices each
    assert max(map(math.prod, shapes(plans[16]))) <= widest


@pytest.mark.slow
@pytest.mark.parametrize("capacity_factor", [0.0, 1.25])
def test_the_default_recipe_stays_under_10_gib(capacity_factor):
    built = recipe.build(*recipe.load(f"{GROK_RECIPE}:8x124m"))
    built = dataclasses.replace(built, model=dataclasses.replace(built.model, capacity_factor=capacity_factor))
    train = planner.programs(built, modes.make_task(built, with_data=False))["train"]
    compiled = compile_for(cards.find("rtx4070"), train.fn, train.args, train.donate_argnums, kernels=True)
    assert compiled.peak_bytes <= 10 * 2**30
    names = {kernel.name.removeprefix("pallas_").split("__")[0] for kernel in compiled.kernels}
    grouped = {"grouped_matmul_forward", "grouped_matmul_transposed", "grouped_matmul_gradient"}
    assert grouped & names == (set() if capacity_factor else grouped)
    assert all(kernel.spill_bytes == 0 for kernel in compiled.kernels)
    tokens, E, F = 8 * 1024, built.model.n_expert, built.model.n_inner
    parameters = {math.prod(p.shape) for p in jax.tree.leaves(train.args[0].params)}
    made = {math.prod(dims) for dims in shapes(compiled)} - parameters
    assert not any(n >= tokens * E * F for n in made), "something is of all tokens for each expert"
