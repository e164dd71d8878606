"""Tokens to experts and back: equal to a loop over experts, dropless and dropping, with gradients; nothing is one-hot."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.errors import UserError
from jaxvram.layers.experts import Experts, assign, capacity_of

N, D, F, E, k = 48, 8, 12, 5, 2


def make(kernels="xla"):
    return Experts(E, F, "swish", "float32", "float32", jax.nn.initializers.normal(0.5), kernels)


@functools.cache
def inputs():
    """Rows, their experts (the last of which nobody chooses), weights, parameters."""
    random = np.random.RandomState(0)
    experts_Nxk = np.stack([random.permutation(E - 1)[:k] for _ in range(N)]).astype(np.int32)
    x_NxD, weights_Nxk = random.normal(0, 1, (N, D)).astype(np.float32), random.rand(N, k).astype(np.float32)
    params = quick.jit(make().init)(jax.random.key(0), x_NxD, experts_Nxk, weights_Nxk)["params"]
    return x_NxD, experts_Nxk, weights_Nxk, params


def kept(room):
    """Which choices find room: first ones of all tokens, then second ones."""
    taken, kept_Nxk = [0] * E, np.zeros((N, k), bool)
    for j, n in np.ndindex(k, N):
        e = inputs()[1][n, j]
        taken[e] += 1
        kept_Nxk[n, j] = room is None or taken[e] <= room
    return kept_Nxk


def loop(x_NxD, weights_Nxk, params, room=None):
    """Every token through every expert, of which its own count."""
    y_NxD = jnp.zeros_like(x_NxD)
    for e in range(E):
        gate, up, down = (params[f"{name}_proj"]["kernel"][e] for name in ("gate", "up", "down"))
        weight_N = (weights_Nxk * ((inputs()[1] == e) & kept(room))).sum(-1)
        y_NxD += weight_N[:, None] * ((jax.nn.silu(x_NxD @ gate) * (x_NxD @ up)) @ down)
    return y_NxD


def value_and_gradients(f):
    x_NxD, _, weights_Nxk, params = inputs()
    target = np.random.RandomState(5).normal(0, 1, (N, D)).astype(np.float32)
    return quick.jit(jax.value_and_grad(lambda *a: (f(*a) * target).sum(), (0, 1, 2)))(x_NxD, weights_Nxk, params)


@functools.cache
def wanted(room):
    return value_and_gradients(functools.partial(loop, room=room))


@pytest.mark.parametrize(("kernels", "room"), [("xla", None), ("interpret", None), ("xla", 11), ("xla", N)], ids=str)
def test_equals_a_loop_over_experts(kernels, room):
    experts_Nxk = inputs()[1]
    layer = lambda x, w, p: make(kernels).apply({"params": p}, x, experts_Nxk, w, room)[0]
    got = value_and_gradients(layer)
    off = jax.tree.map(quick.relative_error, jax.tree.leaves(got), jax.tree.leaves(wanted(room)))
    assert max(off) < 1e-5


def test_dropping_is_counted():
    x_NxD, experts_Nxk, weights_Nxk, params = inputs()
    dropped = quick.jit(lambda p: make().apply({"params": p}, x_NxD, experts_Nxk, weights_Nxk, 11)[1])(params)
    assert dropped == pytest.approx(1 - kept(11).mean()) and 0.3 < dropped < 0.6


@pytest.mark.parametrize("room", [None, 7])
def test_slots(room):
    """Every choice has a slot of its expert of its own, or none."""
    experts_Nxk = inputs()[1]
    slots = jax.tree.map(np.asarray, assign(jnp.asarray(experts_Nxk), E, room))
    held = [(slot, choice) for slot, choice in enumerate(slots.choice_S) if choice < N * k]
    for slot, choice in held:
        assert slots.slot_kxN[choice // N, choice % N] == slot
        bounds = np.cumsum(slots.sizes_E) if room is None else (np.arange(E) + 1) * room
        assert experts_Nxk[choice % N, choice // N] == np.searchsorted(bounds, slot, side="right")
    assert len(held) == (slots.slot_kxN < len(slots.choice_S)).sum() == np.minimum(slots.sizes_E, room or N).sum()


def test_no_array_has_axes_of_tokens_and_of_slots():
    x_NxD, experts_Nxk, weights_Nxk, params = inputs()
    for room in (None, 11):
        run = lambda x, w, p: make().apply({"params": p}, x, experts_Nxk, w, room)[0].sum()  # noqa: B023
        found = quick.shapes(jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(x_NxD, weights_Nxk, params))
        largest = max(N * k, E * (room or 0)) * F
        # tiles of 32 rows at the most, one more for each expert (kernels/grouped_matmul_xla.py)
        assert max(math.prod(shape) for shape in found) <= max(largest + E * 32 * F, E * D * F), found
        assert not any({N, E * room} <= set(shape) for shape in found if room)


def test_a_capacity_that_drops_everything_is_told():
    assert capacity_of(64, 2, 8, 1.25) == 20
    with pytest.raises(UserError, match=r"model.capacity_factor=0.05 leaves none of 8 experts room .* give at least 0.0625"):
        capacity_of(64, 2, 8, 0.05)
