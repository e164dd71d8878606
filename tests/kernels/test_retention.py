"""The tiled parallel form of retention: against NumPy in float64 and fla, what it skips, and its code; who runs it when."""

import dataclasses
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest
import quick

from jaxvram.kernels import retention_pallas
from jaxvram.kernels.retention import is_short, log_gammas, retention, retention_parallel, retention_tiled
from jaxvram.kernels.scalar_decay import scalar_decay_reference
from jaxvram.models.retnet import SIZES, RetNetConfig, places, retain

FAST = np.log(np.float32([0.85, 0.5, 1e-3]))  # reaches of 102, 24 and 2 tokens


@dataclasses.dataclass(frozen=True)
class Call:
    B: int = 2
    T: int = 70
    H: int = 3
    K: int = 16
    P: int = 20
    resets: float = 0.0  # documents a token
    fast: bool = False

    @property
    def gammas(self):
        return FAST if self.fast else log_gammas(self.H)

    @property
    def resets_BxT(self):
        return np.random.RandomState(3).rand(self.B, self.T) < self.resets if self.resets else None

    def make(self, rng, dtype):
        shape = lambda width: (self.B, self.T, self.H, width)
        return tuple(jnp.asarray(rng.normal(0, 1, shape(width)), dtype) for width in (self.K, self.K, self.P))

    def case(self):
        run = lambda implementation, *qkv: retention_tiled(*qkv, self.gammas, self.resets_BxT, implementation)
        return proof.Case(self.make, run, lambda *qkv: retention_parallel(*qkv, self.gammas, self.resets_BxT))


CALLS = {
    "ragged": Call(),
    "documents": Call(B=1, T=201, H=2, K=24, P=37, resets=0.03),
    "wide": Call(B=1, T=67, H=1, K=256, P=43, resets=0.03),
    "narrow": Call(T=16, H=1, K=128, P=16),
    "groups_of_values": Call(B=1, T=40, H=2, K=20, P=300),
    "heads_of_65b": Call(B=1, T=33, H=32),
    "out_of_reach": Call(T=300, fast=True),
    "out_of_reach_and_documents": Call(B=1, T=300, fast=True, resets=0.02),
}


def seen_BxTxT(call):
    distance_TxT = np.arange(call.T)[:, None] - np.arange(call.T)
    seen = np.broadcast_to(distance_TxT >= 0, (call.B, call.T, call.T))
    if call.resets:
        document = np.cumsum(call.resets_BxT, 1)
        seen = seen & (document[:, :, None] == document[:, None])
    return distance_TxT, seen


def by_numpy(call, arrays):
    """o, dq, dk, dv of a fixed cotangent, in float64, all by all."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    do = np.float64(np.random.RandomState(7).normal(0, 1, v.shape).astype(np.float32))
    distance, seen = seen_BxTxT(call)
    gamma = np.exp(np.float64(call.gammas))[:, None, None]
    D = np.where(seen[:, None], gamma ** np.maximum(distance, 0), 0)
    scores = np.einsum("bnhk,bmhk->bhnm", q, k) * D
    slopes = np.einsum("bnhp,bmhp->bhnm", do, v) * D
    o, dv = np.einsum("bhnm,bmhp->bnhp", scores, v), np.einsum("bhnm,bnhp->bmhp", scores, do)
    return o, np.einsum("bhnm,bmhk->bnhk", slopes, k), np.einsum("bhnm,bnhk->bmhk", slopes, q), dv


@pytest.mark.parametrize("name", CALLS)
def test_equals_numpy_in_float64(name):
    call = CALLS[name]
    arrays = call.make(np.random.RandomState(0), jnp.float32)
    got = proof.value_and_gradients(functools.partial(call.case().call, "interpret"), arrays, quick.jit)
    errors = [proof.rms_error(g, w) for g, w in zip(got, by_numpy(call, arrays), strict=True)]
    assert max(errors) < 1e-6, errors


@pytest.mark.parametrize("name", ["documents", "out_of_reach"])
def test_elsewhere_it_is_chunks_by_xla(name):
    call = CALLS[name]
    arrays = call.make(np.random.RandomState(0), jnp.float32)
    got = proof.value_and_gradients(functools.partial(call.case().call, "auto"), arrays, quick.jit)
    errors = [proof.rms_error(g, w) for g, w in zip(got, by_numpy(call, arrays), strict=True)]
    assert max(errors) < 1e-5, errors


def test_bf16():
    proof.check_numerics(Call(B=1, T=201, K=70, P=130, fast=True, resets=0.02).case(), jnp.bfloat16)


def test_under_jit_vmap_scan_and_remat():
    proof.check_transforms(Call(B=1, T=35, H=2, P=16, resets=0.1).case())


def test_naive_retention_of_flash_linear_attention():
    """fla's own definition, loaded as a file: its package asks for Triton. It scales q by K^-0.5 itself."""
    torch, found = pytest.importorskip("torch"), importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("fla-core is not installed")
    path = pathlib.Path(found.submodule_search_locations[0]) / "ops/retention/naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_retention", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    call = Call(T=100, H=4)
    arrays = call.make(np.random.RandomState(0), jnp.float32)
    inputs = [torch.tensor(np.asarray(x), requires_grad=True) for x in arrays]
    o = module.naive_retention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
    do = np.random.RandomState(7).normal(0, 1, o.shape).astype(np.float32)
    o.backward(torch.tensor(do))
    run = lambda q, k, v: call.case().call("interpret", call.K**-0.5 * q, k, v)
    got = proof.value_and_gradients(run, arrays, quick.jit)
    for mine, theirs in zip(got, (o.detach(), *(x.grad for x in inputs)), strict=True):
        assert proof.rms_error(mine, theirs) < 2e-6


SKIPS = {"out_of_reach": Call(B=1, T=250, P=16, fast=True), "documents": Call(B=1, T=250, P=16, fast=True, resets=0.02)}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", SKIPS)
def test_blocks_that_are_skipped_are_not_read(name, later):
    """z of one block of tokens at a time is not a number: that spreads to all blocks that visit it, weight 0 or not."""
    call, C = SKIPS[name], 32
    n = -(-call.T // C)
    x, y, z = (np.repeat(np.asarray(a), n, 0) for a in call.make(np.random.RandomState(0), jnp.float32))
    for c in range(n):
        z[c, c * C : (c + 1) * C] = np.nan
    bounds = retention_pallas._bounds(call.resets_BxT)[1 if later else 0]
    bounds = None if bounds is None else jnp.repeat(bounds, n, 0)
    run = functools.partial(retention_pallas.product, later=later, interpret=True, name="test")
    out = np.asarray(quick.jit(run)(x, y, z, call.gammas, bounds))
    padded = np.pad(np.isnan(out).any(-1), ((0, 0), (0, n * C - call.T), (0, 0)))
    got_HxRxC = padded.reshape(n, n, C, call.H).any(2).transpose(2, 1, 0)
    want_HxRxC = needed_HxRxC(call, C)
    np.testing.assert_array_equal(got_HxRxC, want_HxRxC.swapaxes(1, 2) if later else want_HxRxC)
    assert got_HxRxC.sum() < call.H * n * (n + 1) // 2
    if not call.resets:
        assert got_HxRxC.sum() == retention_pallas.pairs(call.gammas, call.T, C)


def needed_HxRxC(call, C):
    """Which blocks have a pair of tokens that one must see: of one document, of a weight of at least 2^-24."""
    n = -(-call.T // C)
    distance, seen = seen_BxTxT(call)
    reached = np.float64(call.gammas)[:, None, None] * np.maximum(distance, 0) >= np.log(2.0**-24)
    needed = np.pad(reached & seen[0], ((0, 0), (0, n * C - call.T), (0, n * C - call.T)))
    return needed.reshape(call.H, n, C, n, C).any((2, 4))


@pytest.mark.parametrize(("T", "C", "share"), [(2048, 64, 0.83), (1000, 64, 0.96), (512, 64, 1.0)])
def test_how_many_blocks_are_left_of_the_papers_heads(T, C, share):
    call, n = Call(B=1, T=T, H=4), -(-T // C)
    left = retention_pallas.pairs(call.gammas, T, C)
    assert left == needed_HxRxC(call, C).sum()
    assert left / (call.H * n * (n + 1) // 2) == pytest.approx(share, abs=0.01)


def test_reach_and_what_is_left_out():
    """The largest distance of a weight of 2^-24; beyond it lies less than 2^-24 of all weights of an endless row."""
    gammas = log_gammas(8)
    reach_H = retention_pallas.reach(gammas, 100_000)
    assert reach_H[:2].tolist() == [523, 1056] and (retention_pallas.reach(gammas, 400) == 400).all()
    assert (retention_pallas.reach(np.float32([0.0]), 50) == 50).all()
    gamma_H = np.exp(np.float64(gammas))
    assert (gamma_H**reach_H >= 2.0**-24).all() and (gamma_H ** (reach_H + 1.0) < 2.0**-24).all()
    assert (jnp.asarray(retention_pallas.reach(jnp.asarray(gammas), 100_000)) == reach_H).all()


def kernels_of(T, state=False, **options):
    """Kinds of kernels that retention in RetNet's `medium` is traced to, forward and backward."""
    cfg = RetNetConfig(**SIZES["medium"], vocab_size=7, **options)
    spec = lambda width: jax.ShapeDtypeStruct((1, T, cfg.n_head, width), jnp.bfloat16)
    where = places(cfg, jnp.zeros((1, T), jnp.int32), None, jnp.zeros((1, T), bool))
    h = jnp.zeros((1, cfg.n_head, cfg.value_size, cfg.key_size)) if state else None
    loss = lambda *qkvg: retain(*qkvg, where, cfg, h)[0].astype(jnp.float32).sum()
    widths = (cfg.key_size, cfg.key_size, cfg.value_size, cfg.value_size)
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*map(spec, widths)))
    return {kind for kind in ("retention", "scalar_decay") if f"pallas_{kind}_" in program}


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"T": 1024}, {"retention"}),
        ({"T": 1029}, {"scalar_decay"}),
        ({"T": 512, "state": True}, {"scalar_decay"}),
        ({"T": 16}, {"retention"}),
        ({"T": 15, "kernels": "pallas"}, {"scalar_decay"}),
        ({"T": 15}, set()),
        ({"T": 512, "kernels": "xla"}, set()),
    ],
    ids=str,
)
def test_who_runs(options, kernels):
    assert kernels_of(**options) == kernels


def test_narrow_heads_turn_to_chunks_sooner():
    assert is_short(200, 64, 64) and not is_short(210, 64, 64) and is_short(512, 256, 256)


def test_state_is_there_where_one_was():
    call = Call(T=40, resets=0.1)
    arrays = call.make(np.random.RandomState(0), jnp.float32)
    h = jnp.asarray(np.random.RandomState(1).normal(0, 1, (call.B, call.H, call.P, call.K)), jnp.float32)
    options = {"resets_BxT": call.resets_BxT}
    got = quick.jit(lambda h: retention(*arrays, call.gammas, h_BxHxPxK=h, **options))(h)
    want = quick.jit(lambda h: scalar_decay_reference(*arrays, call.gammas, h_BxHxPxN=h, **options))(h)
    assert max(proof.rms_error(g, w) for g, w in zip(got, want, strict=True)) < 1e-6
    assert jax.eval_shape(lambda: retention(*arrays, call.gammas, **options))[1] is None


def test_what_backward_keeps_is_the_inputs():
    call = Call(T=64, H=2, K=16, P=32)
    arrays = call.make(np.random.RandomState(0), jnp.bfloat16)
    pull = jax.eval_shape(lambda *qkv: jax.vjp(functools.partial(call.case().call, "auto"), *qkv)[1], *arrays)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))
    assert kept == sum(x.nbytes for x in arrays) + call.gammas.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "palas"}, "implementation='palas' is none of auto, pallas"),
        ({"k_BxTxHxK": np.zeros((2, 70, 3, 8))}, r"k \(2, 70, 3, 8\) and v \(2, 70, 3, 20\) do not belong together"),
        ({"q_BxTxHxK": np.zeros((70, 3, 16))}, "do not belong together"),
        ({"log_gamma_H": np.zeros(2)}, r"log_gamma_H is \(2,\) and must be \(3,\)"),
        ({"resets_BxT": np.zeros((2, 7))}, r"resets_BxT is \(2, 7\) and must be \(2, 70\)"),
        ({"q_BxTxHxK": np.zeros((2, 70, 3, 16), np.float16), "implementation": "pallas"}, "cannot be had: q, k, v: dtypes"),
    ],
)
def test_what_makes_no_sense_is_told(change, message):
    names, call = ("q_BxTxHxK", "k_BxTxHxK", "v_BxTxHxP"), Call(K=16, P=20)
    arrays = dict(zip(names, call.make(np.random.RandomState(0), jnp.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        retention_tiled(**(arrays | {"log_gamma_H": call.gammas} | change))


NAMES = {f"retention_{name}" for name in ("forward", "dq", "dk", "dv")}


def code_of(B, T, H, K, P, dtype=jnp.bfloat16, resets=False):
    spec = lambda width: jax.ShapeDtypeStruct((B, T, H, width), dtype)
    mask = np.zeros((B, T), bool) if resets else None
    loss = lambda *qkv: retention_tiled(*qkv, log_gammas(H), mask).astype(jnp.float32).sum()
    return jax.value_and_grad(loss, (0, 1, 2)), (spec(K), spec(K), spec(P))


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code(card):
    proof.check_machine_code(*code_of(8, 512, 4, 256, 432), card, NAMES, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(1, 999, 10, 256, 428), (1, 1024, 8, 256, 512), (1, 511, 2, 64, 64), (1, 200, 2, 100, 9), (1, 333, 2, 16, 600)]
)
def test_machine_code_of_other_sizes(shape):
    """With documents; values of 428 (3b, 13b) and 512, lengths and heads that no tile divides."""
    proof.check_machine_code(*code_of(*shape, resets=True), "rtx4070", NAMES, True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 428), (100, 40)])
def test_machine_code_in_fp32(size):
    proof.check_machine_code(*code_of(1, 100, 1, *size, dtype=jnp.float32, resets=True), "rtx4070", NAMES, False)
