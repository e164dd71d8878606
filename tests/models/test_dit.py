"""DiT's sizes, starting weights and properties: zero at first, every patch sees every other, positions, "no class"."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.errors import UserError
from jaxvram.layers.conditioning import timestep_features
from jaxvram.layers.norms import ModulatedLayerNorm
from jaxvram.layers.patches import patchify, sincos_positions, unpatchify
from jaxvram.layers.stack import REMAT, layer_slice
from jaxvram.models.dit import Block, DiT, DiTConfig

CFG = DiTConfig(image_size=8, channels=3, num_classes=5, n_layer=4, n_head=2, n_embd=12, remat="none", dtype="float32")
B = 2


def inputs(cfg=CFG):
    random = np.random.RandomState(0)
    x_BxHxWxC = random.normal(0, 1, (B, cfg.image_size, cfg.image_size, cfg.channels)).astype(np.float32)
    return x_BxHxWxC, np.float32([20, 700]), np.int32([0, cfg.num_classes])


def shapes_of(cfg):
    """(output, parameters) as shapes and dtypes."""
    x_BxHxWxC, t_B, labels_B = inputs(cfg)
    labels_B = labels_B if cfg.num_classes else None
    out, variables = jax.eval_shape(lambda: DiT(cfg).init_with_output(jax.random.key(0), x_BxHxWxC, t_B, labels_B))
    return out, variables["params"]


@functools.cache
def fresh(cfg=CFG):
    params = quick.jit(lambda key: DiT(cfg).init(key, *inputs(cfg))["params"])(jax.random.key(0))
    return jax.tree.map(np.asarray, params)


@functools.cache
def grown():
    """Fresh weights and as much again as training may add: no matrix is zero any more."""
    random = np.random.RandomState(1)
    return jax.tree.map(lambda p: p + random.normal(0, 0.2, p.shape).astype(np.float32), fresh())


def test_parameter_counts():
    """All twelve of the paper's, for 32 x 32 x 4 latents and 1000 classes; the authors count fixed positions too."""
    counts = {}
    for name in (f"{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)):
        cfg = DiTConfig.of_size(name)
        counts[name] = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(cfg)[1])) + cfg.tokens * cfg.n_embd
    assert counts == {
        "S/2": 32_963_360, "S/4": 32_945_024, "S/8": 33_148_160,
        "B/2": 130_512_416, "B/4": 130_475_648, "B/8": 130_881_536,
        "L/2": 458_102_816, "L/4": 458_053_760, "L/8": 458_594_816,
        "XL/2": 675_129_632, "XL/4": 675_074_432, "XL/8": 675_683_072,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "channels_out"),
    [
        ({}, 6),
        ({"learn_sigma": False}, 3),
        ({"channels": 1, "image_size": 12, "patch_size": 4}, 2),
        ({"patch_size": 1}, 6),
        ({"patch_size": 8, "num_classes": 1}, 6),
        ({"num_classes": 0}, 6),
        ({"dtype": "bfloat16", "param_dtype": "bfloat16"}, 6),
    ],
    ids=str,
)
def test_shapes_and_dtypes(fields, channels_out):
    """An image in, fp32 of the same size out, whatever it computes in; without classes there is no table of them."""
    cfg = dataclasses.replace(CFG, **fields)
    out, params = shapes_of(cfg)
    assert out.shape == (B, cfg.image_size, cfg.image_size, channels_out) and out.dtype == jnp.float32
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {cfg.param_dtype}
    assert ("y_embed" in params) == (cfg.num_classes > 0)
    if cfg.num_classes:
        assert params["y_embed"]["table"]["embedding"].shape == (cfg.num_classes + 1, cfg.n_embd)


def test_starting_weights():
    """Xavier uniform by matrix (q, k and v as one), N(0, 0.02) in what embeds t and y, zero where adaLN-Zero says."""
    params = fresh(dataclasses.replace(CFG, n_embd=48, num_classes=200))
    blocks = params["blocks"]
    for kernel in (
        params["patch_embed"]["kernel"], blocks["attn"]["c_attn"]["kernel"], blocks["attn"]["c_proj"]["kernel"],
        blocks["mlp"]["c_fc"]["kernel"], blocks["mlp"]["c_proj"]["kernel"],
    ):  # fmt: skip
        bound = math.sqrt(6 / sum(kernel.shape[-2:]))
        assert 0.97 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.1)
    t_embed, table = params["t_embed"], params["y_embed"]["table"]["embedding"]
    for kernel in (t_embed["fc1"]["kernel"], t_embed["fc2"]["kernel"], table):
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
    for kernel in (blocks["ada"]["kernel"], params["final"]["ada"]["kernel"], params["final"]["linear"]["kernel"]):
        assert not kernel.any()
    assert not any(x.any() for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "bias")


def test_nothing_at_first():
    """adaLN-Zero: the output is zero and each block hands on what it gets, to the last bit."""
    out = quick.jit(lambda params: DiT(CFG).apply({"params": params}, *inputs()))(fresh())
    assert not np.asarray(out).any()
    random = np.random.RandomState(0)
    x_BxTxD, c_BxD = (random.normal(0, 1, shape).astype(np.float32) for shape in ((B, 7, 12), (B, 12)))
    third = quick.jit(lambda blocks: Block(CFG).apply({"params": layer_slice(blocks, 2)}, x_BxTxD, None, c_BxD)[0])
    np.testing.assert_array_equal(third(fresh()["blocks"]), x_BxTxD)
    assert (third(grown()["blocks"]) != x_BxTxD).all()


def test_every_patch_sees_every_other():
    """A corner of the output has a gradient from each pixel of its image, the opposite corner's too; from no other image."""
    x_BxHxWxC, t_B, labels_B = inputs()
    at_corner = lambda x: DiT(CFG).apply({"params": grown()}, x, t_B, labels_B)[0, 0, 0].sum()
    g_BxHxW = np.abs(quick.jit(jax.grad(at_corner))(x_BxHxWxC)).sum(-1)
    assert (g_BxHxW[0] > 1e-4).all() and not g_BxHxW[1].any()


def test_the_image_is_not_transposed():
    """A transposed image has another output than the transposed one: rows and columns are told apart."""
    run = quick.jit(lambda x: DiT(CFG).apply({"params": grown()}, x, *inputs()[1:]))
    x_BxHxWxC = inputs()[0]
    flipped = run(x_BxHxWxC.swapaxes(1, 2)).swapaxes(1, 2)
    assert quick.relative_error(flipped, run(x_BxHxWxC)) > 0.01


@functools.cache
def program_and_results(remat, unroll_layers):
    """The jaxpr of output and gradients, and what it gives."""
    cfg = dataclasses.replace(CFG, remat=remat, unroll_layers=unroll_layers)

    def loss(params, x_BxHxWxC):
        out = DiT(cfg).apply({"params": params}, x_BxHxWxC, *inputs()[1:])
        return jnp.sin(out).sum(), out

    traced = quick.jit(jax.grad(loss, (0, 1), has_aux=True)).trace(grown(), inputs()[0])
    return str(traced.jaxpr), traced.lower().compile()(grown(), inputs()[0])


@pytest.mark.parametrize(
    ("remat", "unroll_layers"), [(remat, False) for remat in REMAT] + [("none", True), ("full", True)]
)
def test_remat_and_unrolling_change_nothing(remat, unroll_layers):
    """And remat is in the program where it is asked for."""
    jaxpr, results = program_and_results(remat, unroll_layers)
    assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (remat != "none")
    errors = jax.tree.map(quick.relative_error, results, program_and_results("none", False)[1])
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_bf16_is_close_to_fp32():
    run = lambda cfg: quick.jit(lambda p: DiT(cfg).apply({"params": p}, *inputs()))(grown())
    assert 1e-5 < quick.relative_error(run(dataclasses.replace(CFG, dtype="bfloat16")), run(CFG)) < 0.03


@pytest.mark.parametrize("num_classes", [1, 5])
def test_the_class_of_none_is_the_last_row(num_classes):
    """Label num_classes reads the table's last row, whatever num_classes is, and each other label its own."""
    cfg = dataclasses.replace(CFG, num_classes=num_classes, n_layer=1)
    random = np.random.RandomState(1)
    params = jax.tree.map(lambda p: random.normal(0, 0.2, p.shape).astype(np.float32), shapes_of(cfg)[1])
    x_BxHxWxC, t_B, _ = inputs()

    def of_label(params, label):
        return DiT(cfg).apply({"params": params}, x_BxHxWxC, t_B, jnp.full(B, label)).sum()

    gradient = quick.jit(jax.grad(of_label))
    for label in range(num_classes + 1):
        moved = np.abs(gradient(params, label)["y_embed"]["table"]["embedding"]).sum(-1) > 0
        assert (moved == (np.arange(num_classes + 1) == label)).all()


def test_patches():
    """By hand: patch (row, column) row by row, in it row, column, channel; and back."""
    x_BxHxWxC = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches_BxTxF = patchify(x_BxHxWxC, 2)
    assert patches_BxTxF.shape == (2, 6, 12)
    for t, f in np.ndindex(6, 12):
        i, j, c = 2 * (t // 3) + f // 6, 2 * (t % 3) + f // 3 % 2, f % 3
        assert (patches_BxTxF[:, t, f] == x_BxHxWxC[:, i, j, c]).all()
    np.testing.assert_array_equal(unpatchify(patches_BxTxF, 2, 4, 6), x_BxHxWxC)


def test_positions():
    """Number by number, in Python's own floats: the column first, then the row; of each sines, then cosines."""
    D, rows, columns = 12, 3, 5
    table_TxD = sincos_positions(D, rows, columns)
    assert table_TxD.shape == (15, 12) and table_TxD.dtype == np.float32
    for t, d in np.ndindex(15, D):
        place = (t % columns, t // columns)[d // 6]
        f, k = (math.sin, math.cos)[d % 6 // 3], d % 3
        assert abs(table_TxD[t, d] - f(place / 10000 ** (k / 3))) < 1e-6


def test_timestep_features():
    """256 numbers, cosines first, of frequencies 10000^(-k/128) to t = 999, where an angle in fp32 is 3e-5 off."""
    t_B = np.float32([0, 1, 437.25, 999])
    got_BxF = np.asarray(timestep_features(t_B))
    assert got_BxF.shape == (4, 256)
    for (i, t), k in ((it, k) for it in enumerate(t_B) for k in range(128)):
        angle = float(t) * math.exp(-math.log(10000) * k / 128)
        assert abs(got_BxF[i, k] - math.cos(angle)) < 1e-4 and abs(got_BxF[i, 128 + k] - math.sin(angle)) < 1e-4


def test_the_norms_epsilon():
    """1e-6, of which outputs of a whole model hardly tell: a row of variance 1e-6 comes out with half the variance."""
    x_1xTxD = 1e-3 * np.tile([1, -1], 8).reshape(1, 1, 16).astype(np.float32)
    norm = ModulatedLayerNorm(dtype=jnp.float32)
    y = norm.apply({}, x_1xTxD, np.full((1, 16), 3, np.float32), np.full((1, 16), 1, np.float32))
    np.testing.assert_allclose(y, 3 + 2 * np.sign(x_1xTxD) / math.sqrt(2), rtol=1e-5)


def test_an_image_of_another_size():
    with pytest.raises(ValueError, match=r"an image of \(8, 6, 3\) for a model of \(8, 8, 3\)"):
        jax.eval_shape(lambda: DiT(CFG).init(jax.random.key(0), inputs()[0][:, :, :6], *inputs()[1:]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remat": "ful"}, "model.remat='ful' is unknown; did you mean 'full'"),
        ({"kernels": "palas"}, "model.kernels='palas' is unknown; did you mean 'pallas'"),
        ({"dtype": "float16"}, "model.dtype='float16' is unknown"),
        ({"param_dtype": "fp32"}, "model.param_dtype='fp32' is unknown"),
        ({"n_layer": 0}, "every size must be at least 1"),
        ({"channels": 0}, "every size must be at least 1"),
        ({"num_classes": -1}, "num_classes at least 0"),
        ({"patch_size": 3}, "model.image_size=32 is not a multiple of model.patch_size=3"),
        ({"n_head": 5}, "model.n_embd=768 must be a multiple of 4 and of model.n_head=5"),
        ({"n_embd": 6, "n_head": 2}, "model.n_embd=6 must be a multiple of 4"),
    ],
    ids=str,
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        DiTConfig(**fields)
    assert "\n" not in str(raised.value)
