"""Cross-entropy without logits: equals the definition and autodiff of it in every chunking, and makes no (B, T, V)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.kernels import linear_cross_entropy as kernel

B, T, V, D = 3, 12, 29, 8
ROWS = 32  # of the head, three of them padding


def inputs(hidden_dtype=np.float32):
    """hidden, head with rubbish in its padding, targets of which some are ignored, and a cotangent for each token."""
    random = np.random.RandomState(0)
    hidden_BxTxD = jnp.asarray(random.normal(0, 1, (B, T, D)), hidden_dtype)
    targets_BxT = np.where(random.rand(B, T) < 0.3, -1, random.randint(0, V, (B, T))).astype(np.int32)
    assert (targets_BxT < 0).any() and (targets_BxT >= 0).any()
    head_VxD, g_BxT = random.normal(0, 2, (ROWS, D)).astype(np.float32), random.normal(0, 1, (B, T)).astype(np.float32)
    return hidden_BxTxD, jnp.asarray(head_VxD), targets_BxT, g_BxT


def value_and_gradients(loss, hidden_BxTxD, head_VxD, targets_BxT, g_BxT):
    def run(hidden_BxTxD, head_VxD):
        loss_BxT, pull = jax.vjp(lambda h, w: loss(h, w, targets_BxT)[0], hidden_BxTxD, head_VxD)
        return loss_BxT, *pull(jnp.asarray(g_BxT))

    return quick.jit(run)(hidden_BxTxD, head_VxD)


def with_chunk(chunk, vocab_size=V):
    return lambda h, w, t: kernel.linear_cross_entropy(h, w, t, vocab_size, chunk=chunk, implementation="xla")


reference = functools.partial(kernel.linear_cross_entropy_reference, vocab_size=V)


def test_definition():
    hidden_BxTxD, head_VxD, targets_BxT, _ = inputs()
    logits_BxTxV = np.asarray(hidden_BxTxD, np.float64) @ np.asarray(head_VxD, np.float64)[:V].T
    log_p_BxTxV = logits_BxTxV - np.log(np.exp(logits_BxTxV).sum(-1, keepdims=True))
    want_BxT = -np.take_along_axis(log_p_BxTxV, np.maximum(targets_BxT, 0)[..., None], -1)[..., 0] * (targets_BxT >= 0)
    assert quick.relative_error(reference(hidden_BxTxD, head_VxD, targets_BxT)[0], want_BxT) < 1e-6


@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 12, 100, None])
def test_every_chunking_equals_autodiff(chunk):
    """12 positions: chunks that divide them, that don't, that leave one over, that are longer."""
    got = value_and_gradients(with_chunk(chunk), *inputs())
    want = value_and_gradients(reference, *inputs())
    assert max(map(quick.relative_error, got, want)) < 2e-6
    targets_BxT = inputs()[2]
    assert (np.asarray(got[0])[targets_BxT < 0] == 0).all() and (np.asarray(got[1])[targets_BxT < 0] == 0).all()
    assert (np.asarray(got[2])[V:] == 0).all()


def test_padding_counts_for_nothing():
    hidden_BxTxD, head_VxD, targets_BxT, g_BxT = inputs()
    padded = value_and_gradients(with_chunk(5), hidden_BxTxD, head_VxD, targets_BxT, g_BxT)
    bare = value_and_gradients(with_chunk(5, None), hidden_BxTxD, head_VxD[:V], targets_BxT, g_BxT)
    assert max(map(quick.relative_error, (*padded[:2], padded[2][:V]), bare)) < 1e-6
    counted = value_and_gradients(with_chunk(5, None), hidden_BxTxD, head_VxD, targets_BxT, g_BxT)
    assert quick.relative_error(counted[0], padded[0]) > 1e-3


def test_nothing_to_learn():
    hidden_BxTxD, head_VxD, targets_BxT, g_BxT = inputs()
    for x in value_and_gradients(with_chunk(5), hidden_BxTxD, head_VxD, np.full_like(targets_BxT, -1), g_BxT):
        assert (np.asarray(x) == 0).all()


def test_huge_logits_stay_finite():
    hidden_BxTxD, head_VxD, targets_BxT, g_BxT = inputs()
    got = value_and_gradients(with_chunk(5), hidden_BxTxD * 1e4, head_VxD, targets_BxT, g_BxT)
    assert all(np.isfinite(x).all() for x in got) and float(got[0].max()) > 1e4


def test_bf16():
    """Off by the rounding of bf16 inputs and of dlogits; the gradient of an fp32 head is fp32."""
    got = value_and_gradients(with_chunk(5), *inputs(jnp.bfloat16))
    assert [x.dtype for x in got] == [jnp.float32, jnp.bfloat16, jnp.float32]
    hidden_BxTxD, head_VxD, targets_BxT, g_BxT = inputs(jnp.bfloat16)
    head_VxD = head_VxD.astype(jnp.bfloat16).astype(jnp.float32)  # what the product reads
    want = value_and_gradients(reference, hidden_BxTxD.astype(jnp.float32), head_VxD, targets_BxT, g_BxT)
    assert quick.relative_error(got[0], want[0]) < 1e-5  # products of bf16 are exact in fp32
    assert max(map(quick.relative_error, got[1:], want[1:])) < 1e-2


def test_the_heads_gradient_adds_up_in_fp32():
    """Twelve chunks of one equal one chunk of twelve; a sum kept in bf16 would be off by 1e-3."""
    one_by_one, at_once = (value_and_gradients(with_chunk(c), *inputs(jnp.bfloat16))[2] for c in (1, T))
    assert quick.relative_error(one_by_one, at_once) < 1e-6


def test_logits_of_a_chunk_are_all_there_is():
    run = lambda loss: lambda h, w: jax.value_and_grad(lambda h, w: loss(h, w, inputs()[2])[0].sum(), (0, 1))(h, w)
    hidden_BxTxD, head_VxD = inputs()[:2]
    is_whole = lambda shape: np.prod(shape) >= B * T * V
    for loss, expected in ((with_chunk(4), False), (reference, True)):
        compiled = jax.jit(run(loss)).lower(hidden_BxTxD, head_VxD).compile().as_text()
        for program in (jax.make_jaxpr(run(loss))(hidden_BxTxD, head_VxD), compiled):
            assert any(map(is_whole, quick.shapes(program))) == expected
    assert (B, 4, ROWS) in quick.shapes(jax.make_jaxpr(run(with_chunk(4)))(hidden_BxTxD, head_VxD))


def test_chunk_length():
    assert kernel.chunk_length(4, 8, 1024, 50304) == 64  # 103 MB
    assert 4 * 8 * 64 * 50304 <= kernel.LOGITS_BUDGET < 4 * 8 * 128 * 50304
    assert kernel.chunk_length(4, 12, 64, 65) == 64
    assert kernel.chunk_length(4, 10**6, 1024, 50304) == 1
