"""PixArt's weights to and from diffusers' folders, from the stage before, and from a DiT that it equals at t = 500."""

import dataclasses
import functools
import json
import pathlib

import checkpoints
import jax
import numpy as np
import pytest
import quick
import safetensors.numpy
from checkpoints import assert_equal, edit_config

from jaxvram import recipe as recipes
from jaxvram.convert import dit as convert_dit
from jaxvram.convert import pixart as convert
from jaxvram.errors import UserError
from jaxvram.models.dit import DiT, DiTConfig
from jaxvram.models.pixart import PixArt, PixArtConfig
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask
from jaxvram.train.partition import join
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]
CFG = PixArtConfig(
    image_size=6, channels=3, n_layer=3, n_head=2, n_embd=12, context_dim=5, context_length=4, micro_conditions=True,
    remat="none", dtype="float32",
)  # fmt: skip
PLAIN = dataclasses.replace(CFG, micro_conditions=False)
DIT = DiTConfig(image_size=6, channels=3, num_classes=5, n_layer=3, n_head=2, n_embd=12, remat="none", dtype="float32")
WEIGHTS = "diffusion_pytorch_model.safetensors"
B = 2


def told(cfg):
    random = np.random.RandomState(3)
    context = random.normal(0, 1, (B, cfg.context_length, cfg.context_dim)).astype(np.float32)
    of_picture = {"size_Bx2": np.float32([[6, 12], [48, 7]]), "aspect_B": np.float32([0.5, 2])}
    return {"context_BxSxE": context, "length_B": np.int32([4, 1])} | of_picture


def image(H=6, W=6):
    return np.random.RandomState(1).normal(0, 1, (B, H, W, 3)).astype(np.float32)


def start(model, *inputs, std=0.1):
    """Random weights: nothing zero and nothing equal."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs)["params"])
    random = np.random.RandomState(0)
    return jax.tree.map(lambda s: random.normal(0, std, s.shape).astype(s.dtype), shapes)


@functools.cache
def random_params(cfg):
    return start(PixArt(cfg), image(), np.zeros(B), told(cfg))


@pytest.fixture
def folder(tmp_path):
    """An export of CFG, and its parameters."""
    convert.save(random_params(CFG), CFG, tmp_path / "model")
    return tmp_path / "model", random_params(CFG)


edit_weights = functools.partial(checkpoints.edit_tensors, file=WEIGHTS)


@pytest.mark.parametrize(
    "fields",
    [{}, {"micro_conditions": False, "learn_sigma": False, "patch_size": 3}, {"param_dtype": "bfloat16", "n_layer": 1},
     {"kernels": "pallas", "remat": "nested", "interpolation_scale": 2.0}],
    ids=str,
)  # fmt: skip
def test_round_trip_is_exact(fields, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(dataclasses.replace(cfg, kernels="xla"))
    convert.save(params, cfg, tmp_path / "model")
    assert_equal(convert.load_params(tmp_path / "model", cfg), params)


def test_each_tensor_where_it_belongs(folder):
    """By hand, and not by the reader: which is q, which way a matrix lies, what is a table."""
    path, params = folder
    tensors = safetensors.numpy.load_file(path / WEIGHTS)
    same, blocks = np.testing.assert_array_equal, params["blocks"]
    for i in range(CFG.n_layer):
        in_block = lambda name, i=i: tensors[f"transformer_blocks.{i}.{name}"]
        for name in "qkv":
            same(in_block(f"attn1.to_{name}.weight"), blocks["attn"][f"c_{name}"]["kernel"][i].T)
            same(in_block(f"attn2.to_{name}.weight"), blocks["cross_attn"][f"c_{name}"]["kernel"][i].T)
        same(in_block("scale_shift_table"), blocks["table"][i])
    same(tensors["scale_shift_table"], params["final"]["table"])
    same(tensors["adaln_single.linear.weight"], params["t_block"]["kernel"].T)
    same(tensors["caption_projection.linear_1.weight"], params["y_embed"]["fc1"]["kernel"].T)
    same(tensors["adaln_single.emb.resolution_embedder.linear_2.bias"], params["size_embed"]["fc2"]["bias"])
    for row, column, c in np.ndindex(2, 2, 3):
        kernel_D = params["patch_embed"]["kernel"][(row * 2 + column) * 3 + c]
        same(tensors["pos_embed.proj.weight"][:, c, row, column], kernel_D)
    config = json.loads((path / "config.json").read_text())
    assert (config["caption_channels"], config["use_additional_conditions"], config["sample_size"]) == (5, True, 6)


def test_a_pipelines_folder_of_2023(folder):
    """The class that PixArt was a part of then, with less said of it."""
    path, params = folder
    edit_config(path, _class_name="Transformer2DModel", remove=["norm_eps", "patch_size", "attention_type"])
    path.rename(path.parent / "transformer")
    (path.parent / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    assert_equal(convert.load_params(path.parent, CFG), params)


def test_the_next_stage(tmp_path):
    """Weights of another image size, positions stretched otherwise, and no micro-conditions yet: a start without a word.

    What embeds size and aspect adds nothing at first, and learns: behind what comes from the seed it is zero.
    """
    convert.save(params := random_params(PLAIN), PLAIN, tmp_path / "model")
    larger = dataclasses.replace(CFG, image_size=12, interpolation_scale=2.0)
    read = convert.load_params(tmp_path / "model", larger)
    for name in ("size_embed", "aspect_embed"):
        embed = read.pop(name)
        assert set(embed) == {"fc2"} and not any(x.any() for x in jax.tree.leaves(embed))
    assert_equal(read, params)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"channels": 4}, "channels=3"),
        ({"patch_size": 3}, "patch_size=2"),
        ({"n_layer": 2}, "n_layer=3"),
        ({"n_head": 4}, "n_head=2"),
        ({"mlp_ratio": 2}, "mlp_ratio=4"),
        ({"learn_sigma": False}, "learn_sigma=True"),
        ({"context_dim": 7}, "context_dim=5"),
        ({"micro_conditions": False}, "micro_conditions=True"),
        ({"interpolation_scale": 2.0}, r"interpolation_scale=1\.0"),
    ],
    ids=str,
)
def test_another_model(fields, found, folder):
    value = next(iter(fields.values()))
    with pytest.raises(UserError, match=rf"{found} \(the recipe: {value}\).*; add --config\.model\.{found}$") as raised:
        convert.load_params(folder[0], dataclasses.replace(CFG, **fields))
    assert "\n" not in str(raised.value)


QUERY, TABLE = "transformer_blocks.1.attn2.to_q.weight", "transformer_blocks.2.scale_shift_table"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: edit_config(p, _class_name="UNet2DModel"),
            "of a 'UNet2DModel' model; this recipe's model is 'PixArt",
        ),
        (lambda p: edit_config(p, num_layers="3"), "damaged: num_layers='3'"),
        (lambda p: edit_config(p, caption_channels=None), "damaged: caption_channels=None"),
        (lambda p: edit_config(p, out_channels=4), "out_channels=4 must be in_channels=3 or twice that"),
        (lambda p: edit_config(p, cross_attention_dim=16), "cross_attention_dim=16 the model's width, 12"),
        (lambda p: edit_config(p, norm_type="ada_norm"), r"norm_type=ada_norm is no PixArt .*there: ada_norm_single"),
        (lambda p: edit_config(p, attention_type="gated"), "attention_type=gated is no PixArt"),
        (lambda p: edit_weights(p, **{QUERY: lambda x: None}), f"has no tensor '{QUERY}'"),
        (lambda p: edit_weights(p, **{TABLE: lambda x: x.T}), rf"{TABLE} has shape \(12, 6\); .* means \(6, 12\)"),
    ],
)
def test_damage(damage, message, folder):
    damage(folder[0])
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder[0], CFG)
    assert "\n" not in str(raised.value)


def test_what_diffusers_cannot_express(tmp_path):
    cfg = dataclasses.replace(CFG, mlp_ratio=2)
    with pytest.raises(UserError, match=r"mlp_ratio=2 cannot be exported"):
        convert.save(random_params(cfg), cfg, tmp_path / "model")
    assert not [*tmp_path.iterdir()]


@functools.partial(quick.jit, static_argnums=0)
def pixart(cfg, params, t_B, x_BxHxWxC):
    return PixArt(cfg).apply({"params": params}, x_BxHxWxC, t_B, told(cfg))


@functools.partial(quick.jit, static_argnums=0)
def of_dit(cfg, params, t_B, labels_B):
    return DiT(cfg).apply({"params": params}, image(), t_B, labels_B)


@pytest.fixture
def dits_folder(tmp_path):
    params = start(DiT(DIT), image(), np.zeros(B), np.zeros(B, int), std=0.3)
    convert_dit.save(params, DIT, tmp_path / "dit")
    return tmp_path / "dit", params


def completed(cfg, read):
    """As a run has it that starts from `train.init_from`: with what is left to the seed."""
    recipe = recipes.build(*recipes.load(str(ROOT / "configs/pixart.py:tiny")))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(cfg, learn_sigma=True), task=DiffusionConfig())
    task = DiffusionTask.of_recipe(dataclasses.replace(recipe, sample=DiffusionSampleConfig()), with_data=False)
    return join(*make_program(recipe, task, make_mesh(recipe.mesh)).parameters(read))


@pytest.mark.parametrize("cfg", [PLAIN, CFG], ids=["plain", "micro_conditions"])
def test_from_a_dit(cfg, dits_folder):
    """At t = 500 it is the DiT that is told "no class", whatever the text, the size and the aspect; elsewhere it is not."""
    path, theirs = dits_folder
    params = completed(cfg, convert.load_params(path, cfg))
    at, none_B = lambda t: np.full(B, t, np.float32), np.full(B, DIT.num_classes)
    error = lambda t: quick.relative_error(pixart(cfg, params, at(t), image()), of_dit(DIT, theirs, at(t), none_B))
    assert error(500) < 2e-5
    assert error(300) > 1e-3
    assert quick.relative_error(of_dit(DIT, theirs, at(500), none_B * 0), of_dit(DIT, theirs, at(500), none_B)) > 0.01


def test_from_a_dit_whose_blocks_modulate_alike(dits_folder, tmp_path):
    """The shared matrix is the mean of theirs: where all are one, the model is the DiT at every t - but for the last norm,
    whose vectors ours has no matrix for; here DiT's do not depend on t."""
    _, theirs = dits_folder
    ada = {name: np.broadcast_to(x[:1], x.shape) for name, x in theirs["blocks"]["ada"].items()}
    last = theirs["final"]["ada"] | {"kernel": 0 * theirs["final"]["ada"]["kernel"]}
    theirs = theirs | {"blocks": theirs["blocks"] | {"ada": ada}, "final": theirs["final"] | {"ada": last}}
    convert_dit.save(theirs, DIT, tmp_path / "alike")
    read = convert.load_params(tmp_path / "alike", PLAIN)
    assert np.abs(read["blocks"]["table"]).max() < 1e-5
    np.testing.assert_allclose(read["t_block"]["kernel"], theirs["blocks"]["ada"]["kernel"][2], rtol=1e-5, atol=1e-6)


def test_a_dit_of_another_shape(dits_folder):
    path, _ = dits_folder
    with pytest.raises(UserError, match=r"n_layer=3 \(the recipe: 2\); add --config\.model\.n_layer=3"):
        convert.load_params(path, dataclasses.replace(PLAIN, n_layer=2))
    with pytest.raises(UserError, match=r"patch_size=2 \(the recipe: 4\)"):
        convert.load_params(path, dataclasses.replace(PLAIN, patch_size=4, image_size=8))
    larger = convert.load_params(path, dataclasses.replace(PLAIN, image_size=12))  # positions are no weights
    assert_equal(larger, convert.load_params(path, PLAIN))


@pytest.fixture
def theirs(monkeypatch):
    """diffusers' class, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.enable_propagation()  # what it warns of, caplog sees
    yield diffusers.PixArtTransformer2DModel
    diffusers.utils.logging.disable_propagation()


@pytest.mark.parametrize("cfg", [CFG, dataclasses.replace(PLAIN, interpolation_scale=2.0)], ids=["micro", "plain"])
def test_ours_to_diffusers_and_back(cfg, theirs, tmp_path, caplog):
    """from_pretrained finds every weight and knows every key; its outputs are ours, of an image of another shape too."""
    import torch

    params = random_params(cfg)
    convert.save(params, cfg, tmp_path / "ours")
    model, found = theirs.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False, output_loading_info=True)
    assert not any(found.values()) and not caplog.records
    model.save_pretrained(tmp_path / "again")
    assert_equal(convert.load_params(tmp_path / "again", cfg), params)
    x_BxHxWxC, t_B, given = image(4, 10), np.float32([3, 90]), told(cfg)
    of_picture = {"resolution": torch.tensor(given["size_Bx2"]), "aspect_ratio": torch.tensor(given["aspect_B"])}
    mask_BxS = torch.arange(4) < torch.tensor(given["length_B"])[:, None]
    with torch.no_grad():
        want = model(
            torch.tensor(x_BxHxWxC).movedim(-1, 1), torch.tensor(given["context_BxSxE"]), torch.tensor(t_B), of_picture,
            encoder_attention_mask=mask_BxS.float(),
        ).sample.movedim(1, -1)  # fmt: skip
    assert quick.relative_error(pixart(cfg, params, t_B, x_BxHxWxC), want.numpy()) <= 1e-5


def test_diffusers_to_ours_and_back(theirs, tmp_path):
    """A fresh model comes back bit for bit, from shards."""
    sizes = {"sample_size": 6, "in_channels": 3, "out_channels": 6, "num_layers": 3, "cross_attention_dim": 12}
    model = theirs(
        num_attention_heads=2, attention_head_dim=6, caption_channels=5, use_additional_conditions=True, **sizes
    )
    model.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    assert (tmp_path / "theirs" / f"{WEIGHTS}.index.json").is_file()
    convert.save(convert.load_params(tmp_path / "theirs", CFG), CFG, tmp_path / "ours")
    found = safetensors.numpy.load_file(tmp_path / "ours" / WEIGHTS)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert set(found) == set(state)
    assert all(found[name].tobytes() == state[name].tobytes() for name in state)
