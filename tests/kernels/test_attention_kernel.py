"""Attention without kernels: the definition against NumPy, chunks against the definition, and dropout as it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.kernels import attention as kernel
from jaxvram.kernels import attention_xla

attention_by_xla = functools.partial(kernel.attention, implementation="xla")

B, H, K = 2, 3, 4


@pytest.fixture
def chunked(monkeypatch):
    """Every chunk is over budget: as many chunks as T allows."""
    monkeypatch.setattr(attention_xla, "SCORES_BUDGET", 1)


def inputs(T, S, dtype=np.float32):
    random = np.random.RandomState(T * 100 + S)
    return tuple(jnp.asarray(random.normal(0, 1.5, (B, n, H, K)), dtype) for n in (T, S, S))


def by_numpy(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, causal, offset):
    """Position by position, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BxTxHxK, k_BxSxHxK, v_BxSxHxK))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(q.shape[:3]):
        end = offset + t + 1 if causal else None
        p = np.exp(k[b, :end, h] @ q[b, t, h] / np.sqrt(q.shape[-1]))
        out[b, t, h] = p / p.sum() @ v[b, :end, h]
    return out


CASES = [(12, 12, 0, True), (15, 15, 0, True), (7, 7, 0, True), (11, 11, 0, True), (6, 20, 9, True), (12, 9, 0, False)]


@pytest.mark.parametrize(("T", "S", "offset", "causal"), CASES)
def test_definition(T, S, offset, causal):
    qkv = inputs(T, S)
    got = quick.jit(lambda *qkv: kernel.attention_reference(*qkv, causal=causal, offset=offset))(*qkv)
    assert quick.relative_error(got, by_numpy(*qkv, causal, offset)) < 1e-6


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize(("T", "S", "offset", "causal"), CASES)
def test_chunked_equals_definition(T, S, offset, causal, traced, chunked):
    if T != 11:  # a prime too large to be cut
        assert attention_xla.chunk_count(B * H * S * 4, T) > 2
    qkv = inputs(T, S)
    offset = jnp.int32(offset) if traced else offset  # a traced one is a cache's length: no keys can be left out

    def value_and_gradients(f):
        call = functools.partial(f, causal=causal, offset=offset)
        loss = lambda q, k, v: jnp.sin(call(q, k, v)).sum()
        return quick.jit(lambda *qkv: (call(*qkv), jax.grad(loss, (0, 1, 2))(*qkv)))(*qkv)

    got, want = value_and_gradients(attention_by_xla), value_and_gradients(kernel.attention_reference)
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, got, want))) < 2e-6


def test_chunks_hold_their_scores_alone(chunked):
    """No (T, S) scores anywhere, forward or backward, and a causal chunk reads only the keys before its end."""
    T = 24
    loss = lambda f: lambda q, k, v: f(q, k, v).sum()
    program = lambda f: quick.shapes(jax.make_jaxpr(jax.grad(loss(f), (0, 1, 2)))(*inputs(T, T)))
    assert (B, H, T, T) in program(kernel.attention_reference)
    shapes = program(attention_by_xla)
    assert (B, H, T, T) not in shapes
    assert {s for s in shapes if s[:3] == (B, H, 3)} >= {(B, H, 3, n) for n in range(3, 25, 3)}


def test_chunk_count():
    assert attention_xla.chunk_count(attention_xla.SCORES_BUDGET // 1024, 1024) == 1
    assert attention_xla.chunk_count(attention_xla.SCORES_BUDGET // 1024 + 1, 1024) == 2
    assert attention_xla.chunk_count(attention_xla.SCORES_BUDGET, 1024) == attention_xla.MAX_CHUNKS
    assert attention_xla.chunk_count(attention_xla.SCORES_BUDGET, 15) == 5
    assert attention_xla.chunk_count(attention_xla.SCORES_BUDGET, 13) == 1


def test_bf16(chunked):
    """Inputs and result in bf16, softmax in fp32: with scores in the hundreds, bf16 ones would be off by whole units."""
    q, k, v = inputs(12, 12, jnp.bfloat16)
    q *= 32
    got = quick.jit(lambda *qkv: attention_by_xla(*qkv))(q, k, v)
    assert got.dtype == jnp.bfloat16
    assert 0 < quick.relative_error(got, by_numpy(q, k, v, True, 0)) < 1e-2


def probabilities(T, rate, key, attend=attention_by_xla):
    """What `attend` weighs the values with, (B, T, 1, T): the values are unit vectors."""
    q, k, _ = (x[:, :, :1] for x in inputs(T, T))
    eye = jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, 1, T))
    attend = functools.partial(attend, dropout_rate=rate)
    return np.asarray(quick.jit(lambda q, k, eye, key: attend(q, k, eye, dropout_key=key))(q, k, eye, key))


@pytest.mark.parametrize("budget", [1, 2**30], ids=["chunked", "whole"])
def test_dropout_drops_its_share_and_scales_the_rest(budget, monkeypatch):
    monkeypatch.setattr(attention_xla, "SCORES_BUDGET", budget)
    T, rate = 120, 0.3
    whole, dropped = probabilities(T, rate, None), probabilities(T, rate, jax.random.key(0))
    seen = whole > 0
    assert abs((dropped[seen] == 0).mean() - rate) < 0.015  # 14,520 draws: 4 standard deviations
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / (1 - rate), rtol=1e-5)
    assert (dropped != probabilities(T, rate, jax.random.key(1))).any()
    np.testing.assert_array_equal(dropped, probabilities(T, rate, jax.random.key(0)))
    np.testing.assert_array_equal(whole, probabilities(T, 0.0, jax.random.key(0)))


def test_chunks_do_not_share_a_mask(chunked):
    """Without causality all chunks have one shape, so that one key would give them one mask."""
    T = 24
    kept = probabilities(T, 0.5, jax.random.key(0), functools.partial(attention_by_xla, causal=False)) != 0
    of_chunk = kept.reshape(B, 8, 3, T)
    assert len({of_chunk[:, i].tobytes() for i in range(8)}) == 8


def test_gradients_under_dropout_use_the_mask_of_the_forward_pass(chunked):
    T, rate, key = 12, 0.4, jax.random.key(3)
    q, k, v = (x[:, :, :1] for x in inputs(T, T))
    scale_BxTxT = (probabilities(T, rate, key) != 0)[:, :, 0] / (1 - rate)

    def with_known_mask(q, k, v):
        scores = jnp.einsum("bthk,bshk->bts", q, k) * K**-0.5
        p_BxTxT = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)) * scale_BxTxT
        return jnp.sin(jnp.einsum("bts,bshk->bthk", p_BxTxT, v)).sum()

    ours = lambda q, k, v: jnp.sin(attention_by_xla(q, k, v, dropout_rate=rate, dropout_key=key)).sum()
    got, want = (quick.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (ours, with_known_mask))
    assert max(map(quick.relative_error, got, want)) < 2e-6
