"""RetNet's sizes, starting weights, three forms, long texts; what all recurrent models must do is in test_recurrent.py."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from quick import relative_error
from recurrent import count, fresh, shapes, state_bytes

from jaxvram import models, recipe
from jaxvram.errors import UserError
from jaxvram.kernels.retention import log_gammas, retention_parallel
from jaxvram.kernels.scalar_decay import scalar_decay, scalar_decay_reference
from jaxvram.layers import rope
from jaxvram.models.retnet import SIZES, RetNetConfig, RetNetState, places

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def test_parameter_counts():
    """Without table and head, as they are quoted; test_retnet_parity.py counts torchscale's own."""
    wanted = {
        "base": 19_077_632, "medium": 203_457_536, "xl": 1_220_642_816, "3b": 2_523_302_400, "7b": 6_509_826_048,
        "13b": 12_616_094_720, "65b": 52_077_535_232,
    }  # fmt: skip
    for name, size in SIZES.items():
        cfg = RetNetConfig(**size, tie_head=True)
        assert shapes(cfg)["embedding"]["embedding"].shape == (50257, cfg.n_embd)
        assert count(cfg) - 50257 * cfg.n_embd == wanted[name], name
        assert (cfg.key_size, cfg.value_size) == (256, 428 if name in ("3b", "13b") else 432)


def test_recipes_have_torchscales_sizes():
    for variant in ("base", "medium", "xl"):
        built = recipe.build(*recipe.load(f"{CONFIGS}/retnet.py:{variant}"))
        assert {key: getattr(built.model, key) for key in SIZES[variant]} == SIZES[variant]
        assert built.model.reset_token == 50256 and built.optimizer.groups["decayed"].weight_decay == 0.05


def test_starting_weights():
    """Bounds of uniform ones: Xavier's with a gain, and 1 / sqrt(fan in) in the feed-forward layer."""
    D, E, F = 96, 160, 128
    cfg = RetNetConfig(vocab_size=600, vocab_multiple=64, n_layer=3, n_embd=D, d_value=E, n_inner=F)
    p = fresh(cfg)
    retention, ffn = p["layers"]["retention"], p["layers"]["ffn"]
    xavier = lambda gain, a, b: gain * (6 / (a + b)) ** 0.5
    bounds = {"q_proj": xavier(2**-2.5, D, D), "k_proj": xavier(2**-2.5, D, D), "v_proj": xavier(2**-2.5, D, E),
              "g_proj": xavier(2**-2.5, D, E), "out_proj": xavier(0.5, E, D)}  # fmt: skip
    bounds |= {"fc1": D**-0.5, "gate": D**-0.5, "fc2": F**-0.5}
    for name, bound in bounds.items():
        kernel = (retention | ffn)[name]["kernel"]
        assert 0.99 * bound < np.abs(kernel).max() <= bound and abs(kernel.std() / bound - 3**-0.5) < 0.01, name
    for table in (p["embedding"]["embedding"], p["lm_head"]["kernel"].T):
        assert (table[600:] == 0).all() and abs(table[:600].std() * D**0.5 - 1) < 0.02


def test_three_forms_agree_where_documents_begin_too():
    """Parallel, recurrent and by chunks: one value, and gradients of the first and the last."""
    random = np.random.RandomState(0)
    B, T, H, K, P = 2, 100, 3, 16, 20
    q, k, v, cotangent = (jnp.float32(random.normal(size=(B, T, H, n))) for n in (K, K, P, P))
    resets = random.rand(B, T) < 0.03
    gammas = log_gammas(H)
    forms = {
        "parallel": lambda q, k, v: retention_parallel(q, k, v, gammas, resets),
        "recurrent": lambda q, k, v: scalar_decay_reference(q, k, v, gammas, resets_BxT=resets)[0],
        "chunkwise": lambda q, k, v: scalar_decay(q, k, v, gammas, resets_BxT=resets, implementation="xla")[0],
    }
    of = lambda f: quick.jit(lambda *x: (lambda o, pull: (o, *pull(cotangent)))(*jax.vjp(f, *x)))(q, k, v)
    want, *others = map(of, forms.values())
    distance = np.arange(T)[:, None] - np.arange(T)
    document = np.cumsum(resets, 1)
    gamma = (1 - 2.0 ** (-5 - np.arange(H)))[:, None, None]
    seen = (distance >= 0) & (document[:, None, :, None] == document[:, None, None])
    D = np.where(seen, gamma ** np.maximum(distance, 0), 0)
    by_hand = np.einsum("bhnm,bmhp->bnhp", np.einsum("bnhk,bmhk->bhnm", q, k, dtype=np.float64) * D, v)
    assert relative_error(want[0], by_hand) < 1e-6
    for other in others:
        assert max(relative_error(g, w) for g, w in zip(other, want, strict=True)) < 2e-6


def test_decays_of_many_heads():
    """1 - 2^-36, of the last head of 65b, is 1 in fp32; its logarithm is not 0."""
    want = np.log1p(-(2.0 ** -np.arange(5, 37)))
    np.testing.assert_allclose(log_gammas(32), want, rtol=1e-7)


def test_sums_of_decays():
    """S counts a document's tokens, also those of a state, and is exact for heads that hardly decay."""
    cfg = RetNetConfig(n_embd=64, n_head=32, d_value=64)
    resets = np.zeros((2, 9), bool)
    resets[0, [0, 4]] = True
    state = RetNetState(None, jnp.int32([7, 100_000]), jnp.int32(100_000))
    got = places(cfg, jnp.zeros((2, 9), jnp.int32), state, resets)
    read = np.array([[1, 2, 3, 4, 1, 2, 3, 4, 5], range(100_001, 100_010)])
    gamma = 1 - 2.0 ** -np.arange(5, 37, dtype=np.float128)
    want = (1 - gamma ** read[..., None]) / (1 - gamma)
    np.testing.assert_allclose(got.sums_BxTxH, want.astype(np.float64), rtol=2e-6)
    assert got.read_B.tolist() == [5, 100_009] and got.position == 100_009


@pytest.mark.parametrize("first", [0, 65_536, 2**31 - 40])
def test_rotation_is_exact_however_late(first):
    """Two positions differ by their distance alone; fp32's product of position and frequency loses it."""
    omega = RetNetConfig(n_embd=256, n_head=1).rope_frequencies
    cos, sin = (np.asarray(x, np.float64) for x in rope.endless_rotation(jnp.int32(first), 64, omega))
    turned = cos + 1j * sin
    want = np.exp(1j * np.arange(64)[:, None] * omega.astype(np.float64))
    assert np.abs(turned / turned[:1] - want).max() < 1e-6
    if first == 65_536:
        cos, sin = (np.asarray(x, np.float64) for x in rope.rotation(first, 64, omega))
        lossy = cos + 1j * sin
        assert np.abs(lossy / lossy[:1] - want).max() > 1e-3


def test_64k_tokens_in_bf16_are_finite_and_the_end_is_right():
    """One layer; the last tokens are those of a state that was carried on in pieces, in fp32."""
    cfg = RetNetConfig(vocab_size=31, n_layer=1, n_embd=16, n_head=2, d_value=16, n_inner=16, remat="none")
    random = np.random.RandomState(1)
    params = jax.tree.map(lambda p: p + random.normal(0, 0.1, p.shape).astype(np.float32), fresh(cfg))
    tokens = random.randint(0, 31, (1, 65_536)).astype(np.int32)

    @jax.jit
    def run(p):
        last = lambda p: (lambda hidden: (jnp.square(hidden[:, -64:]).sum(), hidden))(apply(cfg)(p, tokens)[0])
        return jax.grad(last, has_aux=True)(p)

    def apply(cfg):
        return lambda p, x, state=None: models.build(cfg).apply({"params": p}, x, state)

    gradients, hidden = run(params)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (hidden, *jax.tree.leaves(gradients)))
    cfg = dataclasses.replace(cfg, dtype="float32")
    state = models.build(cfg).apply({"params": params}, 1, method="initial_state")
    in_pieces = jax.jit(apply(cfg))
    for piece in np.split(tokens, 8, axis=1):
        want, state = in_pieces(params, piece, state)
    assert relative_error(hidden[:, -8192:], want) < 0.03
    alone, _ = in_pieces(params, tokens[:, -8192:])  # the past is missing, and positions count from elsewhere
    assert relative_error(alone[:, :64], want[:, :64]) > 1e-3 and relative_error(alone[:, -64:], want[:, -64:]) < 1e-4


def test_the_state_of_medium():
    assert state_bytes(RetNetConfig(**SIZES["medium"]), batch=3) == 16 * (3 * (4 * 1728 * 256 + 4) + 4)


@pytest.mark.parametrize(("fields", "message"), [
    ({"activation": "swich"}, "model.activation='swich' is unknown; did you mean 'swish'"),
    ({"n_head": 3}, "model.n_head=3 does not cut n_embd=512 into pairs"),
    ({"n_head": 256, "d_value": 300}, "model.n_head=256 does not divide d_value=300"),
    ({"norm_eps": 0.0}, "norm_eps positive"),
    ({"reset_token": 50257}, "model.reset_token=50257 is no token"),
])  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        RetNetConfig(**fields)
