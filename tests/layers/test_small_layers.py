"""Norm, activations and table against their formulas in float64, and the dtypes that they promise."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import quick

from jaxvram.layers.embeddings import Embed
from jaxvram.layers.mlp import ACTIVATIONS
from jaxvram.layers.norms import LayerNorm


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
