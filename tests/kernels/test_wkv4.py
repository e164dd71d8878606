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

TILES = {name: getattr(wkv4_pallas, name) for name in ("FORWARD", "BACKWARD")}
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Of 4 tokens and 16 channels: they compile in a fraction of the time. The true ones have a test of their own."""
    for name in TILES:
        monkeypatch.setattr(wkv4_pallas, name, Tile(4, 16, 1, 1))


def make(rng, dtype, B=2, T=14, D=5, log_decay=None, of_k=1.0):
    """Weights, k, v, and the state behind some other tokens."""
    normal = lambda *shape: rng.normal(0, 1, shape)
    w = -np.exp(normal(D) - 1) if log_decay is None else np.full(D, log_decay)
    k, v = jnp.asarray(of_k * normal(B, T, D), dtype), jnp.asarray(normal(B, T, D), dtype)
    s = np.stack([normal(B, D), 1 + rng.rand(B, D), normal(B, D)], axis=1)
    return jnp.float32(w), jnp.float32(normal(D)), k, v, jnp.float32(s)


def call(f, w, u, k, v, s, resets=None, **options):
    return f(w, u, k, v, s_Bx3xD=s, resets_BxT=resets, **options)


def documents(B, T):
    """Where they begin; one with the last token."""
    resets = np.random.RandomState(3).rand(B, T) < 0.1
    resets[0, -1] = True
    return resets


def case(resets=False, **sizes):
    B, T = sizes.get("B", 2), sizes.get("T", 14)
    resets = documents(B, T) if resets else None
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
    arrays, resets = make(np.random.RandomState(0), jnp.float32, of_k=of_k), documents(2, 14)
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


@pytest.mark.slow
def test_the_true_groups(monkeypatch):
    for name, tile in TILES.items():
        monkeypatch.setattr(wkv4_pallas, name, tile)
    proof.check_numerics(case(B=1, T=19, D=35), jnp.float32)


def test_segments(monkeypatch):
    monkeypatch.setattr(wkv4_xla, "SEGMENT_BUDGET", 1)
    monkeypatch.setattr(wkv4_xla, "LEAST_SEGMENT", 5)  # the last one is short
    proof.check_numerics(case(resets=True), jnp.float32, "xla")


def test_one_token():
    proof.check_numerics(case(T=1), jnp.float32, "auto")


@pytest.mark.parametrize("log_decay", [-1e-9, -1e3])
def test_65536_steps_in_bf16(log_decay):
    """At the limits of the decay, with keys up to 60."""
    arrays = make(np.random.RandomState(0), jnp.bfloat16, B=1, T=65536, D=16, log_decay=log_decay, of_k=15.0)
    got = jax.jit(functools.partial(call, wkv4, implementation="xla"))(*arrays)
    want = jax.jit(functools.partial(call, wkv4_reference))(*[x.astype(jnp.float32) for x in arrays])
    assert max(proof.rms_error(g, w) for g, w in zip(got, want, strict=True)) < 5e-3


def test_a_decay_that_fp32_has_no_room_for_beside_the_keys():
    """p + w = p where |w| is under half a unit in p's last place. The average over 3,000 tokens still decays."""
    T, D = 3000, 2
    k = np.full((1, T, D), 60.0, np.float32)
    v = np.zeros((1, T, D), np.float32)
    v[0, 0] = 1  # of which ever less is left
    w = np.float32([-1e-6, -1.5e-6])
    assert np.float32(60) + w[0] == np.float32(60)
    _, s = wkv4(w, np.zeros(D, np.float32), k, v)
    left = np.exp(np.float64(w) * (T - 1))
    np.testing.assert_allclose(s[0, 0], left, rtol=1e-4)  # a; p is 60 still
    _, theirs = wkv4_reference(w, np.zeros(D, np.float32), k, v)
    assert abs(theirs[0, 0, 0] * np.exp(theirs[0, 2, 0] - 60) - left[0]) > 1e-3, "the definition in fp32 has it as well"


def test_under_jit_vmap_scan_and_remat():
    proof.check_transforms(case(B=1, T=6, D=3, resets=True))


def test_cut_anywhere_is_the_same():
    arrays = make(np.random.RandomState(0), jnp.float32, B=1, T=20)

    def cut(w, u, k, v, s):
        outs = []
        for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
            y, s = wkv4(w, u, k[:, part], v[:, part], s_Bx3xD=s)
            outs.append(y)
        return jnp.concatenate(outs, axis=1), s

    whole = functools.partial(call, wkv4)
    for got, want in zip(*(proof.value_and_gradients(f, arrays) for f in (cut, whole)), strict=True):
        assert proof.rms_error(got, want) < 2e-6


def test_no_state_is_an_empty_one():
    w, u, k, v, _ = make(np.random.RandomState(0), jnp.float32)
    for got, want in zip(wkv4(w, u, k, v), wkv4(w, u, k, v, s_Bx3xD=empty_state(2, 5)), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(wkv4(w, u, k, v)[0][:, 0], v[:, 0], rtol=1e-6)  # the first token reads itself


def test_what_backward_keeps_is_the_inputs():
    """4 bytes a token and channel in bf16, and 12 a channel for the last state."""
    w, u, k, v, _ = make(np.random.RandomState(0), jnp.bfloat16, T=300)
    _, pull = jax.vjp(lambda *x: wkv4(*x), w, u, k, v)
    kept = sum(x.nbytes for x in jax.tree.leaves(pull) if hasattr(x, "nbytes"))
    assert kept == 4 * k.size + 12 * k.shape[0] * k.shape[2] + w.nbytes + u.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "palas"}, "implementation='palas' is none of auto, pallas"),
        (
            {"v_BxTxD": np.zeros((2, 14, 4))},
            r"k_BxTxD \(2, 14, 5\) and v_BxTxD \(2, 14, 4\) must be twice one \(B, T, D\)",
        ),
        ({"log_decay_D": np.zeros(4)}, r"log_decay_D is \(4,\) and must be \(5,\)"),
        ({"s_Bx3xD": np.zeros((2, 5, 3))}, r"s_Bx3xD is \(2, 5, 3\) and must be \(2, 3, 5\)"),
        ({"resets_BxT": np.zeros((2, 7))}, r"resets_BxT is \(2, 7\)"),
        (
            {"implementation": "pallas", "k_BxTxD": np.zeros((2, 14, 5), int)},
            "cannot be had: k: dtype int32 is not one of",
        ),
    ],
)
def test_what_makes_no_sense_is_told(change, message):
    names = ("log_decay_D", "u_D", "k_BxTxD", "v_BxTxD", "s_Bx3xD")
    arrays = dict(zip(names, make(np.random.RandomState(0), jnp.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        wkv4(**(arrays | change))
