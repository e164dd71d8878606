"""Scalar decay: every kind of call against NumPy in float64, by kernels, by XLA, by the definition; and their code."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest
import quick

from jaxvram.kernels import scalar_decay_pallas, scalar_decay_xla
from jaxvram.kernels.retention import log_gammas
from jaxvram.kernels.scalar_decay import scalar_decay, scalar_decay_reference
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

FORWARD = {"scalar_decay_forward"}
NAMES = FORWARD | {f"scalar_decay_{name}" for name in ("states_from_start", "states_from_end", "by_head", "by_group")}


@dataclasses.dataclass(frozen=True)
class Call:
    B: int = 2
    T: int = 70
    G: int = 1
    H: int = 2
    P: int = 16
    N: int = 16
    weight: bool = True
    state: bool = True
    resets: bool = False
    decay: str = "usual"

    def make(self, rng, dtype):
        """q, k, v, log decay, and weight and state where there are any."""
        B, T, G, H, P, N = (getattr(self, name) for name in "BTGHPN")
        q, k, v = (rng.normal(0, 1, shape) for shape in ((B, T, G, N), (B, T, G, N), (B, T, H, P)))
        usual = -np.log1p(np.exp(rng.normal(-1, 2, (B, T, H))))
        mixed = np.where(usual < -1, -100.0, -1e-3)
        fixed = np.log1p(-(2.0 ** (-2 - np.arange(H))))
        drawn = {"fixed": fixed, "slow": np.full_like(usual, -1e-6), "fast": usual - 20, "mixed": mixed}
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v)] + [jnp.float32(drawn.get(self.decay, usual))]
        if self.weight:
            arrays.append(jnp.float32(np.log1p(np.exp(rng.normal(0, 1, (B, T, H))))))
        if self.state:
            arrays.append(jnp.float32(rng.normal(0, 1, (B, H, P, N))))
        return tuple(arrays)

    def options(self, arrays):
        """Keywords of the arrays behind the first four."""
        rest, options = list(arrays[4:]), {}
        if self.weight:
            options["weight_BxTxH"] = rest.pop(0)
        if self.state:
            options["h_BxHxPxN"] = rest.pop(0)
        if self.resets:
            options["resets_BxT"] = np.random.RandomState(3).rand(self.B, self.T) < 0.05
        return options

    def run(self, f, *arrays):
        return f(*arrays[:4], **self.options(arrays))

    def case(self):
        by = lambda implementation: functools.partial(scalar_decay, implementation=implementation)
        run = lambda implementation, *arrays: self.run(by(implementation), *arrays)
        return proof.Case(self.make, run, lambda *arrays: self.run(scalar_decay_reference, *arrays))


CALLS = {
    "mamba2": Call(),
    "heads_of_their_own": Call(G=2, weight=False, resets=True),
    "groups_and_documents": Call(B=1, T=67, G=2, H=4, P=20, N=19, resets=True),
    "odd": Call(T=65, H=1, P=37, N=100, B=1, state=False),
    "short": Call(T=3, state=True),
    "slow": Call(T=40, decay="slow"),
    "fast": Call(T=40, decay="fast"),
    "mixed": Call(T=90, decay="mixed", resets=True),
    "wide": Call(B=1, T=70, P=20, N=200, resets=True),
    "retention": Call(T=67, G=2, P=27, N=24, weight=False, decay="fixed", resets=True),
    "wide_retention": Call(B=1, T=130, G=2, P=43, N=256, weight=False, decay="fixed", resets=True),
    "fixed_and_weighted": Call(B=1, T=40, H=4, P=20, N=20, decay="fixed"),
}


LONG = ("mamba2", "wide_retention")  # of more than one segment, where a segment is a chunk


def slopes_by_numpy(call, arrays):
    """Values, and all gradients of a fixed cotangent, in float64: token by token, backwards by the adjoint recurrence."""
    q, k, v, g, *_ = (np.asarray(x, np.float64) for x in arrays)
    options = {name: np.asarray(x, np.float64) for name, x in call.options(arrays).items()}
    B, T, H, P, N = *v.shape[:3], call.P, call.N
    g = np.broadcast_to(g, (B, T, H))
    heads = np.arange(H) * call.G // H
    q, k = q[:, :, heads], k[:, :, heads]
    w, resets = options.get("weight_BxTxH", np.ones_like(g)), options.get("resets_BxT", np.zeros((B, T)))
    decay = np.exp(g) * (resets == 0)[:, :, None]
    h, states, o = options.get("h_BxHxPxN", np.zeros((B, H, P, N))), [], []
    for t in range(T):
        states.append(h)
        h = decay[:, t, :, None, None] * h + np.einsum("bh,bhp,bhn->bhpn", w[:, t], v[:, t], k[:, t])
        o.append(np.einsum("bhpn,bhn->bhp", h, q[:, t]))
    o = np.stack(o, 1)
    cotangent = lambda seed, x: np.float64(np.random.RandomState(seed).normal(0, 1, x.shape).astype(np.float32))
    do, dh = cotangent(7, o), cotangent(8, h)
    results, last = [[] for _ in range(5)], h
    for t in reversed(range(T)):
        dh = dh + np.einsum("bhp,bhn->bhpn", do[:, t], q[:, t])
        results[0].append(np.einsum("bhpn,bhp->bhn", last, do[:, t]))
        results[1].append(np.einsum("bhpn,bhp,bh->bhn", dh, v[:, t], w[:, t]))
        results[2].append(np.einsum("bhpn,bhn,bh->bhp", dh, k[:, t], w[:, t]))
        results[3].append((dh * states[t]).sum((-1, -2)) * decay[:, t])
        results[4].append(np.einsum("bhpn,bhp,bhn->bh", dh, v[:, t], k[:, t]))
        dh, last = decay[:, t, :, None, None] * dh, states[t]
    dq, dk, dv, dg, dw = (np.stack(x[::-1], 1) for x in results)
    dq, dk = (x.reshape(B, T, call.G, H // call.G, N).sum(3) for x in (dq, dk))
    dg = np.zeros(H) if call.decay == "fixed" else dg  # a constant
    return [o, h, dq, dk, dv, dg, *([dw] if call.weight else []), *([dh] if call.state else [])]


@pytest.mark.parametrize("implementation", ["interpret", "interpret_segments", "xla", "xla_segments"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_numpy_in_float64(name, implementation, monkeypatch):
    """Values and every gradient; at fast decays the slope of g is 1e-9 of what begins and ends, and right nevertheless."""
    if implementation == "xla_segments":
        monkeypatch.setattr(scalar_decay_xla, "CHUNK", 16)
        monkeypatch.setattr(scalar_decay_xla, "SEGMENT_BUDGET", 1)  # a chunk at a time
    if implementation == "interpret_segments":
        if name not in LONG:
            pytest.skip("one chunk")
        monkeypatch.setattr(scalar_decay_pallas, "BUDGET", 1)
    call = CALLS[name]
    arrays = call.make(np.random.RandomState(0), jnp.float32)
    run = functools.partial(call.case().call, implementation.partition("_")[0])
    got = proof.value_and_gradients(run, arrays, quick.jit)
    errors = [proof.rms_error(g, w) for g, w in zip(got, slopes_by_numpy(call, arrays), strict=True)]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize("name", ["groups_and_documents", "fast", "retention"])
def test_the_definition(name):
    call = CALLS[name]
    arrays = call.make(np.random.RandomState(0), jnp.float32)
    got = proof.value_and_gradients(call.case().reference, arrays)
    errors = [proof.rms_error(g, w) for g, w in zip(got, slopes_by_numpy(call, arrays), strict=True)]
    assert max(errors) < 2e-6, errors


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("name", ["mamba2", "groups_and_documents", "wide_retention"])
def test_bf16(name, implementation):
    proof.check_numerics(CALLS[name].case(), jnp.bfloat16, implementation)


def test_under_jit_vmap_scan_and_remat():
    proof.check_transforms(Call(B=1, T=35, G=1, H=2, P=16, N=16, resets=True).case())


def test_quadratic_form_of_the_dual():
    """o_t = sum_s (q_t . k_s) w_s prod_{s < r <= t} a_r v_s: attention with a mask of decays, written out in float64."""
    call = CALLS["mixed"]
    q, k, v, g, w, h = (np.asarray(x, np.float64) for x in call.make(np.random.RandomState(0), jnp.float32))
    resets = call.options((q, k, v, g, w, h))["resets_BxT"]
    a, o = np.exp(g) * ~resets[..., None], np.zeros(v.shape)
    for b, t, head in np.ndindex(*g.shape):
        for s in range(t + 1):
            o[b, t, head] += q[b, t, 0] @ k[b, s, 0] * w[b, s, head] * a[b, s + 1 : t + 1, head].prod() * v[b, s, head]
        o[b, t, head] += a[b, : t + 1, head].prod() * h[b, head] @ q[b, t, 0]
    f = lambda *x: call.run(functools.partial(scalar_decay, implementation="xla"), *x)[0]
    assert proof.rms_error(f(*map(np.float32, (q, k, v, g, w, h))), o) < 1e-6


def test_mamba2_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.mamba2 import modeling_mamba2

    q, k, v, _, w, h = Call(T=50, G=2, H=4, P=8, N=12).make(np.random.RandomState(0), jnp.float32)
    A = -np.arange(1.0, 5.0, dtype=np.float32)
    to_torch = lambda x: torch.tensor(np.asarray(x), requires_grad=True)
    inputs = [to_torch(x) for x in (v, w, A, k, q)]
    state = to_torch(h)
    scan = getattr(modeling_mamba2.mamba2_chunk_scan, "__wrapped__", modeling_mamba2.mamba2_chunk_scan)
    o, last = scan(*inputs, chunk_size=16, initial_states=state, return_final_states=True)
    (o.sin().sum() + last.sin().sum()).backward()

    def loss(v, w, A, k, q, h):
        o, last = scalar_decay(q, k, v, A * w, w, h_BxHxPxN=h, implementation="xla")
        return jnp.sin(o).sum() + jnp.sin(last).sum(), (o, last)

    gradients, (got, got_last) = jax.grad(loss, tuple(range(6)), has_aux=True)(v, w, A, k, q, h)
    assert proof.rms_error(got, o.detach()) < 1e-5 and proof.rms_error(got_last, last.detach()) < 1e-5
    for mine, theirs in zip(gradients, [*inputs, state], strict=True):
        assert proof.rms_error(mine, theirs.grad) < 1e-5


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_cut_anywhere_is_the_same(implementation):
    call = Call(T=50, B=1, G=1, H=2, resets=False)
    arrays = call.make(np.random.RandomState(0), jnp.float32)
    whole = functools.partial(scalar_decay, implementation=implementation)

    def cut(q, k, v, g, w, *, h_BxHxPxN):
        outs, h = [], h_BxHxPxN
        for part in (slice(0, 17), slice(17, 18), slice(18, 50)):
            o, h = whole(*(x[:, part] for x in (q, k, v, g, w)), h_BxHxPxN=h)
            outs.append(o)
        return jnp.concatenate(outs, axis=1), h

    run = lambda f: proof.value_and_gradients(lambda *arrays: f(*arrays[:5], h_BxHxPxN=arrays[5]), arrays)
    for got, want in zip(run(cut), run(whole), strict=True):
        assert proof.rms_error(got, want) < 2e-6


def test_a_decay_to_nothing_and_beyond_is_finite():
    call = Call(T=40)
    q, k, v, g, *rest = call.make(np.random.RandomState(0), jnp.float32)
    for decay in (-1e4, -np.inf):
        run = functools.partial(call.case().call, "xla")
        got = proof.value_and_gradients(run, (q, k, v, jnp.full_like(g, decay), *rest))
        own = (q * k).sum(-1)[..., None] * rest[0][..., None] * v  # every token sees itself alone
        assert all(np.isfinite(x).all() for x in got) and proof.rms_error(got[0], own) < 1e-6


def test_what_backward_keeps_is_the_inputs():
    call = Call(T=300, H=2, P=32, N=16, weight=False, state=False)
    arrays = call.make(np.random.RandomState(0), jnp.bfloat16)
    _, pull = jax.vjp(lambda *x: call.run(functools.partial(scalar_decay, implementation="xla"), *x), *arrays)
    kept = sum(x.nbytes for x in jax.tree.leaves(pull) if hasattr(x, "nbytes"))
    assert kept == sum(x.nbytes for x in arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "palas"}, "implementation='palas' is none of auto, pallas"),
        ({"k_BxTxGxN": np.zeros((2, 70, 1, 8))}, "do not belong together"),
        ({"h_BxHxPxN": np.zeros((2, 2, 16, 8))}, r"h_BxHxPxN is \(2, 2, 16, 8\) and must be \(2, 2, 16, 16\)"),
        ({"resets_BxT": np.zeros((2, 7))}, r"resets_BxT is \(2, 7\)"),
        ({"q_BxTxGxN": np.zeros((2, 70, 1, 16), np.float16), "implementation": "pallas"}, "cannot be had: q, k, v: dtypes"),
    ],
)
def test_what_makes_no_sense_is_told(change, message):
    names = ("q_BxTxGxN", "k_BxTxGxN", "v_BxTxHxP", "log_decay_BxTxH")
    arrays = dict(zip(names, Call().make(np.random.RandomState(0), jnp.float32), strict=False))
    with pytest.raises(ValueError, match=message):
        scalar_decay(**(arrays | change))


def code_of(B, T, G, H, P, N, dtype, resets=False, constant=False):
    """`constant`: retention, with its decays and no weights."""
    spec = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    rows = () if constant else (spec(B, T, H, dtype=jnp.float32),) * 2
    mask, gammas = np.zeros((B, T), bool) if resets else None, (log_gammas(H),) if constant else ()
    loss = lambda *arrays: scalar_decay(*arrays, *gammas, resets_BxT=mask)[0].astype(jnp.float32).sum()
    args = spec(B, T, G, N), spec(B, T, G, N), spec(B, T, H, P), *rows
    return jax.value_and_grad(loss, tuple(range(len(args)))), args


MAMBA2 = (8, 2048, 1, 24, 64, 128)


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code(card):
    proof.check_machine_code(*code_of(*MAMBA2, jnp.bfloat16), card, NAMES, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(2, 1000, 2, 2, 64, 64), (2, 999, 2, 4, 100, 128), (2, 2047, 1, 24, 64, 128), (1, 512, 4, 4, 128, 128)]
)
def test_machine_code_of_other_sizes(shape):
    proof.check_machine_code(*code_of(*shape, jnp.bfloat16, resets=True), "rtx4070", NAMES, True)


@pytest.mark.slow
@pytest.mark.parametrize("N", [64, 100, 128])
def test_machine_code_in_fp32(N):
    proof.check_machine_code(*code_of(2, 100, 1, 2, 64, N, jnp.float32), "rtx4070", NAMES, False)


RETNET = (4, 2048, 4, 4, 432, 256)  # medium
WALKS = {f"scalar_decay_{name}" for name in ("states_from_start", "states_from_end")}
RETAINED = WALKS | {f"scalar_decay_{name}" for name in ("outputs", "dv", "by_group")}


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code_of_retention(card):
    proof.check_machine_code(*code_of(*RETNET, jnp.bfloat16, constant=True), card, RETAINED, True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2047, 10, 10, 428, 256), (2, 1024, 8, 8, 512, 256), (1, 999, 3, 3, 200, 200)])
def test_machine_code_of_other_retention(shape):
    """Values of 428 (3b, 13b) and 512, lengths and keys that no tile divides, and documents."""
    proof.check_machine_code(*code_of(*shape, jnp.bfloat16, resets=True, constant=True), "rtx4070", RETAINED, True)


@pytest.mark.slow
def test_machine_code_of_narrow_retention_and_of_wide_keys_with_decays():
    narrow = FORWARD | RETAINED - {"scalar_decay_outputs"}
    proof.check_machine_code(*code_of(1, 512, 2, 2, 64, 64, jnp.bfloat16, constant=True), "rtx4070", narrow, True)
    wide = WALKS | {f"scalar_decay_{name}" for name in ("outputs", "by_head", "by_group")}
    proof.check_machine_code(*code_of(1, 512, 1, 2, 128, 256, jnp.bfloat16), "rtx4070", wide, True)
    proof.check_machine_code(*code_of(1, 100, 1, 1, 428, 256, jnp.float32), "rtx4070", wide, False)


@pytest.mark.slow
def test_what_a_layer_makes_on_its_way_does_not_grow_with_length():
    """The peak is arguments, results, and what does not depend on T: an o and its gradient, and a segment's rest."""
    rest = {}
    for T in (16_384, 65_536):
        fn, args = code_of(1, T, 4, 4, 432, 256, jnp.bfloat16, constant=True)
        compiled = compile_for(cards.find("rtx4070"), fn, args)
        inputs = sum(math.prod(x.shape) * 2 for x in args)
        rest[T] = compiled.peak_bytes - 2 * inputs - 2 * (2 * T * 4 * 432)
    assert rest[16_384] < 360 * 2**20 and rest[65_536] < 1.1 * rest[16_384]
