"""The U-Nets' weights to and from diffusers' folders: exact both ways, and a clear line for each way it can fail."""

import dataclasses
import functools
import json

import checkpoints
import numpy as np
import pytest
import quick
import safetensors.numpy
from checkpoints import assert_equal, edit_config, rounded, store_as

from jaxvram.convert import unet as convert
from jaxvram.errors import UserError
from jaxvram.models.unet import UNet, UNetConfig

PIXELS = UNetConfig(
    image_size=8, channels=3, num_classes=4, learn_sigma=True, width=4, multipliers=(1, 2), res_blocks=1,
    attention_levels=(1,), head_dim=4, groups=2, remat="none", dtype="float32",
)  # fmt: skip
TEXT = dataclasses.replace(
    PIXELS, num_classes=0, learn_sigma=False, attention_levels=(0,), context_dim=6, context_length=5
)
JOINT = dataclasses.replace(TEXT, text_layers=2, text_heads=2, text_ngrams=(2, 3))
WEIGHTS = "diffusion_pytorch_model.safetensors"
GATED = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
QUERY = "mid_block.attentions.0.to_q.weight"


@functools.cache
def random_params(cfg):
    """Nothing zero and nothing equal."""
    random = np.random.RandomState(0)
    draw = lambda s: random.normal(0, 0.3, s.shape).astype(s.dtype)
    return convert.unflatten_dict({name: draw(s) for name, s in convert._shapes(cfg).items()}, sep="/")


@pytest.fixture
def folder(tmp_path):
    """An export of PIXELS."""
    convert.save(random_params(PIXELS), PIXELS, tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder, name, edit):
    checkpoints.edit_tensors(folder, WEIGHTS, **{name: edit})


@pytest.mark.parametrize(
    "cfg",
    [PIXELS, TEXT, JOINT, dataclasses.replace(PIXELS, num_classes=0, heads=1, head_dim=0, attention_levels=()),
     dataclasses.replace(TEXT, param_dtype="bfloat16", heads=2, head_dim=0, kernels="pallas", remat="full")],
    ids=["pixels", "text", "joint", "unconditional", "bf16"],
)  # fmt: skip
def test_round_trip_is_exact(cfg, tmp_path):
    params = random_params(dataclasses.replace(cfg, kernels="xla"))
    convert.save(params, cfg, tmp_path / "model")
    assert_equal(convert.load_params(tmp_path / "model", cfg), params)


def test_each_tensor_where_it_belongs(tmp_path):
    """By hand, and not by the reader: which half gates, which way a matrix lies, how the way up counts its levels."""
    convert.save(params := random_params(TEXT), TEXT, tmp_path / "model")
    theirs = safetensors.numpy.load_file(tmp_path / "model" / WEIGHTS)
    same = np.testing.assert_array_equal
    mlp = params["mid_spatial"]["mlp"]
    same(theirs[f"{GATED}.weight"][:32], mlp["c_fc"]["kernel"].T)
    same(theirs[f"{GATED}.weight"][32:], mlp["c_gate"]["kernel"].T)
    same(theirs[f"{GATED}.bias"][32:], mlp["c_gate"]["bias"])
    first = params["up_0_res_1"]["conv1"]["kernel"]  # the last block on the way up, of the largest images
    same(theirs["up_blocks.1.resnets.1.conv1.weight"][3, 2], first[:, :, 2, 3])
    same(theirs["up_blocks.1.resnets.1.conv_shortcut.weight"][..., 0, 0], params["up_0_res_1"]["skip"]["kernel"].T)
    same(theirs["mid_block.attentions.0.proj_in.weight"][..., 0, 0], params["mid_spatial"]["proj_in"]["kernel"].T)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel" and config["attention_head_dim"] == [1, 2]
    assert config["up_block_types"] == ["UpBlock2D", "CrossAttnUpBlock2D"]
    assert (config["cross_attention_dim"], config["block_out_channels"]) == (6, [4, 8])


def test_stable_diffusions_folder(tmp_path):
    """A pipeline, of which its unet/ is meant; matrices where version 1 has convolutions of one pixel, as in version 2."""
    convert.save(params := random_params(TEXT), TEXT, tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert_equal(convert.load_params(tmp_path / "pipeline", TEXT), params)
    for end in ("in", "out"):
        edit_weights(tmp_path / "pipeline/unet", f"mid_block.attentions.0.proj_{end}.weight", lambda x: x[..., 0, 0])
    edit_config(tmp_path / "pipeline/unet", use_linear_projection=True, attention_head_dim=[1, 2])
    assert_equal(convert.load_params(tmp_path / "pipeline", TEXT), params)


def test_a_text_encoder_trained_with_it(tmp_path):
    """Two folders; a recipe of another encoder is told so."""
    convert.save(random_params(JOINT), JOINT, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["text_encoder", "unet"]
    with pytest.raises(UserError, match=r"text_layers=2 .*add --config\.model\.text_layers=2"):
        convert.load_params(tmp_path / "model", dataclasses.replace(JOINT, text_layers=1))
    with pytest.raises(UserError, match=r"text_ngrams=\(2, 3\)"):
        convert.load_params(tmp_path / "model", dataclasses.replace(JOINT, text_ngrams=()))


def test_names_of_2022(folder):
    """Attention was called query, key, value and proj_attn then."""

    def rename(tensors):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {name.replace(f".{new}.", f".{old}."): x for name, x in tensors.items()}
        return tensors

    checkpoints.edit_weights(folder, rename, WEIGHTS)
    assert_equal(convert.load_params(folder, PIXELS), random_params(PIXELS))


def test_half_precision_becomes_param_dtype(folder):
    store_as(folder, np.float16, WEIGHTS)
    assert_equal(convert.load_params(folder, PIXELS), rounded(random_params(PIXELS), np.float16))


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"image_size": 16}, "image_size=8"),
        ({"num_classes": 0}, "num_classes=4"),
        ({"learn_sigma": False}, "learn_sigma=True"),
        ({"width": 8}, "width=4"),
        ({"multipliers": (1, 3)}, r"'?--config\.model\.multipliers=\(1, 2\)'?"),
        ({"res_blocks": 2}, "res_blocks=1"),
        ({"attention_levels": (0,)}, r"attention_levels=\(1,\)"),
        ({"head_dim": 2}, r"heads=0.*head_dim=4|heads=2 --config.model.head_dim=0"),
    ],
    ids=str,
)
def test_another_model(fields, advice, folder):
    with pytest.raises(UserError, match=rf"; add .*{advice}") as raised:
        convert.load_params(folder, dataclasses.replace(PIXELS, **fields))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.rename(p.with_name("moved")), rf"no such folder; give one with config.json and {WEIGHTS}"),
        (lambda p: edit_config(p, _class_name="UNet2DConditionModel"), "of a 'UNet2DConditionModel' model"),
        (lambda p: edit_config(p, flip_sin_to_cos=False), "flip_sin_to_cos=False is no U-Net that we know"),
        (lambda p: edit_config(p, norm_eps=1e-6), r"norm_eps=1e-06 is no U-Net that we know \(there: 1e-05\)"),
        (lambda p: edit_config(p, in_channels="3"), "damaged: in_channels='3'"),
        (lambda p: edit_config(p, out_channels=4), "out_channels=4 is neither in_channels=3 nor twice that"),
        (lambda p: edit_config(p, block_out_channels=[4, 6]), r"\[4, 6\] are not whole multiples of the first"),
        (
            lambda p: edit_config(p, down_block_types=["DownBlock2D", "SkipDownBlock2D"]),
            "a level of SkipDownBlock2D and AttnUpBlock2D is not supported",
        ),
        (lambda p: (p / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (lambda p: edit_weights(p, QUERY, lambda x: None), f"has no tensor '{QUERY}'"),
        (lambda p: edit_weights(p, QUERY, lambda x: x[:4]), rf"{QUERY} has shape \(4, 8\); .* means \(8, 8\)"),
    ],
)
def test_damage(damage, message, folder):
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder, PIXELS)
    assert "\n" not in str(raised.value)


def test_what_diffusers_cannot_express(tmp_path):
    """Heads as many at each level, of sizes that differ."""
    cfg = dataclasses.replace(PIXELS, heads=2, head_dim=0, attention_levels=(0, 1))
    with pytest.raises(UserError, match=r"heads=2 cannot be exported: .* not of \[2, 4\]; train with model.head_dim"):
        convert.save(random_params(cfg), cfg, tmp_path / "model")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("cfg", [PIXELS, TEXT], ids=["pixels", "text"])
def test_ours_to_diffusers_and_back(cfg, tmp_path, monkeypatch):
    """from_pretrained finds every weight, its outputs are ours, and what it saves comes back bit for bit."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    params = random_params(cfg)
    convert.save(params, cfg, tmp_path / "ours")
    of = diffusers.UNet2DConditionModel if cfg.context_dim else diffusers.UNet2DModel
    model, found = of.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False, output_loading_info=True)
    assert not any(found.values())
    random = np.random.RandomState(1)
    x, t = random.normal(0, 1, (2, 8, 8, 3)).astype(np.float32), np.float32([3, 90])
    given = random.normal(0, 1, (2, 5, 6)).astype(np.float32) if cfg.context_dim else np.int32([cfg.num_classes, 1])
    with torch.no_grad():
        want = model(torch.tensor(x).movedim(-1, 1), torch.tensor(t), torch.tensor(given)).sample.movedim(1, -1)
    condition = {"context_BxSxE": given, "length_B": np.int32([5, 5])} if cfg.context_dim else given
    got = quick.jit(lambda params: UNet(cfg).apply({"params": params}, x, t, condition))(params)
    assert quick.relative_error(got, want.numpy()) <= 1e-5
    model.save_pretrained(tmp_path / "again", max_shard_size=40_000)
    assert_equal(convert.load_params(tmp_path / "again", cfg), params)
