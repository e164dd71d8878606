"""Who owns the peak: names, lines, owners, and sums that come out exactly."""

import inspect
import re

import jax
import jax.numpy as jnp
import pytest

from jaxvram.vram import bill as bills
from jaxvram.vram import hlo
from jaxvram.vram.bill import make_bill, path_of, path_of_operation, phase_of
from jaxvram.vram.compile import compile_for
from tests.vram import toy
from tests.vram.toy import B, D, L, V, spec

WEIGHTS = 4 * (V * D + L * D * D)


@pytest.fixture(scope="module")
def trained(rtx4070):
    """Bills of the toy's train step, without and with remat."""
    made = {}
    for remat in ("none", "full"):
        program = toy.train_program(remat)
        made[remat] = make_bill(compile_for(rtx4070, program.fn, program.args, program.donate_argnums))
    return made


def test_owners_add_up_to_the_peak(trained):
    for bill in trained.values():
        assert sum(bill.owners.values()) == bill.compiled.peak_bytes
        assert bill.owners.get("gaps", 0) >= 0
        assert set(bill.owners) <= set(bills.OWNERS)


def test_the_state_is_owned_by_what_its_paths_say(trained):
    owners = trained["none"].owners
    assert owners["parameters"] == WEIGHTS
    assert 0 <= owners["optimizer state"] - 2 * WEIGHTS <= 64  # and a step counter
    assert owners["batch"] == 4 * B


def test_gradients_are_as_large_as_parameters_and_named_after_them(trained):
    # Under remat memory is fullest in the backward pass of the layers, where their gradients must exist.
    assert 4 * L * D * D <= trained["full"].owners["gradients"] <= WEIGHTS + 4 * D * D
    (kernel,) = [b for b in trained["full"].buffers if b.name == "gradient of params/h/mlp/kernel"]
    assert (kernel.bytes, kernel.shape, kernel.owner) == (4 * L * D * D, f"f32[{L},{D},{D}]", "gradients")


def test_remat_takes_the_saved_activations_away(trained):
    saved = {remat: bill.owners.get("saved activations", 0) for remat, bill in trained.items()}
    # tanh's derivative needs its result, the matrix product its input; under remat the input of each layer is enough.
    assert saved["full"] == L * B * D * 4
    assert saved["none"] >= 2 * saved["full"]


def test_buffers_come_with_the_line_that_made_them(trained):
    lines, first = inspect.getsourcelines(toy.forward)
    product = first + next(i for i, line in enumerate(lines) if "jnp.tanh" in line)
    sources = {b.source for b in trained["none"].buffers if b.owner == "saved activations"}
    assert f"toy.py:{product}" in sources
    assert all(re.fullmatch(r"(toy|test_bill)\.py:\d+|argument|", b.source) for b in trained["none"].buffers)


def test_arguments_are_named_by_their_path(trained):
    names = {b.name: b for b in trained["none"].buffers}
    assert names["params/wte/embedding"].bytes == 4 * V * D
    assert names["params/wte/embedding"].source == "argument"
    assert names["opt_state/0/mu/h/mlp/kernel"].shape == f"f32[{L},{D},{D}]"
    assert names["batch/tokens"].owner == "batch"


def test_logits_belong_to_the_loss(trained):
    logits = [b for b in trained["full"].buffers if b.owner == "logits and loss"]
    assert max(b.bytes for b in logits) >= 4 * B * V


def test_results_are_named_and_owned_by_their_path(rtx4070):
    def init():
        params = toy.init_params()
        return {"params": params, "ema": jax.tree.map(lambda p: 2 * p, params), "step": jnp.int32(0)}

    bill = make_bill(compile_for(rtx4070, init, ()))
    assert bill.owners["parameters"] == bill.owners["weight average"] == WEIGHTS
    assert {"params/wte/embedding", "ema/h/mlp/kernel"} <= {b.name for b in bill.buffers}
    assert {b.source for b in bill.buffers if b.owner == "parameters"} == {
        ""
    }  # constants: no line of its own made them
    assert sum(bill.owners.values()) == bill.compiled.peak_bytes


def test_what_a_sampler_carries_is_its_cache(rtx4070):
    rows, positions = 32, 128

    def write(params, prompt):
        def step(cache, i):
            x = cache.sum(1) @ params["kernel"]
            return jax.lax.dynamic_update_index_in_dim(cache, x, i, 1), x[:, 0]

        return jax.lax.scan(step, jnp.zeros((rows, positions, D)) + prompt, jnp.arange(positions))[1]

    bill = make_bill(compile_for(rtx4070, write, ({"kernel": spec(D, D)}, spec(rows, 1, D))))
    assert 4 * rows * positions * D <= bill.owners["cache"] < 1.1 * 4 * rows * positions * D


def test_casts_of_weights_are_told_apart(rtx4070):
    def infer(params, batch):
        half = jax.lax.optimization_barrier(params["kernel"].astype(jnp.bfloat16))
        return batch @ half

    bill = make_bill(compile_for(rtx4070, infer, ({"kernel": spec(D, D)}, spec(B, D, dtype=jnp.bfloat16))))
    assert bill.owners["parameter copies"] == 2 * D * D
    # The argument's path here is params/kernel, as in a sampler whose first argument is `params`.
    assert "copy of params/kernel" in {b.name for b in bill.buffers}


def test_the_largest_come_first(trained):
    largest = trained["none"].largest(7)
    assert len(largest) == 7
    assert [b["bytes"] for b in largest] == sorted((b["bytes"] for b in largest), reverse=True)
    assert set(largest[0]) == {"name", "bytes", "shape", "source", "owner"}


def test_the_peak_is_found_by_replaying_the_heap():
    sizes = {1: 10, 2: 20, 3: 5, 4: 20, 9: 1000}
    values = {v: hlo.Value(v, size, 0, ()) for v, size in sizes.items()}
    allocations = (
        hlo.Allocation(0, 35, None, False, False, False, (1, 2, 3, 4)),
        hlo.Allocation(1, 1000, 0, False, False, False, (9,)),  # an argument: it is no part of the heap
    )
    A, F, S = hlo.ALLOC, hlo.FREE, hlo.SHARE
    trace = (
        (A, 9, 0), (A, 1, 0), (A, 2, 0), (S, 4, 2), (F, 2, 0),  # 4 goes on living where 2 was
        (F, 1, 0), (A, 3, 0), (F, 4, 0), (F, 3, 0), (A, 1, 0), (F, 1, 0),
    )  # fmt: skip
    module = hlo.Module({}, {}, 0, {}, values, {}, allocations, (trace,))
    assert [[v.id for v in buffer] for buffer in bills.alive_at_peak(module)] == [[1, 1], [2, 4]]


def test_paths_and_phases():
    assert path_of("state.params['h']['mlp']['c_fc']['kernel']") == "params/h/mlp/c_fc/kernel"
    assert path_of("state.opt_state[1].mu['wte']['embedding']") == "opt_state/1/mu/wte/embedding"
    assert path_of("batch['tokens']") == "batch/tokens"
    assert path_of("") == ""
    forward = "jit(train_step)/jvp(GPT2)/h/h._loop/while/body/closed_call/Block/mlp/c_fc/dot_general"
    again = "jit(f)/transpose(jvp(GPT2))/h/while/body/checkpoint/rematted_computation/Block/tanh"
    assert path_of_operation(forward) == "h/Block/mlp/c_fc/dot_general"
    assert path_of_operation(again) == "h/Block/tanh"
    assert [phase_of(name) for name in (forward, again, again.replace("rematted_computation/", ""), "jit(f)/add")] == [
        "forward", "recomputed", "backward", "",
    ]  # fmt: skip
