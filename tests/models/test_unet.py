"""The U-Nets' sizes, starting weights and properties: zero at first, all places see each other, text and its padding."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram import recipe
from jaxvram.errors import UserError
from jaxvram.finetune.config import ALL_LINEAR
from jaxvram.models.unet import SIZES, UNet, UNetConfig
from jaxvram.train.optimizer import path_name

OF_CLASSES = UNetConfig(
    image_size=8, channels=2, num_classes=3, width=8, multipliers=(1, 2), res_blocks=1, attention_levels=(0,), heads=2,
    head_dim=0, groups=2, remat="none", dtype="float32",
)  # fmt: skip
OF_TEXT = dataclasses.replace(
    OF_CLASSES, num_classes=0, context_dim=8, context_length=5, text_layers=1, text_heads=2, learn_sigma=True
)
B = 2
COUNTS = {
    "pixel64": 113_673_219, "sd1": 859_520_964, "sd32": 9_084_516, "sd64": 34_966_724, "sd96": 77_646_628,
    "sd128": 137_124_228, "sd192": 306_472_516,
}  # fmt: skip


def inputs(cfg):
    random = np.random.RandomState(0)
    x_BxHxWxC = random.normal(0, 1, (B, cfg.image_size, cfg.image_size, cfg.channels)).astype(np.float32)
    condition = np.int32([0, cfg.num_classes]) if cfg.num_classes else None
    if cfg.context_dim:
        tokens = random.randint(0, 259, (B, cfg.context_length)).astype(np.int32)
        features = random.normal(0, 1, (B, cfg.context_length, cfg.context_dim)).astype(np.float32)
        of_text = {"tokens_BxS": tokens} if cfg.text_layers else {"context_BxSxE": features}
        condition = of_text | {"length_B": np.int32([5, 2])}
    return x_BxHxWxC, np.float32([20, 700]), condition


def shapes_of(cfg):
    """(output, parameters) as shapes and dtypes."""
    out, variables = jax.eval_shape(lambda: UNet(cfg).init_with_output(jax.random.key(0), *inputs(cfg)))
    return out, variables["params"]


@functools.cache
def grown(cfg):
    """Weights of which none is zero."""
    random = np.random.RandomState(1)
    return jax.tree.map(lambda s: random.normal(0, 0.3, s.shape).astype(np.float32), shapes_of(cfg)[1])


@functools.partial(quick.jit, static_argnums=0)
def run(cfg, params, x, t, condition):
    return UNet(cfg).apply({"params": params}, x, t, condition)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if COUNTS[name] > 1e8 else pytest.mark.slow) for name in SIZES]
)
def test_parameter_counts(name):
    """diffusers' unconditional example, Stable Diffusion 1, and its shape with fewer channels."""
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(UNetConfig.of_size(name))[1])) == COUNTS[name]


@pytest.mark.parametrize("fields", [{}, {"learn_sigma": True, "dtype": "bfloat16", "param_dtype": "bfloat16"}], ids=str)
def test_shapes_and_dtypes(fields):
    cfg = dataclasses.replace(OF_CLASSES, **fields)
    out, params = shapes_of(cfg)
    assert out.shape == (B, 8, 8, 4 if cfg.learn_sigma else 2) and out.dtype == jnp.float32
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {cfg.param_dtype}
    assert params["y_embed"]["table"]["embedding"].shape == (4, 32)


def test_starting_weights():
    """Nothing at first: what ends a branch, and the model, is zero; the rest is uniform, by its fan in."""
    cfg = dataclasses.replace(OF_TEXT, multipliers=(1,))
    out, variables = quick.jit(lambda key: UNet(cfg).init_with_output(key, *inputs(cfg)))(jax.random.key(0))
    params = variables["params"]
    assert not np.asarray(out).any()
    for path, x in jax.tree.leaves_with_path(params):
        name, ends = path_name(path), r"conv_out/.*|.*/conv2/.*|.*/proj_out/.*|.*/bias"
        if not name.startswith("text/"):
            assert bool(np.any(x)) != bool(re.fullmatch(ends, name)), name
    kernel = np.asarray(params["mid_res_0"]["conv1"]["kernel"])
    bound = 1 / math.sqrt(9 * 8)
    assert 0.97 * bound < np.abs(kernel).max() <= bound


def test_every_place_sees_every_other():
    """A corner of the output has a gradient from each pixel of its image and its class; none from another image."""
    x, t, labels = inputs(OF_CLASSES)
    at_corner = lambda x, params: UNet(OF_CLASSES).apply({"params": params}, x, t, labels)[0, 0, 0].sum()
    dx, dparams = quick.jit(jax.grad(at_corner, (0, 1)))(x, grown(OF_CLASSES))
    assert (np.abs(dx[0]).sum(-1) > 0).all() and not np.any(dx[1])
    moved = np.abs(dparams["y_embed"]["table"]["embedding"]).sum(-1) > 0
    assert moved.tolist() == [True, False, False, False]  # image 0 is of class 0


def test_rows_are_not_columns():
    x, t, labels = inputs(OF_CLASSES)
    plain = run(OF_CLASSES, grown(OF_CLASSES), x, t, labels)
    flipped = run(OF_CLASSES, grown(OF_CLASSES), x.swapaxes(1, 2), t, labels).swapaxes(1, 2)
    assert quick.relative_error(flipped, plain) > 0.01


def test_padding_of_a_text_changes_nothing():
    """Tokens behind a text's end may be anything; the last one that counts may not."""
    x, t, condition = inputs(OF_TEXT)
    params, tokens = grown(OF_TEXT), condition["tokens_BxS"]
    out = run(OF_TEXT, params, x, t, condition)
    other = np.where(np.arange(5) < condition["length_B"][:, None], tokens, 258 - tokens)
    np.testing.assert_array_equal(run(OF_TEXT, params, x, t, condition | {"tokens_BxS": other}), out)
    other = tokens.copy()
    other[1, 1] = 258 - other[1, 1]
    changed = np.abs(run(OF_TEXT, params, x, t, condition | {"tokens_BxS": other}) - out).max((1, 2, 3))
    assert changed[0] == 0 and changed[1] > 1e-3


@functools.cache
def program_and_results(remat):
    """The jaxpr of gradients, with dropout, and what it gives."""
    cfg = dataclasses.replace(OF_TEXT, remat=remat, dropout=0.2)

    def loss(params, x):
        rngs = {"dropout": jax.random.key(3)}
        out = UNet(cfg).apply({"params": params}, x, *inputs(cfg)[1:], deterministic=False, rngs=rngs)
        return jnp.sin(out).sum()

    traced = quick.jit(jax.value_and_grad(loss, (0, 1))).trace(grown(OF_TEXT), inputs(cfg)[0])
    return str(traced.jaxpr), traced.lower().compile()(grown(OF_TEXT), inputs(cfg)[0])


def test_remat_changes_nothing():
    """With dropout, whose masks come back; and it is in the program where it is asked for. The text encoder learns."""
    without, want = program_and_results("none")
    with_it, got = program_and_results("full")
    blocks = with_it.count("checkpoint") + with_it.count("remat")
    assert blocks >= 8 and "checkpoint" not in without and "remat[" not in without
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, got, want))) < 1e-5
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(got[1][0]["text"]["blocks"]["mlp"]))
    plain = jnp.sin(run(OF_TEXT, grown(OF_TEXT), *inputs(OF_TEXT))).sum()
    assert abs(float(want[0] - plain)) > 1e-3  # dropout was on


def test_bf16_is_close_to_fp32():
    low = run(dataclasses.replace(OF_CLASSES, dtype="bfloat16"), grown(OF_CLASSES), *inputs(OF_CLASSES))
    assert 1e-5 < quick.relative_error(low, run(OF_CLASSES, grown(OF_CLASSES), *inputs(OF_CLASSES))) < 0.05


def test_a_regex_finds_the_attention_and_its_mlp():
    """What LoRA is put on: q, k, v and the result, to the image and to the text, and the MLP; no convolution."""
    cfg = dataclasses.replace(OF_TEXT, text_layers=0)
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(shapes_of(cfg)[1])]
    found = {name for name in names if name.endswith("kernel") and re.fullmatch(ALL_LINEAR, name)}
    ends = [f"{a}/c_{b}" for a in ("attn", "cross_attn") for b in ("q", "k", "v", "proj")]
    ends += [f"mlp/c_{b}" for b in ("fc", "gate", "proj")]
    places = ("down_0_spatial_0", "mid_spatial", "up_0_spatial_0", "up_0_spatial_1")
    assert found == {f"{place}/{end}/kernel" for place in places for end in ends}


def test_tuples_of_a_recipe_come_back_from_json():
    """A recipe is kept as JSON beside a run, and JSON has no tuples."""
    hints = {"multipliers": [1, 2], "attention_levels": [0]}
    cfg = recipe._from_config(UNetConfig, dataclasses.asdict(OF_CLASSES) | hints, "model")
    assert cfg == OF_CLASSES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remat": "ful"}, "model.remat='ful' is unknown; did you mean 'full'"),
        ({"dtype": "float16"}, "model.dtype='float16' is unknown"),
        ({"width": 0}, "every size must be at least 1"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"multipliers": ()}, r"model.multipliers=\(\) must be whole numbers, the first of them 1"),
        ({"multipliers": (2, 4)}, "the first of them 1"),
        ({"attention_levels": (2,)}, "model.attention_levels: there is no level 2; the 2 levels begin at 0"),
        ({"image_size": 9}, "model.image_size=9 is halved 1 times: it must be a multiple of 2"),
        ({"groups": 3}, "model.width=8 is not a multiple of model.groups=3"),
        ({"head_dim": 4}, "set the other to 0"),
        ({"heads": 3}, "model.heads=3 does not divide a level's 8 channels|a level's 16 channels"),
        ({"heads": 0, "head_dim": 3}, "model.head_dim=3 does not divide a level's"),
        ({"context_dim": 4}, r"a class \(num_classes\) or by a text \(context_dim\)"),
        ({"num_classes": 0, "context_dim": 8, "text_ngrams": (3,)}, "model.text_ngrams belongs to a text encoder of its"),
        (
            {"num_classes": 0, "context_dim": 8, "text_layers": 1, "text_heads": 2, "text_ngrams": (1,)},
            r"ngrams=\(1,\) must be different",
        ),
        ({"text_layers": 2}, "model.text_layers: its encoder's width, context_dim, must be a multiple of text_heads"),
    ],
    ids=str,
)
def test_bad_configurations(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(OF_CLASSES, **fields)


def test_bad_inputs():
    with pytest.raises(UserError, match="'sd99' is no size of U-Net; did you mean 'sd96'"):
        UNetConfig.of_size("sd99")
    x, t, labels = inputs(OF_CLASSES)
    start = lambda x, condition: jax.eval_shape(lambda: UNet(OF_CLASSES).init(jax.random.key(0), x, t, condition))
    with pytest.raises(ValueError, match=r"an image of \(8, 6, 2\) for a model of \(8, 8, 2\)"):
        start(x[:, :, :6], labels)
    with pytest.raises(ValueError, match=r"a condition belongs to a model with classes or text"):
        start(x, None)
