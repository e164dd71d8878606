"""Convolutions, group norms and residual blocks, against PyTorch's functions of the same names."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import quick

from jaxvram.layers.conv import Conv
from jaxvram.layers.group_norm import GroupNorm
from jaxvram.layers.resnet import Downsample, ResBlock, Upsample

pytestmark = pytest.mark.skipif(not parity.installed("torch"), reason="needs torch")
FP32 = {"dtype": "float32"}


def _near(ours, theirs):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= parity.TOLERANCE * np.abs(theirs).max()


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _both(module, function, x_BxHxWxC):
    """Output and gradients of `module` beside those of `function(torch, its arrays)`; ours as flat lists in tree order."""
    import torch

    params = quick.jit(module.init)(jax.random.key(0), x_BxHxWxC)
    params = jax.tree.map(lambda p: p + 0.3 * _normal(p.size, *p.shape), params)

    def run(params, x):
        y, back = jax.vjp(module.apply, params, x)
        return y, back(jnp.cos(y))

    y, (dparams, dx) = quick.jit(run)(params, x_BxHxWxC)
    theirs = [torch.tensor(np.asarray(p), requires_grad=True) for p in (*jax.tree.leaves(params), x_BxHxWxC)]
    out = function(*theirs)
    out.backward(torch.cos(out).detach())
    _near(y, out.detach())
    for ours, tensor in zip((*jax.tree.leaves(dparams), dx), theirs, strict=True):
        _near(ours, tensor.grad)


def _conv(x, kernel, bias, stride=1, padding=1):
    import torch

    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), bias, stride, padding)
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_a_convolution_is_pytorchs(size, stride, padding):
    module = Conv(6, size, stride, (padding, padding), **FP32)
    _both(module, lambda b, k, x: _conv(x, k, b, stride, padding), _normal(0, 2, 6, 8, 4))


def test_the_autoencoder_pads_below_and_on_the_right_only():
    import torch

    def padded(b, k, x):
        return _conv(torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 1)), k, b, 2, 0)

    _both(Downsample(4, (0, 1), **FP32), padded, _normal(1, 2, 6, 8, 4))


@pytest.mark.parametrize("shape", [(2, 6, 8, 4), (3, 1, 1, 4)])
def test_upsampling_is_nearest_and_a_convolution(shape):
    import torch

    def up(b, k, x):
        x = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
        return _conv(x.permute(0, 2, 3, 1), k, b)

    _both(Upsample(5, **FP32), up, _normal(2, *shape))


@pytest.mark.parametrize("silu", [False, True])
def test_a_group_norm_is_pytorchs(silu):
    import torch

    def norm(bias, scale, x):
        y = torch.nn.functional.group_norm(x.permute(0, 3, 1, 2), 2, scale, bias, 1e-5)
        return (torch.nn.functional.silu(y) if silu else y).permute(0, 2, 3, 1)

    _both(GroupNorm(2, silu=silu, **FP32), norm, 3 + _normal(3, 2, 4, 5, 6))


def test_a_group_norm_takes_large_means_and_keeps_little():
    """A mean of 1000 in fp32, and what backward keeps in bf16: x, and two numbers a group."""
    x = jnp.asarray(1000 + _normal(4, 2, 4, 4, 8))
    y = GroupNorm(4, **FP32).init_with_output(jax.random.key(0), x)[0]
    assert abs(float(y.std()) - 1) < 1e-2
    x = x.astype(jnp.bfloat16)
    module = GroupNorm(4, silu=True)
    params = module.init(jax.random.key(0), x)
    kept = jax.tree.leaves(jax.vjp(lambda x: module.apply(params, x), x)[1])
    assert sum(a.size * a.dtype.itemsize for a in kept) <= 2 * x.size + 2 * 2 * 4 * 4 + 2 * 8 * 4


@pytest.mark.parametrize("features", [4, 6])
def test_a_residual_block_adds_to_its_input_what_starts_at_zero(features):
    block = ResBlock(features, groups=2, out_init=jax.nn.initializers.zeros, **FP32)
    x, t = _normal(5, 2, 4, 4, 4), _normal(6, 2, 8)
    y, params = block.init_with_output(jax.random.key(0), x, t)
    skip = params["params"].get("skip")
    np.testing.assert_allclose(y, x if skip is None else x @ skip["kernel"], rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda p: p + 0.1, params)
    assert np.abs(block.apply(moved, x, t) - block.apply(moved, x, 2 * t)).max() > 1e-3
