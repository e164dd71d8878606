"""Flash attention: every kind of call against a definition in NumPy, the kernels against that definition, and their code."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels import attention as kernel
from jaxvram.kernels import backend

NAMES = {"flash_attention_forward", "flash_attention_backward_kv", "flash_attention_backward_q"}


@dataclasses.dataclass(frozen=True)
class Call:
    B: int = 2
    T: int = 70
    S: int = 70
    H: int = 2
    G: int = 2
    K: int = 64
    options: dict = dataclasses.field(default_factory=dict)
    traced_offset: int | None = None

    def make(self, rng, dtype):
        shapes = (self.T, self.H), (self.S, self.G), (self.S, self.G)
        return tuple(jnp.asarray(rng.normal(0, 1, (self.B, n, heads, self.K)), dtype) for n, heads in shapes)

    def all_options(self):
        rng, options = np.random.RandomState(3), dict(self.options)
        if options.pop("segments", False):
            options["query_segments_BxT"] = np.sort(rng.randint(0, 4, (self.B, self.T)), -1).astype(np.int32)
            options["key_segments_BxS"] = np.sort(rng.randint(0, 4, (self.B, self.S)), -1).astype(np.int32)
        if self.traced_offset is not None:
            options["offset"] = jnp.int32(self.traced_offset)
        return options

    def case(self):
        options = self.all_options()
        run = lambda implementation, q, k, v: kernel.attention(q, k, v, implementation=implementation, **options)
        return proof.Case(self.make, run, lambda q, k, v: kernel.attention_reference(q, k, v, **options))


CALLS = {
    "causal": Call(),
    "full": Call(options={"causal": False}),
    "long": Call(T=200, S=200, H=1, G=1, K=32),
    "grouped": Call(H=4, G=2, T=100, S=100),
    "cross": Call(B=1, T=70, S=150, K=96, options={"causal": False}),
    "prefill": Call(T=40, S=120, options={"offset": 60}),
    "head_80": Call(K=80),
    "head_100": Call(K=100, T=65, S=65),
    "head_256": Call(B=1, K=256, T=70, S=70),
    "lengths": Call(T=130, S=130, options={"key_lengths_B": np.array([100, 0], np.int32)}),
    "lengths_full": Call(T=30, S=130, options={"key_lengths_B": np.array([77, 130], np.int32), "causal": False}),
    "segments": Call(T=150, S=150, options={"segments": True}),
    "segments_cross": Call(T=90, S=150, options={"segments": True, "causal": False}),
    "window": Call(T=200, S=200, H=1, G=1, options={"window": 40}),
    "soft_cap": Call(options={"soft_cap": 2.0, "scale": 0.5}),
    "everything": Call(
        T=130, S=140, H=4, G=2, K=48, traced_offset=8,
        options={"window": 50, "soft_cap": 5.0, "segments": True, "key_lengths_B": np.int32([139, 90]), "scale": 0.3},
    ),
}  # fmt: skip


def by_numpy(call: Call, q, k, v):
    """Query by query, in float64."""
    o, options = np.zeros(q.shape), call.all_options()
    cap, window, scale = (options.get(name) for name in ("soft_cap", "window", "scale"))
    for b, t, h in np.ndindex(q.shape[:3]):
        p, seen = int(options.get("offset", 0)) + t, np.ones(call.S, bool)
        s = np.arange(call.S)
        if options.get("causal", True):
            seen &= s <= p
        if window:
            seen &= s > p - window
        if "key_lengths_B" in options:
            seen &= s < options["key_lengths_B"][b]
        if "key_segments_BxS" in options:
            seen &= options["key_segments_BxS"][b] == options["query_segments_BxT"][b, t]
        scores = k[b, :, h // (call.H // call.G)] @ q[b, t, h] * (scale or call.K**-0.5)
        e = np.exp(cap * np.tanh(scores / cap) if cap else scores) * seen
        o[b, t, h] = e / max(e.sum(), 1e-300) @ v[b, :, h // (call.H // call.G)]
    return o


@pytest.mark.parametrize("name", CALLS)
def test_the_definition(name):
    call = CALLS[name]
    arrays = call.make(np.random.RandomState(0), np.float32)
    got = jax.jit(call.case().reference)(*arrays)
    assert proof.rms_error(got, by_numpy(call, *(np.asarray(x, np.float64) for x in arrays))) < 1e-6


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(name, implementation, monkeypatch):
    monkeypatch.setattr("jaxvram.kernels.attention_xla.SCORES_BUDGET", 1)  # in as many chunks as there can be
    proof.check_numerics(CALLS[name].case(), jnp.float32, implementation)


@pytest.mark.parametrize("name", ["causal", "cross", "everything", "head_256"])
def test_bf16(name):
    proof.check_numerics(CALLS[name].case(), jnp.bfloat16)


@pytest.mark.parametrize("name", ["grouped", "everything"])
def test_under_jit_vmap_scan_and_remat(name):
    proof.check_transforms(CALLS[name].case())


@pytest.mark.parametrize(("T", "S", "offset", "window"), [(1, 2100, 1900, None), (3, 1100, 900, 600), (1, 2100, 5, None)])
def test_a_new_token_to_a_long_cache(T, S, offset, window):
    """Heads of a group packed, keys split among programs; most splits see nothing in the last case."""
    call = Call(T=T, S=S, H=4, G=2, options={} if window is None else {"window": window}, traced_offset=offset)
    proof.check_numerics(call.case(), jnp.float32)


def test_scores_far_apart_stay_finite():
    call = Call()
    q, k, v = call.make(np.random.RandomState(0), jnp.float32)
    got = proof.value_and_gradients(functools.partial(kernel.attention, implementation="interpret"), (q * 100, k * 100, v))
    assert all(np.isfinite(x).all() for x in got)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_a_query_that_sees_nothing_gives_zero_and_has_no_gradient(implementation):
    call = CALLS["lengths"]
    attend = functools.partial(kernel.attention, implementation=implementation, **call.all_options())
    o, dq, dk, dv = proof.value_and_gradients(attend, call.make(np.random.RandomState(0), jnp.float32))
    assert not np.asarray(o[1]).any() and not any(np.asarray(x[1]).any() for x in (dq, dk, dv))


def test_auto_on_this_machine_is_xla_and_holds_no_scores_of_all():
    call = Call(B=1, T=512, S=512, H=1, G=1)
    q, k, v = call.make(np.random.RandomState(0), jnp.float32)
    loss = jax.grad(lambda q, k, v: kernel.attention(q, k, v).sum(), (0, 1, 2))
    text = jax.jit(loss).lower(q, k, v).compile().as_text()
    assert "conditional" not in text and "while" not in text  # neither a choice at run time nor an interpreted kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "palas"}, "implementation='palas' is none of auto, pallas"),
        ({"implementation": "pallas", "dropout_rate": 0.1, "dropout_key": 0}, "'pallas' cannot be had: dropout_key: "),
        ({"window": 0}, "window=0 needs causal=True"),
        ({"window": 5, "causal": False}, "window=5 needs causal=True"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0 must be positive"),
        ({"key_segments_BxS": np.zeros((2, 70))}, "query_segments_BxT and key_segments_BxS, or neither"),
        ({"key_lengths_B": np.zeros(3)}, r"key_lengths_B is \(3,\) and must be \(2,\)"),
    ],
)
def test_what_makes_no_sense_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        kernel.attention(*Call().make(np.random.RandomState(0), jnp.float32), **change)


def test_a_head_too_large_is_named_by_pallas_and_said_once_by_auto(caplog):
    q, k, v = Call(T=80, S=80, K=264).make(np.random.RandomState(0), jnp.float32)
    with pytest.raises(ValueError, match="q: a head of 264 exceeds 256"):
        kernel.attention(q, k, v, implementation="pallas")
    backend._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_allclose(kernel.attention(q, k, v), kernel.attention_reference(q, k, v), rtol=1e-5, atol=1e-6)
    assert len(caplog.records) == 1 and "no kernel for this call, XLA computes it" in caplog.text


def code_of(B, T, S, H, G, K, dtype, **options):
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    loss = lambda q, k, v: kernel.attention(q, k, v, **options).astype(jnp.float32).sum()
    return jax.value_and_grad(loss, (0, 1, 2)), (spec(B, T, H, K), spec(B, S, G, K), spec(B, S, G, K))


SHAPES = {
    "gpt2": (8, 1024, 1024, 12, 12, 64),
    "gpt2_odd": (2, 1000, 1000, 12, 12, 64),
    "llama": (2, 2048, 2048, 8, 2, 128),
    "head_32": (2, 256, 256, 4, 4, 32),
    "head_80": (2, 1024, 1024, 4, 4, 80),
    "head_100": (2, 999, 999, 4, 4, 100),
    "head_256": (2, 1024, 1024, 4, 2, 256),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["causal", "full", "rich"])
def test_machine_code_for_ada(shape, kind):
    B, T, S, H, G, K = SHAPES[shape]
    ids = np.zeros((B, T), np.int32)
    rich = {"soft_cap": 30.0, "window": 300, "query_segments_BxT": ids, "key_segments_BxS": ids}
    options = rich if kind == "rich" else {"causal": kind == "causal"}
    proof.check_machine_code(*code_of(B, T, S, H, G, K, jnp.bfloat16, **options), "rtx4070", NAMES, True)


@pytest.mark.slow
@pytest.mark.parametrize("K", [64, 128, 256])
def test_machine_code_in_fp32(K):
    proof.check_machine_code(*code_of(2, 500, 500, 2, 2, K, jnp.float32), "rtx4070", NAMES, False)


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS[1:])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_machine_code_elsewhere(card, shape):
    proof.check_machine_code(*code_of(*SHAPES[shape], jnp.bfloat16), card, NAMES, True)


def test_machine_code_of_decoding():
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    attend = lambda q, k, v, offset: kernel.attention(q, k, v, offset=offset)
    args = spec(1, 1, 8, 128), spec(1, 4096, 2, 128), spec(1, 4096, 2, 128), jax.ShapeDtypeStruct((), jnp.int32)
    proof.check_machine_code(attend, args, "rtx4070", {"flash_attention_forward"}, True)
