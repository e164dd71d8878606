"""RWKV-7's recurrence: every kind of call against the definition, by kernels and by XLA, and hard cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels import wkv7_pallas, wkv7_xla
from jaxvram.kernels.wkv7 import LOWEST, wkv7, wkv7_reference

STRONGEST = -np.exp(-0.5)  # log decay of RWKV-7 at the most

pytestmark = pytest.mark.usefixtures("quick_compile")


def make(rng, dtype, B=2, T=40, H=1, N=16, log_decay=None, repeated=False):
    """The six arrays and a state. `repeated`: one key for all tokens, and all of what is found there is replaced."""
    normal = lambda *shape: rng.normal(0, 1, shape)
    r, k, v, kappa, gate, decay = (normal(B, T, H, N) for _ in range(6))
    if repeated:
        kappa, gate = np.broadcast_to(kappa[:, :1], kappa.shape), np.full_like(gate, 40.0)
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    k = kappa if repeated else 0.3 * k
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    g = STRONGEST * sigmoid(2 * decay) if log_decay is None else np.full_like(decay, log_decay)
    r, k, v, kappa, a = (jnp.asarray(x, dtype) for x in (r, k, v, kappa, sigmoid(gate)))
    return r, jnp.float32(g), k, v, kappa, a, jnp.float32(normal(B, H, N, N))


def call(f, *arrays, resets=None, **options):
    return f(*arrays[:6], s_BxHxNxN=arrays[6], resets_BxT=resets, **options)


def case(resets=False, **sizes):
    B, T = sizes.get("B", 2), sizes.get("T", 40)
    resets = np.random.RandomState(3).rand(B, T) < 0.07 if resets else None
    by = lambda implementation, *arrays: call(wkv7, *arrays, resets=resets, implementation=implementation)
    reference = lambda *arrays: call(wkv7_reference, *arrays, resets=resets)
    return proof.Case(functools.partial(make, **sizes), by, reference)


def by_numpy(arrays, resets):
    """The recurrence as the paper writes it, with whole matrices, in float64."""
    r, g, k, v, kappa, a, s = (np.asarray(x, np.float64) for x in arrays)
    y = np.zeros_like(v)
    for b, h in np.ndindex(*s.shape[:2]):
        S = s[b, h]
        for t in range(v.shape[1]):
            S = 0 * S if resets[b, t] else S
            removal = np.outer(kappa[b, t, h], a[b, t, h] * kappa[b, t, h])
            S = S @ (np.diag(np.exp(g[b, t, h])) - removal) + np.outer(v[b, t, h], k[b, t, h])
            y[b, t, h] = S @ r[b, t, h]
        s[b, h] = S
    return y, s


def test_the_definition_is_the_papers():
    arrays, resets = make(np.random.RandomState(0), jnp.float32), np.random.RandomState(3).rand(2, 40) < 0.07
    for got, want in zip(call(wkv7_reference, *arrays, resets=resets), by_numpy(arrays, resets), strict=True):
        assert proof.rms_error(got, want) < 1e-6


CALLS = {
    "heads": {"T": 48, "H": 2},
    "ragged, with documents": {"T": 37, "resets": True},
    "weakest decay, a key repeated": {"B": 1, "log_decay": -1e-9, "repeated": True},
    "strongest decay, a key repeated": {"B": 1, "log_decay": STRONGEST, "repeated": True},
}


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(name, implementation):
    """Values and every gradient."""
    proof.check_numerics(case(**CALLS[name]), jnp.float32, implementation)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_bf16(implementation):
    proof.check_numerics(case(resets=True), jnp.bfloat16, implementation)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_segments(implementation, monkeypatch):
    monkeypatch.setattr(wkv7_xla, "SEGMENT_BUDGET", 1)  # a chunk at a time
    monkeypatch.setattr(wkv7_pallas, "BUDGET", 1)
    proof.check_numerics(case(T=37, resets=True), jnp.float32, implementation)


def test_few_tokens_and_one():
    for T in (1, 5):
        proof.check_numerics(case(T=T), jnp.float32, "auto")


@pytest.mark.parametrize("log_decay", [-1e-9, STRONGEST])
def test_65536_steps_in_bf16(log_decay):
    """A key that all tokens share, at the limits of the decay."""
    arrays = make(np.random.RandomState(0), jnp.bfloat16, B=1, T=65536, log_decay=log_decay, repeated=True)
    got = jax.jit(functools.partial(call, wkv7, implementation="xla"))(*arrays)
    want = jax.jit(functools.partial(call, wkv7_reference))(*[x.astype(jnp.float32) for x in arrays])
    assert max(proof.rms_error(g, w) for g, w in zip(got, want, strict=True)) < 5e-3


def test_kernels_in_bf16_over_many_chunks():
    """Rounding does not pile up: 2,048 tokens are off by no more than 40."""
    of = case(B=1, T=2048)
    arrays = of.make(np.random.RandomState(0), jnp.bfloat16)
    got = jax.jit(functools.partial(of.call, "interpret"))(*arrays)
    want = jax.jit(of.reference)(*[x.astype(jnp.float32) for x in arrays])
    assert max(proof.rms_error(g, w) for g, w in zip(got, want, strict=True)) < 5e-3


def test_the_lowest_decay():
    """Far below RWKV-7's: the slope of the decay is a millionth of what it is a difference of, and has fewer digits."""
    proof.check_numerics(case(B=1, log_decay=LOWEST), jnp.float32, "xla", bound=1e-4)


def test_under_jit_vmap_scan_and_remat():
    proof.check_transforms(case(B=1, T=20, resets=True))


def test_cut_anywhere_is_the_same():
    arrays = make(np.random.RandomState(0), jnp.float32, B=1, T=50)

    def cut(*arrays):
        *six, s = arrays
        outs = []
        for part in (slice(0, 17), slice(17, 18), slice(18, 50)):
            y, s = wkv7(*(x[:, part] for x in six), s_BxHxNxN=s)
            outs.append(y)
        return jnp.concatenate(outs, axis=1), s

    whole = functools.partial(call, wkv7)
    for got, want in zip(*(proof.value_and_gradients(f, arrays) for f in (cut, whole)), strict=True):
        assert proof.rms_error(got, want) < 2e-6


def test_what_backward_keeps_is_the_inputs():
    """14 bytes a token and channel."""
    arrays = make(np.random.RandomState(0), jnp.bfloat16, T=300, N=32)[:6]
    _, pull = jax.vjp(lambda *x: wkv7(*x), *arrays)
    assert sum(x.nbytes for x in jax.tree.leaves(pull) if hasattr(x, "nbytes")) == 14 * arrays[0].size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "palas"}, "implementation='palas' is none of auto, pallas"),
        ({"k_BxTxHxN": np.zeros((2, 40, 1, 8))}, r"must be six times one \(B, T, H, N\)"),
        ({"s_BxHxNxN": np.zeros((2, 1, 16, 8))}, r"s_BxHxNxN is \(2, 1, 16, 8\) and must be \(2, 1, 16, 16\)"),
        ({"resets_BxT": np.zeros((2, 7))}, r"resets_BxT is \(2, 7\)"),
        ({"implementation": "pallas"}, "cannot be had: r, k, v, kappa, a: dtypes float32, .* are not all bfloat16"),
    ],
)
def test_what_makes_no_sense_is_told(change, message):
    names = ("r_BxTxHxN", "log_decay_BxTxHxN", "k_BxTxHxN", "v_BxTxHxN", "kappa_BxTxHxN", "a_BxTxHxN")
    arrays = dict(zip(names, make(np.random.RandomState(0), jnp.float32), strict=False))
    with pytest.raises(ValueError, match=message):
        wkv7(**(arrays | change))


def test_a_head_that_the_kernels_do_not_take():
    x = np.zeros((1, 20, 1, 24), jnp.bfloat16)
    with pytest.raises(ValueError, match="a head of 24 is none of 16, 32, 64"):
        wkv7(*[x] * 6, implementation="pallas")
