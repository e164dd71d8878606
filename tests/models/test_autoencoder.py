"""The autoencoder's sizes, starting weights and properties: clamps, who sees whom, remat, chunks."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.errors import UserError
from jaxvram.models.autoencoder import AutoencoderConfig, AutoencoderKL

CFG = AutoencoderConfig(
    image_size=8, width=4, multipliers=(1, 2), res_blocks=1, groups=2, remat="none", dtype="float32"
)
B = 2


def image(cfg=CFG, side=None):
    side = side or cfg.image_size
    return np.random.RandomState(0).uniform(-1, 1, (B, side, side, cfg.channels)).astype(np.float32)


def shapes_of(cfg):
    side, C = cfg.image_size, cfg.channels
    return jax.eval_shape(lambda: AutoencoderKL(cfg).init(jax.random.key(0), jnp.zeros((1, side, side, C))))["params"]


@functools.cache
def grown(cfg=CFG):
    """Weights of which none is zero, and no norm's is one."""
    random = np.random.RandomState(1)
    draw = lambda path, s: random.normal(path[-1].key == "scale", 0.3, s.shape).astype(s.dtype)
    return jax.tree_util.tree_map_with_path(draw, shapes_of(cfg))


def run(method, x, cfg=CFG, params=None):
    apply = quick.jit(lambda params, x: AutoencoderKL(cfg).apply({"params": params}, x, method=method))
    return apply(params or grown(), x)


@pytest.mark.parametrize(
    ("fields", "count"),
    [({}, 83_653_863), ({"width": 64}, 20_945_575), ({"width": 32, "multipliers": (1, 2, 2)}, 1_288_263)],
    ids=["Stable Diffusion's", "half as wide", "tiny"],
)
def test_parameter_counts(fields, count):
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(AutoencoderConfig(**fields)))) == count


def test_the_two_halves_of_stable_diffusions():
    """34,163,592 and 49,490,179, the last convolution with the decoder; and 92 in two matrices over channels."""
    params = shapes_of(AutoencoderConfig())
    count = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert count["encoder"] == 34_163_592 and count["decoder"] + count["conv_out"] == 49_490_179
    assert count["quant"] + count["post_quant"] == 92


@pytest.mark.parametrize(
    ("fields", "side"),
    [({}, 4), ({"multipliers": (1,)}, 8), ({"multipliers": (1, 1, 2)}, 2), ({"channels": 1, "latent_channels": 5}, 4),
     ({"dtype": "bfloat16", "param_dtype": "bfloat16"}, 4)],
    ids=str,
)  # fmt: skip
def test_shapes_and_dtypes(fields, side):
    """Moments and images in fp32 whatever it computes in."""
    cfg = dataclasses.replace(CFG, **fields)

    def through():
        params = {"params": AutoencoderKL(cfg).init(jax.random.key(0), image(cfg))["params"]}
        moments = AutoencoderKL(cfg).apply(params, image(cfg), method="encode")
        return moments, AutoencoderKL(cfg).apply(params, moments[0], method="decode")

    (mean, logvar), out = jax.eval_shape(through)
    assert mean.shape == logvar.shape == (B, side, side, cfg.latent_channels)
    assert out.shape == image(cfg).shape and {x.dtype for x in (mean, logvar, out)} == {jnp.dtype("float32")}
    assert {str(x.dtype) for x in jax.tree.leaves(shapes_of(cfg))} == {cfg.param_dtype}


def test_any_multiple_of_the_step_goes_through():
    mean, _ = run("encode", image(side=12))
    assert mean.shape == (B, 6, 6, 4) and run("decode", mean).shape == (B, 12, 12, 3)
    with pytest.raises(ValueError, match=r"an image of \(7, 7, 3\) for 3 channels and sides that 2 divides"):
        run("encode", image(side=7))


def test_the_variance_is_held_between_bounds():
    """Its logarithm in [-30, 20], and beyond them no gradient."""
    far = jax.tree.map(np.copy, grown())
    far["quant"]["bias"][4:] = (-100, 100, 0, 0)
    _, logvar = run("encode", image(), params=far)
    assert (logvar[..., 0] == -30).all() and (logvar[..., 1] == 20).all() and (np.abs(logvar[..., 2:]) < 20).all()
    total = lambda params: AutoencoderKL(CFG).apply({"params": params}, image(), method="encode")[1].sum()
    assert (np.abs(quick.jit(jax.grad(total))(far)["quant"]["bias"][4:]) > 0).tolist() == [False, False, True, True]


def test_every_place_sees_every_other():
    """A latent has a gradient from each pixel of its image, through the middle's attention; from no other image."""
    cfg = dataclasses.replace(CFG, image_size=24)
    corner = lambda x: AutoencoderKL(cfg).apply({"params": grown()}, x, method="encode")[0][0, 0, 0].sum()
    g_BxHxW = np.abs(quick.jit(jax.grad(corner))(image(cfg))).sum(-1)
    assert (g_BxHxW[0] > 0).all() and not g_BxHxW[1].any()


def test_the_two_parts_of_decoding_are_all_of_it():
    latent = np.random.RandomState(3).normal(0, 1, (B, 4, 4, 4)).astype(np.float32)
    last = run("decode_to_last", latent)
    assert last.shape == (B, 8, 8, CFG.width)
    np.testing.assert_array_equal(run("to_image", last), run("decode", latent))


@functools.cache
def program_and_gradients(remat):
    """(how many blocks the jaxpr of the gradients makes again, what it gives)."""
    model = AutoencoderKL(dataclasses.replace(CFG, remat=remat))
    traced = quick.jit(jax.grad(lambda params: jnp.sin(model.apply({"params": params}, image())).sum())).trace(grown())
    return len(re.findall(r"\b(?:remat2?|checkpoint)\[", str(traced.jaxpr))), traced.lower().compile()(grown())


def test_remat_changes_nothing():
    """And is in the program where it is asked for: once a block, a step between levels, and an attention."""
    (none, want), (blocks, got) = program_and_gradients("none"), program_and_gradients("full")
    assert none == 0 and blocks == 2 * (2 + 1) + 2 * 1 + 2 * 2 + 2  # the middles; the levels, the decoder's one more; steps
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, got, want))) < 1e-5


def test_bf16_is_close_to_fp32():
    in_bf16 = dataclasses.replace(CFG, dtype="bfloat16")
    assert 1e-4 < quick.relative_error(run("__call__", image(), in_bf16), run("__call__", image())) < 0.05


def test_no_image_of_512_pixels_has_scores_of_all_by_all():
    """64 x 64 places: 4096 queries by 4096 keys of four images would be 256 MiB, and once more for each gradient."""
    cfg = dataclasses.replace(CFG, image_size=64, multipliers=(1,), remat="full")
    loss = lambda params, x: AutoencoderKL(cfg).apply({"params": params}, x).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(shapes_of(cfg), jnp.zeros((4, 64, 64, 3)))
    found = quick.shapes(jaxpr)
    assert not any(shape[-2:] == (4096, 4096) for shape in found)
    assert any(shape[-1] == 4096 and shape[-2] < 4096 for shape in found if len(shape) == 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remat": "ful"}, "model.remat='ful' is unknown; did you mean 'full'"),
        ({"kernels": "palas"}, "model.kernels='palas' is unknown; did you mean 'pallas'"),
        ({"dtype": "float16"}, "model.dtype='float16' is unknown"),
        ({"param_dtype": "fp32"}, "model.param_dtype='fp32' is unknown"),
        ({"multipliers": (1, 2.5)}, r"model.multipliers=\(1, 2.5\) must be whole numbers of at least 1"),
        ({"multipliers": (1, 0)}, r"model.multipliers=\(1, 0\) must be"),
        ({"multipliers": ()}, r"model.multipliers=\(\) must be"),
        ({"latent_channels": 0}, "every size must be at least 1"),
        ({"image_size": 250}, "model.image_size=250 is no multiple of 8, the pixels of a latent"),
        ({"width": 48}, "model.groups=32 does not divide a level's 48 channels"),
        ({"kernels": "pallas"}, "the middle's one head is 512 wide, and kernels take up to 256; leave it auto"),
    ],
    ids=str,
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        AutoencoderConfig(**fields)
    assert "\n" not in str(raised.value)
