"""E feed-forward layers of which each token passes k: tokens out to the experts' slots, through them, and back.

A slot is a row of what experts read. Without a capacity there are N k of them, sorted by expert: every choice finds room,
and memory is that of the tokens, whatever they choose. With one there are C an expert: a choice that comes too late, all
first choices before all second ones, is dropped (GShard, arXiv:2006.16668). No array has axes of both tokens and slots.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.kernels.grouped_matmul import grouped_matmul
from jaxvram.layers.mlp import GATED


class Slots(NamedTuple):
    """Choice a = j N + n is the j-th of token n."""

    choice_S: jax.Array  # int32, the choice that each slot holds; k N: none
    slot_kxN: jax.Array  # int32, the slot of each choice; S: dropped
    sizes_E: jax.Array  # int32, how many choices fell on each expert


def assign(experts_Nxk, E: int, capacity: int | None = None) -> Slots:
    """A slot for each choice."""
    N, k = experts_Nxk.shape
    expert_A = experts_Nxk.T.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    rank_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(k * N, dtype=jnp.int32), unique_indices=True)
    sizes_E = (expert_A[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
    if capacity is None:
        return Slots(order_A, rank_A.reshape(k, N), sizes_E)
    starts_E, place_C = jnp.cumsum(sizes_E) - sizes_E, jnp.arange(capacity)
    held_ExC = order_A[jnp.minimum(starts_E[:, None] + place_C, k * N - 1)]
    choice_S = jnp.where(place_C < sizes_E[:, None], held_ExC, k * N).reshape(-1)
    place_A = rank_A - starts_E[expert_A]
    slot_A = jnp.where(place_A < capacity, expert_A * capacity + place_A, E * capacity)
    return Slots(choice_S, slot_A.reshape(k, N).astype(jnp.int32), sizes_E)


def capacity_of(N: int, k: int, E: int, factor: float) -> int:
    """C, the slots of an expert, for N tokens.

    Raises:
      UserError: it would be 0.
    """
    capacity = int(factor * N * k / E)
    if capacity < 1:
        raise UserError(
            f"model.capacity_factor={factor} leaves none of {E} experts room for one of {N} x {k} choices: all would be "
            f"dropped; give at least {E / (N * k):.3g}, or 0 (nothing is dropped)"
        )
    return capacity


def _rows(x_NxD, at):
    """x[at], and zeros where there is no such row."""
    return jnp.take(x_NxD, at, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x_NxD, slots: Slots):
    """Each slot's token, (S, D). Backward gathers as well: scattering would add up in an order of its own on a GPU."""
    k, N = slots.slot_kxN.shape
    return _rows(x_NxD, jnp.where(slots.choice_S < k * N, slots.choice_S % N, N))


def _dispatch_backward(slots, g_SxD):
    return sum(_rows(g_SxD, slot_N).astype(jnp.float32) for slot_N in slots.slot_kxN).astype(g_SxD.dtype), None


dispatch.defvjp(lambda x_NxD, slots: (dispatch(x_NxD, slots), slots), _dispatch_backward)


@jax.custom_vjp
def combine(y_SxD, weights_Nxk, slots: Slots):
    """sum_j weight_nj y[slot of the j-th choice of n], (N, D): added up in fp32; a dropped choice gives nothing."""
    parts = (w_N[:, None] * _rows(y_SxD, slot_N) for w_N, slot_N in zip(weights_Nxk.T, slots.slot_kxN, strict=True))
    return sum(parts).astype(y_SxD.dtype)


def _combine_backward(residuals, g_NxD):
    y_SxD, weights_Nxk, slots = residuals
    weight_S = _rows(weights_Nxk.T.reshape(-1), slots.choice_S)
    dy_SxD = (weight_S[:, None] * dispatch(g_NxD, slots)).astype(y_SxD.dtype)
    dot = lambda slot_N: (g_NxD.astype(jnp.float32) * _rows(y_SxD, slot_N)).sum(-1)
    return dy_SxD, jnp.stack([dot(slot_N) for slot_N in slots.slot_kxN], -1), None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)


class GroupedLinear(nn.Module):
    """y = x W_e, no bias; x sorted by expert as (S, D) with `sizes_E`, or (E, C, D) without."""

    groups: int
    features: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer
    kernels: str

    @nn.compact
    def __call__(self, x, sizes_E=None):
        shape = self.groups, x.shape[-1], self.features
        kernel_ExDxF = self.param("kernel", self.kernel_init, shape, self.param_dtype).astype(self.dtype)
        if sizes_E is None:
            return jnp.einsum("ecd,edf->ecf", x, kernel_ExDxF)
        return grouped_matmul(x, kernel_ExDxF, sizes_E, implementation=self.kernels)


class Experts(nn.Module):
    """W_down (act(W_gate u) * W_up u), W those of a token's experts, weighted and added up."""

    n_expert: int
    n_inner: int
    activation: str  # of GATED
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer
    kernels: str

    @nn.compact
    def __call__(self, u_NxD, experts_Nxk, weights_Nxk, capacity: int | None = None):
        """(y_NxD, share of choices that were dropped)."""
        E, D = self.n_expert, u_NxD.shape[-1]
        options = self.dtype, self.param_dtype, self.kernel_init, self.kernels
        linear = lambda features, name: GroupedLinear(E, features, *options, name=name)
        slots = assign(experts_Nxk, E, capacity)
        x = dispatch(u_NxD.astype(self.dtype), slots)
        x, sizes_E = (x, slots.sizes_E) if capacity is None else (x.reshape(E, capacity, D), None)
        gate, up = linear(self.n_inner, "gate_proj")(x, sizes_E), linear(self.n_inner, "up_proj")(x, sizes_E)
        y = linear(D, "down_proj")(GATED[self.activation](gate, up), sizes_E)
        dropped = 0.0 if capacity is None else (slots.slot_kxN == E * capacity).mean()
        return combine(y.reshape(-1, D), weights_Nxk, slots), dropped
