"""RWKV-5's and 6's recurrence: every kind of call against the definition, by kernels and XLA; decays of every strength."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import proof
import pytest

from jaxvram.kernels import wkv6_xla
from jaxvram.kernels.wkv6 import wkv6, wkv6_reference

pytestmark = pytest.mark.usefixtures("quick_compile")

MIXED = (10.0, 3.0, 1.0, 0.0, -2.0, -5.0, -20.0)  # log decay = -exp of them: from -22,026 to -2e-9


def make(rng, dtype, B=2, T=40, H=1, N=16, decays=MIXED, constant=False):
    """r, log decay, k, v, u and a state. Decays are drawn from `decays`; `constant`: one for all tokens, as in RWKV-5."""
    normal = lambda *shape: rng.normal(0, 1, shape)
    r, k, v = (jnp.asarray(scale * normal(B, T, H, N), dtype) for scale in (1, 0.3, 1))
    g = -np.exp(rng.choice(decays, (H, N) if constant else (B, T, H, N)))
    return r, jnp.float32(g), k, v, jnp.float32(normal(H, N)), jnp.float32(normal(B, H, N, N))


def call(f, *arrays, resets=None, **options):
    return f(*arrays[:5], s_BxHxNxN=arrays[5], resets_BxT=resets, **options)


def case(resets=False, **sizes):
    B, T = sizes.get("B", 2), sizes.get("T", 40)
    resets = np.random.RandomState(3).rand(B, T) < 0.07 if resets else None
    by = lambda implementation, *arrays: call(wkv6, *arrays, resets=resets, implementation=implementation)
    reference = lambda *arrays: call(wkv6_reference, *arrays, resets=resets)
    return proof.Case(functools.partial(make, **sizes), by, reference)


def by_numpy(arrays, resets):
    """The recurrence as the paper writes it, with whole matrices, in float64."""
    r, g, k, v, u, s = (np.asarray(x, np.float64) for x in arrays)
    g, y = np.broadcast_to(g, v.shape), np.zeros_like(v)
    for b, h in np.ndindex(*s.shape[:2]):
        S = s[b, h]
        for t in range(v.shape[1]):
            S = 0 * S if resets[b, t] else S
            written = np.outer(v[b, t, h], k[b, t, h])
            y[b, t, h] = (S + written @ np.diag(u[h])) @ r[b, t, h]
            S = S @ np.diag(np.exp(g[b, t, h])) + written
        s[b, h] = S
    return y, s


@pytest.mark.parametrize("constant", [False, True])
def test_the_definition_is_the_papers(constant):
    arrays = make(np.random.RandomState(0), jnp.float32, constant=constant)
    resets = np.random.RandomState(3).rand(2, 40) < 0.07
    for got, want in zip(call(wkv6_reference, *arrays, resets=resets), by_numpy(arrays, resets), strict=True):
        assert proof.rms_error(got, want) < 1e-6


@pytest.mark.skipif(not parity.installed("torch", "fla"), reason="needs torch and fla-core")
def test_values_and_gradients_are_those_of_flash_linear_attention():
    """Its definition, which has heads before tokens and a state of keys x values."""
    import fla
    import torch

    file = pathlib.Path(fla.__file__).parent / "ops/rwkv6/recurrent_naive.py"  # fla.ops itself asks for triton
    spec = importlib.util.spec_from_file_location("recurrent_naive", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arrays = make(np.random.RandomState(0), jnp.float32, H=2)
    got = proof.value_and_gradients(functools.partial(call, wkv6), arrays)
    r, g, k, v, u, s = theirs = [torch.tensor(np.asarray(x), requires_grad=True) for x in arrays]
    turned = [x.transpose(1, 2) for x in (r, k, v, g)]
    y, s = module.naive_recurrent_rwkv6(*turned, u, scale=1.0, initial_state=s.transpose(2, 3), output_final_state=True)
    want = [y.transpose(1, 2), s.transpose(2, 3)]
    weights = [torch.tensor(np.random.RandomState(7 + i).normal(0, 1, x.shape), dtype=x.dtype) for i, x in enumerate(want)]
    torch.autograd.backward(want, weights)
    for mine, other in zip(got, [*(x.detach() for x in want), *(x.grad for x in theirs)], strict=True):
        assert proof.rms_error(mine, other) < 2e-6


CALLS = {
    "RWKV-6, heads, ragged, with documents": {"T": 37, "H": 2, "resets": True},
    "RWKV-5, heads, ragged, with documents": {"T": 37, "H": 2, "constant": True, "resets": True},
    "all is forgotten": {"B": 1, "decays": [10.0]},
    "nothing is forgotten": {"B": 1, "decays": [-20.0]},
    "RWKV-5, all is forgotten": {"B": 1, "T": 37, "decays": [10.0], "constant": True},
}


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(name, implementation):
    """Values and every gradient."""
    proof.check_numerics(case(**CALLS[name]), jnp.float32, implementation)


@pytest.mark.parametrize("constant", [False, True])
def test_bf16(constant):
    proof.check_numerics(case(resets=True, constant=constant), jnp.bfloat16)


@pytest.mark.parametrize(("dtype", "implementation", "bound"), [("bfloat16", "interpret", 5e-3), ("float32", "xla", 1e-5)])
def test_the_slope_of_a_strong_decay_has_its_digits(dtype, implementation, bound):
    """At exp(-25) it is a 1e-11 of all that stands beside it: a difference of sums would have none left."""
    proof.check_numerics(case(B=1, decays=[np.log(25.0)]), jnp.dtype(dtype), implementation, bound)
    of = case(B=1, decays=[np.log(25.0)])
    slope = proof.value_and_gradients(of.reference, of.make(np.random.RandomState(0), jnp.float32))[3]
    assert 1e-13 < np.abs(slope).max() < 1e-8


def test_minus_infinity_is_a_log_decay():
    r, g, *rest = make(np.random.RandomState(0), jnp.float32, B=1)
    for implementation in ("xla", "interpret"):
        f = functools.partial(call, wkv6, implementation=implementation)
        got, want = (proof.value_and_gradients(f, (r, jnp.where(g < -5, low, g), *rest)) for low in (-jnp.inf, -1e4))
        assert all(proof.rms_error(g, w) < 1e-6 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("constant", [False, True])
def test_segments(constant, monkeypatch):
    monkeypatch.setattr(wkv6_xla, "SEGMENT_BUDGET", 1)  # a chunk at a time
    proof.check_numerics(case(T=37, resets=True, constant=constant), jnp.float32, "xla")


def test_few_tokens_and_one():
    for T in (1, 5):
        proof.check_numerics(case(T=T), jnp.float32, "auto")


@pytest.mark.parametrize("decays", [[10.0], [-20.0], MIXED], ids=["strongest", "weakest", "mixed"])
def test_65536_steps_in_bf16(decays):
    arrays = make(np.random.RandomState(0), jnp.bfloat16, B=1, T=65536, decays=decays)
    got = jax.jit(functools.partial(call, wkv6, implementation="xla"))(*arrays)
    want = jax.jit(functools.partial(call, wkv6_reference))(*[x.astype(jnp.float32) for x in arrays])
    assert max(proof.rms_error(g, w) for g, w in zip(got, want, strict=True)) < 5e-3


def test_kernels_in_bf16_over_many_chunks():
    """Rounding does not pile up: 2,048 tokens are off by no more than 40, where all is kept."""
    of = case(B=1, T=2048, decays=[-8.0])
    arrays = of.make(np.random.RandomState(0), jnp.bfloat16)
    got = jax.jit(functools.partial(of.call, "interpret"))(*arrays)
    want = jax.jit(of.reference)(*[x.astype(jnp.float32) for x in arrays])
    assert max(proof.rms_error(g, w) for g, w in zip(got, want, strict=True)) < 5e-3


def test_under_jit_vmap_scan_and_remat():
    proof.check_transforms(case(B=1, T=20, resets=True, constant=True))


def test_cut_anywhere_is_the_same():
    arrays = make(np.random.RandomState(0), jnp.float32, B=1, T=50)

    def cut(r, g, k, v, u, s):
        outs = []
        for part in (slice(0, 17), slice(17, 18), slice(18, 50)):
            y, s = wkv6(*(x[:, part] for x in (r, g, k, v)), u, s_BxHxNxN=s)
            outs.append(y)
        return jnp.concatenate(outs, axis=1), s

    whole = functools.partial(call, wkv6)
    for got, want in zip(*(proof.value_and_gradients(f, arrays) for f in (cut, whole)), strict=True):
        assert proof.rms_error(got, want) < 2e-6


@pytest.mark.parametrize(("constant", "bytes_a_channel"), [(False, 10), (True, 6)])
def test_what_backward_keeps_is_the_inputs(constant, bytes_a_channel):
    arrays = make(np.random.RandomState(0), jnp.bfloat16, T=300, N=32, constant=constant)[:5]
    _, pull = jax.vjp(lambda *x: wkv6(*x), *arrays)
    weights = sum(x.nbytes for x in arrays if x.ndim == 2)
    kept = sum(x.nbytes for x in jax.tree.leaves(pull) if hasattr(x, "nbytes"))
    assert kept == bytes_a_channel * arrays[0].size + weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "palas"}, "implementation='palas' is none of auto, pallas"),
        ({"k_BxTxHxN": np.zeros((2, 40, 1, 8))}, r"k \(2, 40, 1, 8\), .* must be three times one \(B, T, H, N\)"),
        ({"log_decay": np.zeros((2, 40, 1))}, r"log_decay is \(2, 40, 1\) and must be \(2, 40, 1, 16\), or \(1, 16\)"),
        ({"u_HxN": np.zeros(16)}, r"u_HxN is \(16,\) and must be \(1, 16\)"),
        ({"s_BxHxNxN": np.zeros((2, 1, 16, 8))}, r"s_BxHxNxN is \(2, 1, 16, 8\) and must be \(2, 1, 16, 16\)"),
        ({"resets_BxT": np.zeros((2, 7))}, r"resets_BxT is \(2, 7\)"),
        ({"implementation": "pallas"}, "cannot be had: r, k, v: dtypes float32, .* are not all bfloat16"),
    ],
)
def test_what_makes_no_sense_is_told(change, message):
    names = ("r_BxTxHxN", "log_decay", "k_BxTxHxN", "v_BxTxHxN", "u_HxN")
    arrays = dict(zip(names, make(np.random.RandomState(0), jnp.float32), strict=False))
    with pytest.raises(ValueError, match=message):
        wkv6(**(arrays | change))


def test_a_head_that_the_kernels_do_not_take():
    x = np.zeros((1, 20, 1, 24), jnp.bfloat16)
    with pytest.raises(ValueError, match="a head of 24 is none of 16, 32, 64"):
        wkv6(*[x] * 4, x[0, 0], implementation="pallas")
