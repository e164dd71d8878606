"""PixArt's size, starting weights and properties: padding of a text, images of any shape, a batch and each alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.errors import UserError
from jaxvram.layers.patches import sincos_positions
from jaxvram.models.pixart import PixArt, PixArtConfig, positions

CFG = PixArtConfig(
    image_size=8, channels=3, n_layer=2, n_head=2, n_embd=12, context_dim=5, context_length=4, micro_conditions=True,
    remat="none", dtype="float32",
)  # fmt: skip
B = 3


def inputs(cfg=CFG, H=8, W=8):
    random = np.random.RandomState(0)
    draw = lambda *shape: random.normal(0, 1, shape).astype(np.float32)
    told = {"context_BxSxE": draw(B, cfg.context_length, cfg.context_dim), "length_B": np.int32([4, 1, 2])}
    told |= {"size_Bx2": np.float32([[8, 8], [90, 30], [64, 256]]), "aspect_B": np.float32([1, 3, 0.25])}
    return draw(B, H, W, cfg.channels), np.float32([20, 700, 3]), told


def shapes_of(cfg, H=8, W=8):
    """(output, parameters) as shapes and dtypes."""
    out, variables = jax.eval_shape(lambda: PixArt(cfg).init_with_output(jax.random.key(0), *inputs(cfg, H, W)))
    return out, variables["params"]


@functools.cache
def fresh(cfg=CFG):
    params = quick.jit(lambda key: PixArt(cfg).init(key, *inputs(cfg))["params"])(jax.random.key(0))
    return jax.tree.map(np.asarray, params)


@functools.cache
def grown():
    """Fresh weights and as much again as training may add: no matrix is zero any more."""
    random = np.random.RandomState(1)
    return jax.tree.map(lambda p: p + random.normal(0, 0.2, p.shape).astype(np.float32), fresh())


@functools.partial(quick.jit, static_argnums=0)
def run(cfg, params, x_BxHxWxC, t_B, told):
    return PixArt(cfg).apply({"params": params}, x_BxHxWxC, t_B, told)


def rows(tree, index):
    return jax.tree.map(lambda a: a[index], tree)


@pytest.mark.parametrize(("micro_conditions", "count"), [(False, 610_856_096), (True, 611_349_152)])
def test_parameter_counts(micro_conditions, count):
    """The authors' XL/2: without the table of positions and the features of the empty caption, which are not learnt."""
    cfg = PixArtConfig.of_size("XL/2", micro_conditions=micro_conditions)
    assert cfg == PixArtConfig(micro_conditions=micro_conditions)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(cfg)[1])) == count
    block = shapes_of(dataclasses.replace(cfg, n_layer=1))[1]["blocks"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(block)) == 16 * 1152**2 + 19 * 1152


@pytest.mark.parametrize(
    ("fields", "H", "W", "channels_out"),
    [
        ({}, 8, 8, 6),
        ({"learn_sigma": False, "micro_conditions": False}, 4, 10, 3),
        ({"channels": 1, "image_size": 12, "patch_size": 4}, 20, 8, 2),
        ({"dtype": "bfloat16", "param_dtype": "bfloat16"}, 2, 16, 6),
    ],
    ids=str,
)
def test_shapes_and_dtypes(fields, H, W, channels_out):
    """An image of any shape in, fp32 of the same out, whatever it computes in."""
    cfg = dataclasses.replace(CFG, **fields)
    out, params = shapes_of(cfg, H, W)
    assert out.shape == (B, H, W, channels_out) and out.dtype == jnp.float32
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {cfg.param_dtype}
    assert ("size_embed" in params) == ("aspect_embed" in params) == cfg.micro_conditions


def test_starting_weights():
    """Xavier uniform (what the authors have as one matrix, as one), N(0, 0.02) in what embeds, N(0, 1 / D) in tables."""
    params = fresh(dataclasses.replace(CFG, n_embd=48))
    blocks, D = params["blocks"], 48
    for kernel, joined in (
        (params["patch_embed"]["kernel"], 1), (blocks["mlp"]["c_fc"]["kernel"], 1), (blocks["attn"]["c_proj"]["kernel"], 1),
        (blocks["attn"]["c_q"]["kernel"], 3), (blocks["attn"]["c_v"]["kernel"], 3),
        (blocks["cross_attn"]["c_q"]["kernel"], 1), (blocks["cross_attn"]["c_k"]["kernel"], 2),
    ):  # fmt: skip
        bound = math.sqrt(6 / (kernel.shape[-2] + joined * kernel.shape[-1]))
        assert 0.97 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.1)
    embeds = [
        params[name][fc] for name in ("t_embed", "y_embed", "size_embed", "aspect_embed") for fc in ("fc1", "fc2")
    ]
    for module in (*embeds, params["t_block"]):
        np.testing.assert_allclose(module["kernel"].std(), 0.02, rtol=0.12)
    for table, N in ((blocks["table"], 6), (params["final"]["table"], 2)):
        assert table.shape[-2:] == (N, D)
        np.testing.assert_allclose(table.std(), D**-0.5, rtol=0.2)
    for module in (blocks["cross_attn"]["c_proj"], params["final"]["linear"]):
        assert not module["kernel"].any()
    assert not any(x.any() for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "bias")


def test_the_padding_of_a_text_is_not_read():
    """Nor is anything, where nothing counts: the output is a number all the same. What counts is read."""
    x, t, told = inputs()
    base = run(CFG, grown(), x, t, told)
    padding_BxSx1 = (np.arange(4) >= told["length_B"][:, None])[..., None]
    noisy = lambda where: told | {"context_BxSxE": told["context_BxSxE"] + 9 * where.astype(np.float32)}
    np.testing.assert_array_equal(run(CFG, grown(), x, t, noisy(padding_BxSx1)), base)
    other = run(CFG, grown(), x, t, noisy(~padding_BxSx1))
    assert all(quick.relative_error(other[i], base[i]) > 0.01 for i in range(B))
    assert np.isfinite(run(CFG, grown(), x, t, told | {"length_B": np.int32([0, 0, 4])})).all()


def test_size_and_aspect_are_read():
    x, t, told = inputs()
    base = run(CFG, grown(), x, t, told)
    for name in ("size_Bx2", "aspect_B"):
        assert quick.relative_error(run(CFG, grown(), x, t, told | {name: told[name] + 1}), base) > 1e-3


@pytest.mark.parametrize("H, W", [(8, 8), (4, 14)])
def test_an_image_of_a_batch_is_the_same_alone(H, W):
    """Each of its batch of one shape, whatever the others are and are told."""
    given = inputs(CFG, H, W)
    together = run(CFG, grown(), *given)
    for i in range(B):
        assert quick.relative_error(run(CFG, grown(), *rows(given, np.s_[i : i + 1])), together[i : i + 1]) < 1e-5


def test_rows_and_columns_are_told_apart():
    x, t, told = inputs(CFG, 4, 8)
    turned = run(CFG, grown(), x.swapaxes(1, 2), t, told).swapaxes(1, 2)
    assert quick.relative_error(turned, run(CFG, grown(), x, t, told)) > 0.01


def test_positions():
    """Of any shape from 0 to what the square has, number by number; of the square itself DiT's."""
    cfg = dataclasses.replace(CFG, image_size=16, patch_size=2, interpolation_scale=2.0)
    table_TxD = positions(cfg, 8, 20)  # 4 rows, 10 columns; the square has 8 of each
    for t, d in np.ndindex(40, 12):
        place = (t % 10 * 8 / 10 / 2, t // 10 * 8 / 4 / 2)[d // 6]
        f, k = (math.sin, math.cos)[d % 6 // 3], d % 3
        assert abs(table_TxD[t, d] - f(place / 10000 ** (k / 3))) < 1e-6
    np.testing.assert_array_equal(positions(CFG, 8, 8), sincos_positions(12, 4, 4))


@functools.cache
def program_and_results(remat, unroll_layers):
    """The jaxpr of output and gradients, and what it gives."""
    cfg = dataclasses.replace(CFG, remat=remat, unroll_layers=unroll_layers)
    x, t, told = inputs()

    def loss(params, x, context_BxSxE):
        out = PixArt(cfg).apply({"params": params}, x, t, told | {"context_BxSxE": context_BxSxE})
        return jnp.sin(out).sum(), out

    traced = quick.jit(jax.grad(loss, (0, 1, 2), has_aux=True)).trace(grown(), x, told["context_BxSxE"])
    return str(traced.jaxpr), traced.lower().compile()(grown(), x, told["context_BxSxE"])


@pytest.mark.parametrize(("remat", "unroll_layers"), [("full", False), ("none", True)])
def test_remat_and_unrolling_change_nothing(remat, unroll_layers):
    """And remat is in the program where it is asked for."""
    jaxpr, results = program_and_results(remat, unroll_layers)
    assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (remat != "none")
    errors = jax.tree.map(quick.relative_error, results, program_and_results("none", False)[1])
    for attention in ("attn", "cross_attn"):
        errors[0][0]["blocks"][attention]["c_k"].pop("bias")  # nought but for rounding
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_an_image_that_is_no_whole_number_of_patches():
    with pytest.raises(ValueError, match=r"an image of \(8, 5, 3\) for a model of sides that are multiples of 2"):
        shapes_of(CFG, 8, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remat": "ful"}, "model.remat='ful' is unknown; did you mean 'full'"),
        ({"context_dim": 0}, "PixArt reads text"),
        ({"context_length": 0}, "PixArt reads text"),
        ({"n_embd": 16, "n_head": 2, "micro_conditions": True}, "n_embd=16 must be a multiple of 3"),
        ({"interpolation_scale": 0.0}, r"interpolation_scale=0\.0 must be positive"),
    ],
    ids=str,
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        PixArtConfig(**fields)
    assert "\n" not in str(raised.value)


def test_it_has_no_classes_to_set():
    with pytest.raises(TypeError, match="num_classes"):
        PixArtConfig(num_classes=10)
    assert "num_classes" not in {field.name for field in dataclasses.fields(PixArtConfig)}
