"""Norm, activations and table against their formulas in float64, and the dtypes that they promise."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.layers.embeddings import Embed
from jaxvram.layers.mlp import ACTIVATIONS
from jaxvram.layers.norms import LayerNorm, ModulatedLayerNorm, layer_norm


def test_layer_norm():
    """Also far from zero, where E[x^2] - E[x]^2 would lose every digit."""
    random = np.random.RandomState(0)
    x_BxD = random.normal(1000, 0.5, (5, 64)).astype(np.float32)
    scale_D, bias_D = random.normal(1, 0.3, (2, 64)).astype(np.float32)
    x64_BxD = x_BxD.astype(np.float64)
    want = (x64_BxD - x64_BxD.mean(-1, keepdims=True)) / np.sqrt(
        x64_BxD.var(-1, keepdims=True) + 1e-5
    ) * scale_D + bias_D
    variables = {"params": {"scale": scale_D, "bias": bias_D}}
    assert quick.relative_error(LayerNorm(dtype=jnp.float32).apply(variables, x_BxD), want) < 1e-4
    in_bf16 = LayerNorm().apply(variables, x_BxD)
    assert in_bf16.dtype == jnp.bfloat16 and quick.relative_error(in_bf16, want) < 4e-3
    without = LayerNorm(use_bias=False, dtype=jnp.float32)
    assert set(without.init(jax.random.key(0), x_BxD)["params"]) == {"scale"}
    assert quick.relative_error(without.apply({"params": {"scale": scale_D}}, x_BxD), want - bias_D) < 1e-4


def test_gelu_in_both_forms():
    x_N = np.linspace(-6, 6, 101).astype(np.float32)
    by_erf = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in x_N.tolist()]
    by_tanh = [x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in x_N.tolist()]
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x_N), by_erf, atol=2e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](x_N), by_tanh, atol=2e-6)
    assert np.abs(np.subtract(by_erf, by_tanh)).max() > 1e-4


def test_gradients_of_a_frequent_token_add_up_in_fp32():
    """4096 times 1 in bf16 would stop at 256."""
    table = Embed(3, 2, nn.initializers.ones)
    ids_BxT = jnp.zeros((4, 1024), jnp.int32)
    variables = table.init(jax.random.key(0), ids_BxT)
    assert table.apply(variables, ids_BxT).dtype == jnp.bfloat16
    grad = jax.grad(lambda v: table.apply(v, ids_BxT).astype(jnp.float32).sum())(variables)["params"]["embedding"]
    np.testing.assert_array_equal(grad, [[4096, 4096], [0, 0], [0, 0]])


def by_autodiff(x_BxTxD, scale_D, bias_D, epsilon):
    """The formula in plain operations, for JAX to differentiate."""
    x_BxTxD = x_BxTxD.astype(jnp.float32)
    n_BxTxD = (x_BxTxD - x_BxTxD.mean(-1, keepdims=True)) / jnp.sqrt(x_BxTxD.var(-1, keepdims=True) + epsilon)
    return n_BxTxD * scale_D + (0 if bias_D is None else bias_D)


@pytest.mark.parametrize("of_each", ["all", "sample"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_layer_norms_own_gradient(dtype, tolerance, with_bias, of_each):
    """Equals autodiff of the formula; an epsilon that matters; parameters' gradients in fp32 whatever the compute dtype."""
    random = np.random.RandomState(0)
    x_BxTxD, g_BxTxD = (jnp.asarray(random.normal(0.3, 1, (2, 5, 16)), dtype) for _ in range(2))
    scale_D, bias_D = random.normal(1, 0.3, (2, 16) if of_each == "all" else (2, 2, 1, 16)).astype(np.float32)
    args = (x_BxTxD, scale_D, bias_D if with_bias else None)

    def gradients(f, out_dtype):
        pull = lambda args, g: jax.vjp(f, *args)[1](g.astype(out_dtype))
        return quick.jit(pull)(args, g_BxTxD)

    got = gradients(lambda x, s, b: layer_norm(x, s, b, 0.5, dtype), dtype)
    want = gradients(lambda x, s, b: by_autodiff(x, s, b, 0.5), jnp.float32)
    assert [x.dtype for x in got if x is not None] == [dtype, jnp.float32, jnp.float32][: 2 + with_bias]
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, got, want))) < tolerance


def test_modulation_is_each_samples_own():
    """Norm without weights, times 1 + scale, plus shift (adaLN)."""
    random = np.random.RandomState(0)
    x_BxTxD, (shift_BxD, scale_BxD) = random.normal(3, 2, (3, 5, 8)), random.normal(0, 1, (2, 3, 8))
    n_BxTxD = (x_BxTxD - x_BxTxD.mean(-1, keepdims=True)) / np.sqrt(x_BxTxD.var(-1, keepdims=True) + 1e-6)
    norm = ModulatedLayerNorm(dtype=jnp.float32)
    assert norm.init(jax.random.key(0), *map(jnp.asarray, (x_BxTxD, shift_BxD, scale_BxD))) == {}
    got = norm.apply({}, *(jnp.asarray(a, jnp.float32) for a in (x_BxTxD, shift_BxD, scale_BxD)))
    assert quick.relative_error(got, n_BxTxD * (1 + scale_BxD[:, None]) + shift_BxD[:, None]) < 1e-6


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_own_gradient(name):
    """Central differences of the formula in float64; in bf16 nothing but the input is kept, in bf16."""
    x_N = np.linspace(-6, 6, 97)
    by_erf = lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    by_tanh = lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    by_logistic = lambda x: x / (1 + np.exp(-1.702 * x))
    f = {"gelu": by_erf, "gelu_tanh": by_tanh, "quick_gelu": by_logistic}[name]
    slope = (f(x_N + 1e-5) - f(x_N - 1e-5)) / 2e-5
    gradient = quick.jit(jax.vmap(jax.grad(ACTIVATIONS[name])))
    np.testing.assert_allclose(gradient(x_N.astype(np.float32)), slope, atol=1e-5)
    in_bf16 = jnp.asarray(x_N, jnp.bfloat16)
    assert quick.relative_error(gradient(in_bf16), slope) < 0.02
    pull = jax.eval_shape(lambda x: jax.vjp(ACTIVATIONS[name], x)[1], in_bf16)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(pull)] == [(x_N.shape, jnp.bfloat16)]
