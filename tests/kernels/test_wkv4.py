"""RWKV-4's recurrence: every kind of call against the definition, by kernels and by XLA, and hard cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels import wkv4_pallas, wkv4_xla
from jaxvram.kernels.backend import Tile
from jaxvram.kernels.wkv4 import empty_state, wkv4, wkv4_reference

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Of 4 tokens and 16 channels: they compile in a fraction of the time. The true ones have a test of their own."""
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(wkv4_pallas, name, Tile(4, 16, 1, 1))
    monkeypatch.setattr(wkv4_xla, "UNROLL", 1)


def make(rng, dtype, B=2, T=14, D=5, log_decay=None, of_k=1.0):
    """Weights, k, v, and the state behind some other tokens."""
    normal = lambda *shape: rng.normal(0, 1, shape)
    w = -np.exp(normal(D) - 1) if log_decay is None else np.full(D, log_decay)
    k, v = jnp.asarray(of_k * normal(B, T, D), dtype), jnp.asarray(normal(B, T, D), dtype)
    s = np.stack([normal(B, D), 1 + rng.rand(B, D), normal(B, D)], axis=1)
    return jnp.float32(w), jnp.float32(normal(D)), k, v, jnp.float32(s)


def call(f, w, u, k, v, s, resets=None, **options):
    return f(w, u, k, v, s_Bx3xD=s, resets_BxT=resets, **options)


def case(resets=False, **sizes):
    B, T = sizes.get("B", 2), sizes.get("T", 14)
    resets = np.random.RandomState(3).rand(B, T) < 0.07 if resets else None
    by = lambda implementation, *arrays: call(wkv4, *arrays, resets=resets, implementation=implementation)
    reference = lambda *arrays: call(wkv4_reference, *arrays, resets=resets)
    return proof.Case(functools.partial(make, **sizes), by, reference)


def by_numpy(w, u, k, v, s, resets):
    """The paper's two sums over the whole past, in float64 without a common exponent taken out."""
    w, u, k, v, s = (np.asarray(x, np.float64) for x in (w, u, k, v, s))
    y = np.zeros_like(v)
    for b, t, d in np.ndindex(*v.shape):
        start = max([0, *(i for i in range(t + 1) if resets[b, i])])
        weights = [np.exp((t - 1 - i) * w[d] + k[b, i, d]) for i in range(start, t)] + [np.exp(u[d] + k[b, t, d])]
        values, before = list(v[b, start : t + 1, d]), np.exp(t * w[d] + s[b, 2, d]) * (start == 0 and not resets[b, 0])
        above, below = (before * s[b, i, d] + np.dot(weights, x) for i, x in enumerate((values, np.ones(len(values)))))
        y[b, t, d] = above / below
    return y


@pytest.mark.parametrize("of_k", [1.0, 25.0])
def test_the_definition_and_ours_are_the_papers(of_k):
    """With k up to 60 as well, where e^k has no place in fp32 beside e^-60."""
    arrays, resets = make(np.random.RandomState(0), jnp.float32, of_k=of_k), np.random.RandomState(3).rand(2, 14) < 0.07
    want = by_numpy(*arrays, resets)
    for f in (wkv4_reference, wkv4, functools.partial(wkv4, implementation="interpret")):
        y, s = call(f, *arrays, resets=resets)
        assert proof.rms_error(y, want) < 2e-6 and np.isfinite(s).all()


CALLS = {
    "more channels than a program": {"T": 12, "D": 19},
    "ragged, with documents": {"T": 11, "resets": True},
    "weakest decay": {"B": 1, "log_decay": -1e-9},
    "strongest decay": {"B": 1, "log_decay": -1e3},
    "k to 60": {"of_k": 25.0, "resets": True},
}


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(name, implementation):
    """Values and every gradient, also of each of the state's three numbers, and by them."""
    proof.check_numerics(case(**CALLS[name]), jnp.float32, implementation)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_bf16(implementation):
    proof.check_numerics(case(resets=True), jnp.bfloat16, implementation)
