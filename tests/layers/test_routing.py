"""Routers: choices and weights against loops, Sinkhorn's marginals, losses with live gradients, offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.layers import routing

N, E = 96, 6


def logits(scale=2.0):
    return np.random.RandomState(0).normal(0, scale, (N, E)).astype(np.float32) + np.linspace(0, 2, E, dtype=np.float32)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("rule", "k"), [("softmax", 1), ("softmax", 3), ("sigmoid", 2), ("sinkhorn", 1), ("sinkhorn", 2)])
def test_choice_and_weights(rule, k, renormalise):
    """In evaluation; by NumPy, token by token."""
    z = logits()
    got = routing.route(jnp.asarray(z), k, rule, renormalise)
    is_sigmoid = rule == "sigmoid" or (rule == "sinkhorn" and k == 1)
    scores = 1 / (1 + np.exp(-z)) if is_sigmoid else softmax(z)
    for n in range(N):
        best = np.argsort(-scores[n])[:k]
        assert np.asarray(got.experts_Nxk)[n].tolist() == best.tolist()
        want = scores[n][best] / (scores[n][best].sum() if renormalise else 1)
        np.testing.assert_allclose(got.weights_Nxk[n], want, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(got.shares_NxE).sum(-1), 1, rtol=1e-5)


def test_top_two_of_grok_weigh_less_than_one():
    weights_Nxk = routing.route(jnp.asarray(logits()), 2, "softmax", False).weights_Nxk
    assert (np.asarray(weights_Nxk).sum(-1) < 1).all()


def test_sinkhorns_marginals_are_even():
    """Columns exactly, they are divided last; rows nearly, after three rounds, and closer than the softmax's by far."""
    d_NxE = np.asarray(routing.sinkhorn(jnp.asarray(logits(0.5))), np.float64)
    np.testing.assert_allclose(d_NxE.sum(0), 1 / E, rtol=1e-4)
    np.testing.assert_allclose(d_NxE.sum(1), 1 / N, rtol=0.02)
    assert np.ptp(softmax(logits(0.5)).mean(0)) * E > 0.5
    choices = routing.route(jnp.asarray(logits(0.5)), 1, "sinkhorn", False, training=True).experts_Nxk
    plain = routing.route(jnp.asarray(logits(0.5)), 1, "sinkhorn", False).experts_Nxk
    busiest = lambda experts_Nxk: np.bincount(np.asarray(experts_Nxk)[:, 0], minlength=E).max() * E / N
    assert busiest(choices) < 1.4 < 2 < busiest(plain)


def test_sinkhorn_as_gpt_neox_writes_it():
    """Its loop, in float64, without the largest logit taken off first."""
    for scale in (0.3, 2.0):
        c = np.exp(logits(scale).astype(np.float64))
        d1 = 1 / (E * c.sum(0))
        for _ in range(3):
            before = d1
            d0 = 1 / N * 1 / ((d1 * c).sum(1) + 1e-8)
            d1 = 1 / E * 1 / ((d0[:, None] * c).sum(0) + 1e-8)
            if np.abs(before - d1).mean() < 1e-4:
                break
        assert quick.relative_error(routing.sinkhorn(jnp.asarray(logits(scale))), d1 * c * d0[:, None]) < 1e-4
    assert np.isfinite(routing.sinkhorn(jnp.asarray(logits() * 100))).all()


def told(z, B=4, **options):
    routed = routing.route(z, 2, "softmax", True, options.get("offset_E"))
    return routing.health(routed, B, **{"per_sequence": False} | options)


def test_what_is_told():
    z = logits()
    found = jax.tree.map(np.asarray, told(jnp.asarray(z)))
    best = np.argsort(-z, -1)[:, :2]
    load, shares = np.bincount(best.ravel(), minlength=E) / best.size, softmax(z)
    np.testing.assert_allclose(found["load_E"], load, rtol=1e-6)
    np.testing.assert_allclose(found["balance"], E * (load * shares.mean(0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(found["z"], np.square(np.log(np.exp(z).sum(-1))).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["entropy"], -(shares * np.log(shares)).sum(-1).mean() / np.log(E), rtol=1e-5)
    even = told(jnp.zeros((N, E)))
    assert even["entropy"] == pytest.approx(1) and even["balance"] == pytest.approx(1)


def test_the_balance_loss_has_a_live_gradient_that_evens_loads_out():
    """GPT-NeoX took it with .item(), once: without one."""
    z = jnp.asarray(logits())
    step = quick.jit(lambda z: (z - 20 * jax.grad(lambda z: told(z)["balance"])(z), told(z)["load_E"].max() * E))
    peaks = []
    for _ in range(60):
        z, peak = step(z)
        peaks.append(float(peak))
    assert peaks[0] > 1.6 and peaks[-1] < 1.25


def test_the_balance_loss_of_sequences_adds_up_over_parts_of_a_batch():
    z = jnp.asarray(logits())
    for per_sequence in (True, False):
        balance = quick.jit(lambda z, per_sequence=per_sequence: told(z, len(z) // 24, per_sequence=per_sequence)["balance"])
        off = abs(balance(z) - (balance(z[: N // 2]) + balance(z[N // 2 :])) / 2)
        assert (off < 1e-6) == per_sequence and off < 0.1  # over all tokens at hand it does not


def test_offsets_change_the_choice_alone_and_are_told_which_way_to_go():
    z, offset_E = jnp.asarray(logits()), jnp.zeros(E).at[0].set(2.0)
    plain, moved = (routing.route(z, 2, "softmax", False, o) for o in (None, offset_E))
    assert (moved.experts_Nxk[:, 0] == 0).all() and not (plain.experts_Nxk[:, 0] == 0).all()
    np.testing.assert_allclose(moved.weights_Nxk[:, 0], plain.shares_NxE[:, 0], rtol=1e-6)
    nudge, slope_E = jax.value_and_grad(lambda o: told(z, offset_E=o)["nudge"])(offset_E)
    load_E = told(z, offset_E=offset_E)["load_E"]
    assert nudge == 0
    np.testing.assert_allclose(slope_E, load_E - 1 / E, atol=1e-6)


def test_terms():
    layers = {"balance": jnp.array([1.5, 2.0]), "z": jnp.array([4.0, 6.0]), "load_E": jnp.ones((2, E)) / E,
              "entropy": jnp.array([0.5, 0.7]), "dropped": jnp.array([0.0, 0.2])}  # fmt: skip
    added, metrics = routing.terms(layers, 0.1, 0.01)
    assert added == pytest.approx(0.1 * 1.5 + 0.01 * 10)
    want = {"balance_loss": 1.75, "z_loss": 5.0, "router_entropy": 0.6, "router_dropped": 0.1}
    assert {name: float(metrics[name]) for name in want} == pytest.approx(want)
    assert metrics["router_load"].shape == (2, E)
