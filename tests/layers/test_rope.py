"""Rotary positions against complex numbers in float64, the property they exist for, and Llama 3.1's frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.layers.rope import LAYOUTS, frequencies, rotate, rotation

B, T, H, K = 2, 7, 3, 8
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 32}


def pairs_of(x, layout):
    """The pairs of channels as complex numbers, (..., K/2)."""
    a, b = (x[..., : K // 2], x[..., K // 2 :]) if layout == "half" else (x[..., 0::2], x[..., 1::2])
    return np.asarray(a, np.float64) + 1j * np.asarray(b, np.float64)


def draw(dtype=np.float32):
    return jnp.asarray(np.random.RandomState(0).normal(size=(B, T, H, K)), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [0, 5])
def test_a_pair_is_multiplied_by_exp_i_t_omega(first, layout):
    x = draw()
    omega_R = 10000.0 ** (-2 * np.arange(K // 2) / K)
    turned = rotate(x, *rotation(first, T, frequencies(K, 10000.0)), layout)
    phase_Tx1xR = np.exp(1j * (first + np.arange(T))[:, None, None] * omega_R)
    assert np.abs(pairs_of(turned, layout) - pairs_of(x, layout) * phase_Tx1xR).max() < 1e-5


def test_a_traced_offset_is_the_same():
    traced = quick.jit(lambda first: rotation(first, T, frequencies(K, 500.0)))(jnp.int32(9))
    for got, want in zip(traced, rotation(9, T, frequencies(K, 500.0)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_depend_on_distance_alone(layout):
    """Scores of a chunk are the same wherever it begins; and positions do matter."""
    q, k = draw(), draw()[::-1]
    omega_R = frequencies(K, 100.0)
    turned = lambda x, first: rotate(x, *rotation(first, T, omega_R), layout)
    scores = lambda first: jnp.einsum("bthk,bshk->bhts", turned(q, first), turned(k, first))
    assert quick.relative_error(scores(50), scores(0)) < 1e-5
    shifted = jnp.einsum("bthk,bshk->bhts", turned(q, 1), turned(k, 0))
    assert quick.relative_error(shifted, scores(0)) > 0.1


def test_layouts_are_one_another_with_channels_in_another_order():
    order = np.arange(K).reshape(2, K // 2).T.ravel()  # 0, K/2, 1, K/2 + 1, ...
    x, turn = draw(), rotation(3, T, frequencies(K, 100.0))
    got = rotate(x[..., order], *turn, "interleaved")
    np.testing.assert_array_equal(got, rotate(x, *turn, "half")[..., order])
    assert quick.relative_error(rotate(x, *turn, "interleaved"), rotate(x, *turn, "half")) > 0.1


def test_angles_are_fp32_also_in_bf16():
    """Position 2001 in bf16 would be 2000: the fastest pair would be off by a radian."""
    x = draw(jnp.bfloat16)
    turned = rotate(x, *rotation(2001, T, frequencies(K, 10000.0)), "half")
    assert turned.dtype == jnp.bfloat16
    want = rotate(x.astype(jnp.float32), *rotation(2001, T, frequencies(K, 10000.0)), "half")
    assert quick.relative_error(turned, want) < 4e-3


def test_nothing_of_x_is_kept_for_the_backward_pass():
    turn = rotation(0, T, frequencies(K, 100.0))
    pull = jax.eval_shape(lambda x: jax.vjp(lambda x: rotate(x, *turn, "half"), x)[1], draw(jnp.bfloat16))
    assert max(x.size for x in jax.tree.leaves(pull)) == T * K // 2  # cos, sin


def test_llama3_frequencies():
    """Fast pairs keep theirs, slow ones turn `factor` times slower, and between the two it is in proportion to the turns."""
    plain, scaled = frequencies(K, 50.0), frequencies(K, 50.0, **LLAMA3)
    turns = 32 * plain / (2 * np.pi)
    assert (turns > 4).tolist() == [True, False, False, False] and (turns < 1).tolist() == [False, False, True, True]
    assert scaled[0] == plain[0]
    np.testing.assert_allclose(scaled[2:], plain[2:] / 4, rtol=1e-6)
    smooth = (turns[1] - 1) / 3
    np.testing.assert_allclose(scaled[1], (1 - smooth) * plain[1] / 4 + smooth * plain[1], rtol=1e-6)
    np.testing.assert_array_equal(frequencies(K, 50.0, **LLAMA3 | {"factor": 1.0}), plain)
    assert plain.dtype == scaled.dtype == np.float32


def test_llama31_8b_as_published():
    """K 128, theta 500000, factor 8: ends of the table, and the last frequency that is kept (its wavelength below 2048)."""
    scaled, plain = frequencies(128, 500000.0, 8.0), frequencies(128, 500000.0)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 2048], plain[wavelength < 2048], rtol=1e-6)
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.sum() == 6
    assert (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()
