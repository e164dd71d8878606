"""An autoencoder's weights to and from diffusers' folders: exact both ways, and a clear line for each way it can fail."""

import dataclasses
import functools
import json
import re
import shlex

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
import quick
import safetensors.numpy
from checkpoints import assert_equal, edit_config, rounded, store_as, truncate

from jaxvram.convert import autoencoder as convert
from jaxvram.errors import UserError
from jaxvram.models.autoencoder import AutoencoderConfig, AutoencoderKL

CFG = AutoencoderConfig(
    image_size=8, width=4, multipliers=(1, 2), res_blocks=1, groups=2, remat="none", dtype="float32"
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
MIDDLE = "encoder.mid_block.attentions.0"


@functools.cache
def random_params(cfg, seed=0):
    """Nothing zero and nothing equal."""
    x = np.zeros((1, cfg.image_size, cfg.image_size, cfg.channels), np.float32)
    shapes = jax.eval_shape(lambda: AutoencoderKL(cfg).init(jax.random.key(0), x)["params"])
    random = np.random.RandomState(seed)
    return {"autoencoder": jax.tree.map(lambda s: random.normal(0, 0.1, s.shape).astype(s.dtype), shapes)}


@pytest.fixture
def folder(tmp_path):
    """An export of CFG, and its parameters."""
    params = random_params(CFG)
    convert.save(params | {"discriminator": {"kernel": np.ones(3)}}, CFG, tmp_path / "model", scaling_factor=0.25)
    return tmp_path / "model", params


@pytest.mark.parametrize(
    "fields",
    [{}, {"multipliers": (1,), "channels": 1}, {"res_blocks": 2, "latent_channels": 3, "multipliers": (1, 2, 1)},
     {"param_dtype": "bfloat16"}, {"kernels": "pallas", "remat": "full"}],
    ids=str,
)  # fmt: skip
def test_round_trip_is_exact(fields, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(dataclasses.replace(cfg, kernels="xla", remat="none"))
    convert.save(params, cfg, tmp_path / "model", 0.5)
    assert_equal(convert.load_params(tmp_path / "model", cfg), params)
    same = {name: getattr(cfg, name) for name in ("remat", "dtype", "param_dtype", "kernels")}
    assert convert.read_config(tmp_path / "model", **same) == (cfg, 0.5)


def test_each_tensor_where_it_belongs(folder):
    """By hand, and not by the reader: which third is q, which way a kernel and a matrix lie, what a level is called."""
    path, params = folder
    tensors, ours = safetensors.numpy.load_file(path / WEIGHTS), params["autoencoder"]
    attn, D = ours["encoder"]["mid"]["attention"], 8
    for j, name in enumerate("qkv"):
        third = np.s_[..., j * D : (j + 1) * D]
        np.testing.assert_array_equal(tensors[f"{MIDDLE}.to_{name}.weight"], attn["attn"]["c_attn"]["kernel"][third].T)
        np.testing.assert_array_equal(tensors[f"{MIDDLE}.to_{name}.bias"], attn["attn"]["c_attn"]["bias"][third])
    np.testing.assert_array_equal(tensors[f"{MIDDLE}.to_out.0.weight"], attn["attn"]["c_proj"]["kernel"].T)
    np.testing.assert_array_equal(tensors[f"{MIDDLE}.group_norm.weight"], attn["norm"]["scale"])
    down, kernel = tensors["encoder.down_blocks.0.downsamplers.0.conv.weight"], ours["encoder"]["down_0"]["downsample"]
    for i, j, y, x in np.ndindex(4, 4, 3, 3):
        assert down[i, j, y, x] == kernel["conv"]["kernel"][y, x, j, i]
    skip = tensors["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"]
    assert skip.shape == (4, 8, 1, 1)
    np.testing.assert_array_equal(skip[:, :, 0, 0], ours["decoder"]["up_1"]["resnet_0"]["skip"]["kernel"].T)
    np.testing.assert_array_equal(tensors["quant_conv.weight"][:, :, 0, 0], ours["quant"]["kernel"].T)
    np.testing.assert_array_equal(tensors["post_quant_conv.bias"], ours["post_quant"]["bias"])
    np.testing.assert_array_equal(tensors["decoder.conv_out.bias"], ours["conv_out"]["bias"])
    np.testing.assert_array_equal(tensors["decoder.conv_norm_out.weight"], ours["decoder"]["norm_out"]["scale"])
    config = json.loads((path / "config.json").read_text())
    assert (config["block_out_channels"], config["scaling_factor"], config["sample_size"]) == ([4, 8], 0.25, 8)
    assert not any("discriminator" in name or "kernel" in name for name in tensors)


def test_a_stable_diffusions_folder(folder):
    """Whose autoencoder lies in `vae`, in files from before 2023: with other names, and silent on what was no choice yet."""
    path, params = folder
    pipeline = path.parent / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match=r"pipeline/vae: there is no such folder"):
        convert.load_params(pipeline, CFG)
    edit_config(path, sample_size=[8, 8], remove=("scaling_factor", "use_quant_conv", "mid_block_add_attention"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = lambda name: functools.reduce(lambda n, new: n.replace(f".{new}.", f".{old[new]}."), old, name)
    checkpoints.edit_weights(path, lambda tensors: {older(name): x for name, x in tensors.items()}, WEIGHTS)
    assert f"{MIDDLE}.proj_attn.bias" in safetensors.numpy.load_file(path / WEIGHTS)
    path.rename(pipeline / "vae")
    assert_equal(convert.load_params(pipeline, CFG), params)
    assert convert.read_config(pipeline)[1] == 0.18215


@pytest.mark.parametrize("theirs", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_param_dtype(theirs, folder):
    path, params = folder
    store_as(path, theirs, WEIGHTS)
    assert_equal(convert.load_params(path, CFG), rounded(params, theirs))


def test_an_image_size_is_the_recipes(folder):
    path, params = folder
    assert_equal(convert.load_params(path, dataclasses.replace(CFG, image_size=16)), params)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"channels": 1}, {"channels": 3}),
        ({"latent_channels": 8}, {"latent_channels": 4}),
        ({"width": 8}, {"width": 4}),
        ({"multipliers": (1, 2, 2)}, {"multipliers": (1, 2)}),
        ({"res_blocks": 2}, {"res_blocks": 1}),
        ({"groups": 4}, {"groups": 2}),
    ],
    ids=str,
)
def test_another_model(fields, found, folder):
    ((name, value),) = found.items()
    paste = shlex.quote(f"--config.model.{name}={value}")
    with pytest.raises(UserError, match=re.escape(f"{name}={value} (the recipe: {fields[name]}); add {paste}")):
        convert.load_params(folder[0], dataclasses.replace(CFG, **fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "VQModel"}, r"config\.json is of a 'VQModel' model; this recipe's model is 'AutoencoderKL'"),
        ({"act_fn": "relu"}, r"act_fn=relu is no AutoencoderKL of Stable Diffusion's kind \(there: silu\)"),
        ({"use_quant_conv": False}, r"use_quant_conv=False is no AutoencoderKL"),
        ({"shift_factor": 0.1}, r"shift_factor=0\.1 is no AutoencoderKL"),
        ({"latents_mean": [0, 0]}, r"latents_mean=\[0, 0\] is no AutoencoderKL"),
        ({"latent_channels": 0}, r"config\.json is damaged: latent_channels=0"),
        ({"block_out_channels": []}, r"is damaged: block_out_channels=\[\]"),
        ({"block_out_channels": [4, 6]}, r"6 channels are no multiple of the first level's 4"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, r"is not DownEncoderBlock2D at every"),
        ({"out_channels": 1}, r"out_channels differ from in_channels"),
        ({"scaling_factor": 0}, r"is damaged: scaling_factor=0"),
    ],
    ids=str,
)
def test_what_is_not_ours(changes, message, folder):
    edit_config(folder[0], **changes)
    with pytest.raises(UserError, match=message):
        convert.read_config(folder[0])


def test_damaged_weights(folder):
    path, _ = folder
    checkpoints.edit_weights(path, lambda tensors: {n: x for n, x in tensors.items() if n != "quant_conv.bias"}, WEIGHTS)
    with pytest.raises(UserError, match=r"has no tensor 'quant_conv\.bias'"):
        convert.load_params(path, CFG)
    truncate(path, WEIGHTS)
    with pytest.raises(UserError, match="is damaged or cut short"):
        convert.load_params(path, CFG)


def test_latents_without_spread_are_not_exported(tmp_path):
    with pytest.raises(UserError, match=r"no spread that could be scaled \(1 / inf\): train first"):
        convert.save(random_params(CFG), CFG, tmp_path / "model", float("inf"))


def test_diffusers_loads_an_export(folder):
    """Every weight is found, images come out as ours do, and what it saves again comes back to us unchanged."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    path, params = folder
    theirs, found = diffusers.AutoencoderKL.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    assert theirs.config.scaling_factor == 0.25
    x = np.random.RandomState(2).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(x).movedim(-1, 1)).sample.movedim(1, -1).numpy()
    ours = quick.jit(lambda p: AutoencoderKL(CFG).apply({"params": p}, x))(params["autoencoder"])
    assert quick.relative_error(ours, want) < 1e-5
    theirs.save_pretrained(path.parent / "theirs")
    assert_equal(convert.load_params(path.parent / "theirs", CFG), params)
