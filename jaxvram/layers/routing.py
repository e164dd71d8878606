"""Which experts a token meets and with what weight, and what keeps their loads even. All of it in fp32.

Of a token's logits z over E experts, k are chosen:
    softmax    s = softmax(z), the k largest; weights s as they are (Grok-1, GPT-NeoX) or divided by their sum (Mixtral)
    sigmoid    s = sigmoid(z), likewise (DeepSeek-V3)
    sinkhorn   in training the k largest of z's doubly stochastic form, which gives each expert as many tokens; weights
               softmax(z), or sigmoid(z) for k = 1; else as softmax (GPT-NeoX ea7aefd, moe.py)
Even loads, f_e the share of choices that fell on e, P_e the mean of s_e (normalised):
    balance    E sum_e f_e P_e, 1 where all are equal (Switch, arXiv:2101.03961; with f over all k choices)
    z-loss     mean of logsumexp(z)^2 (ST-MoE, arXiv:2202.08906)
    offsets    b_e, added to s_e for the choice alone; b_e -= rate * sign(f_e - 1/E) a step (arXiv:2408.15664)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

RULES = ("softmax", "sigmoid", "sinkhorn")
NUDGE = 1e-6  # of an offset's gradient, of which the optimizer reads the sign alone: too small to show in a gradient's norm


class Routing(NamedTuple):
    experts_Nxk: jax.Array  # int32, the best first
    weights_Nxk: jax.Array
    shares_NxE: jax.Array  # what a token gives each expert, adding up to 1: softmax(z), or sigmoids over their sum
    logits_NxE: jax.Array


def route(logits_NxE, k: int, rule: str, renormalise: bool, offset_E=None, training: bool = False) -> Routing:
    """The choice of each token. It has no gradient; the weights have."""
    is_sigmoid = rule == "sigmoid" or (rule == "sinkhorn" and k == 1)
    shares_NxE = jax.nn.softmax(logits_NxE)
    scores_NxE = jax.nn.sigmoid(logits_NxE) if is_sigmoid else shares_NxE
    if rule == "sigmoid":
        shares_NxE = scores_NxE / scores_NxE.sum(-1, keepdims=True)
    by_NxE = sinkhorn(logits_NxE) if rule == "sinkhorn" and training else scores_NxE
    by_NxE = by_NxE if offset_E is None else by_NxE + offset_E
    _, experts_Nxk = jax.lax.top_k(jax.lax.stop_gradient(by_NxE), k)
    weights_Nxk = (scores_NxE[:, None] * _one_hot(experts_Nxk, scores_NxE.shape[1])).sum(-1)  # a gather's gradient scatters
    if renormalise:
        weights_Nxk /= weights_Nxk.sum(-1, keepdims=True)
    return Routing(experts_Nxk, weights_Nxk, shares_NxE, logits_NxE)


def sinkhorn(logits_NxE, iterations: int = 3, tolerance: float = 1e-4):
    """d0_n exp(z_ne) d1_e with column sums 1/E and row sums near 1/N: at most three rounds, as GPT-NeoX has it.

    Its exponentials overflow for large logits; here the largest is taken off first, which changes no d0 c d1. It stops when
    d1, which has the scale of 1 / c, hardly moves: after the first round already if logits are large.
    """
    (N, E), largest = logits_NxE.shape, logits_NxE.max()
    c_NxE = jnp.exp(logits_NxE - largest)
    d1_E = 1 / (E * (c_NxE.sum(0) + 1e-20))
    d0_N, done = jnp.ones(N), jnp.bool_(False)
    for _ in range(iterations):
        next_d0_N = 1 / (N * ((d1_E * c_NxE).sum(1) + 1e-8))
        next_d1_E = 1 / (E * ((next_d0_N[:, None] * c_NxE).sum(0) + 1e-8))
        still = jnp.abs(d1_E - next_d1_E).mean() * jnp.exp(-largest) < tolerance
        d0_N, d1_E = jnp.where(done, d0_N, next_d0_N), jnp.where(done, d1_E, next_d1_E)
        done |= still
    return d1_E * c_NxE * d0_N[:, None]


def _one_hot(experts, E: int):
    return (experts[..., None] == jnp.arange(E)).astype(jnp.float32)


def health(routing: Routing, B: int, per_sequence: bool, offset_E=None, dropped=0.0) -> dict[str, jax.Array]:
    """What a layer tells of its router: load_E and a few numbers, each a mean over the N = B T tokens.

    Args:
      per_sequence: the balance loss is that of each of the B sequences, averaged: then a batch in parts is the whole. Else
        it is that of all tokens at hand, and asks less of each sequence.
      dropped: share of choices that found no room.
    """
    chosen_NxE = _one_hot(routing.experts_Nxk, routing.shares_NxE.shape[1]).mean(1)
    E = chosen_NxE.shape[1]
    means = lambda x_NxE: x_NxE.reshape(B if per_sequence else 1, -1, E).mean(1)
    load_E, shares_NxE = chosen_NxE.mean(0), routing.shares_NxE
    told = {
        "load_E": load_E,
        "entropy": -(shares_NxE * jnp.log(shares_NxE + 1e-30)).sum(-1).mean() / math.log(max(E, 2)),
        "dropped": jnp.float32(dropped),
        "balance": E * (means(chosen_NxE) * means(shares_NxE)).sum(-1).mean(),
        "z": jnp.square(jax.nn.logsumexp(routing.logits_NxE, axis=-1)).mean(),
    }
    if offset_E is not None:  # worth 0, and its gradient by the offsets says which are chosen too often
        told["nudge"] = (jax.lax.stop_gradient(load_E - 1 / E) * (offset_E - jax.lax.stop_gradient(offset_E))).sum()
    return told


def terms(told_L: dict[str, jax.Array], balance: float, z: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(what is added to the mean loss, metrics) of what the layers told; `balance` and `z` are the losses' factors.

    Added up over the layers, as in Switch. The balance loss counts from 1, its value at equal loads, so that the total
    stays near the next token's loss.
    """
    added = balance * (told_L["balance"] - 1).sum() + z * told_L["z"].sum()
    if "nudge" in told_L:
        added += NUDGE * told_L["nudge"].sum()
    mean = {"balance_loss": "balance", "z_loss": "z", "router_entropy": "entropy", "router_dropped": "dropped"}
    return added, {"router_load": told_L["load_E"]} | {name: told_L[of].mean() for name, of in mean.items()}
