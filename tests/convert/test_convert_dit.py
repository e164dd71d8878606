"""DiT's weights to and from diffusers' folders: exact both ways, and a clear line for each way it can fail."""

import dataclasses
import functools
import json

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
import quick
import safetensors.numpy
from checkpoints import assert_equal, edit_config, rounded, store_as, truncate

from jaxvram.convert import dit as convert
from jaxvram.errors import UserError
from jaxvram.layers.patches import sincos_positions
from jaxvram.models.dit import DiT, DiTConfig

CFG = DiTConfig(image_size=6, channels=3, num_classes=5, n_layer=3, n_head=2, n_embd=8, remat="none", dtype="float32")
WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
EMBEDDER = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.weight"
QUERY = "transformer_blocks.1.attn1.to_q.weight"


@functools.cache
def random_params(cfg, seed=0):
    """Nothing zero and nothing equal."""
    image = np.zeros((1, cfg.image_size, cfg.image_size, cfg.channels), np.float32)
    labels = np.zeros(1, int) if cfg.num_classes else None
    shapes = jax.eval_shape(lambda: DiT(cfg).init(jax.random.key(0), image, np.zeros(1), labels)["params"])
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda s: random.normal(0, 0.1, s.shape).astype(s.dtype), shapes)


@pytest.fixture
def folder(tmp_path):
    """An export of CFG, and its parameters."""
    params = random_params(CFG)
    convert.save(params, CFG, tmp_path / "model")
    return tmp_path / "model", params


edit_weights = functools.partial(checkpoints.edit_tensors, file=WEIGHTS)


@pytest.mark.parametrize(
    "fields",
    [{}, {"learn_sigma": False, "patch_size": 3}, {"num_classes": 1, "n_layer": 1}, {"param_dtype": "bfloat16"},
     {"kernels": "pallas", "remat": "nested"}],
    ids=str,
)  # fmt: skip
def test_round_trip_is_exact(fields, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(dataclasses.replace(cfg, kernels="xla"))
    convert.save(params, cfg, tmp_path / "model")
    assert_equal(convert.load_params(tmp_path / "model", cfg), params)


def test_each_tensor_where_it_belongs(folder):
    """By hand, and not by the reader: which third is q, which way a matrix lies, how a patch is counted."""
    path, params = folder
    tensors = safetensors.numpy.load_file(path / WEIGHTS)
    in_block = lambda i, name: tensors[f"transformer_blocks.{i}.{name}"]
    blocks, D = params["blocks"], CFG.n_embd
    for i in range(CFG.n_layer):
        for j, name in enumerate("qkv"):
            third = np.s_[i, ..., j * D : (j + 1) * D]
            ours = blocks["attn"]["c_attn"]
            np.testing.assert_array_equal(in_block(i, f"attn1.to_{name}.weight"), ours["kernel"][third].T)
            np.testing.assert_array_equal(in_block(i, f"attn1.to_{name}.bias"), ours["bias"][third])
        np.testing.assert_array_equal(in_block(i, "ff.net.2.weight"), blocks["mlp"]["c_proj"]["kernel"][i].T)
        np.testing.assert_array_equal(tensors[EMBEDDER.format(i)], params["t_embed"]["fc1"]["kernel"].T)
    p, C, kernel = CFG.patch_size, CFG.channels, params["patch_embed"]["kernel"]
    for row, column, c in np.ndindex(p, p, C):
        theirs_D = tensors["pos_embed.proj.weight"][:, c, row, column]
        np.testing.assert_array_equal(theirs_D, kernel[(row * p + column) * C + c])
    config = json.loads((path / "config.json").read_text())
    assert (config["norm_eps"], config["num_embeds_ada_norm"], config["attention_head_dim"]) == (1e-6, 5, 4)
    assert (config["in_channels"], config["out_channels"], config["sample_size"], config["num_layers"]) == (3, 6, 6, 3)


def test_a_pipelines_folder(folder):
    """As older versions wrote it: the class that DiT was a part of, defaults unsaid, the table of positions stored."""
    path, params = folder
    pipeline = path.parent / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    edit_config(path, _class_name="Transformer2DModel", remove=["norm_eps", "patch_size"])
    edit_weights(path, **{"pos_embed.pos_embed": lambda _: sincos_positions(8, 3, 3)[None].astype(np.float16)})
    with pytest.raises(UserError, match=r"pipeline/transformer: there is no such folder"):
        convert.load_params(pipeline, CFG)
    path.rename(pipeline / "transformer")
    assert_equal(convert.load_params(pipeline, CFG), params)
    edit_weights(pipeline / "transformer", **{"pos_embed.pos_embed": lambda table: table[:, ::-1]})
    with pytest.raises(UserError, match=r"pos_embed\.pos_embed is not DiT's table of fixed sines"):
        convert.load_params(pipeline, CFG)


def test_sharded_weights(folder):
    path, params = folder
    tensors = safetensors.numpy.load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    shard_of = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        safetensors.numpy.save_file({n: x for n, x in tensors.items() if shard_of[n] == shard}, path / shard)
    (path / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    assert_equal(convert.load_params(path, CFG), params)
    (path / shard).unlink()
    with pytest.raises(UserError, match=rf"{shard} is missing though {INDEX} names it"):
        convert.load_params(path, CFG)


@pytest.mark.parametrize("theirs", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_param_dtype(theirs, folder):
    path, params = folder
    store_as(path, theirs, WEIGHTS)
    assert_equal(convert.load_params(path, CFG), rounded(params, theirs))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"image_size": 8}, {"image_size": 6}),
        ({"channels": 4}, {"channels": 3}),
        ({"patch_size": 3}, {"patch_size": 2}),
        ({"num_classes": 7}, {"num_classes": 5}),
        ({"num_classes": 0}, {"num_classes": 5}),
        ({"n_layer": 2}, {"n_layer": 3}),
        ({"n_head": 4}, {"n_head": 2}),
        ({"mlp_ratio": 2}, {"mlp_ratio": 4}),
        ({"learn_sigma": False}, {"learn_sigma": True}),
        ({"n_embd": 12, "n_layer": 1}, {"n_layer": 3, "n_embd": 8}),
    ],
    ids=str,
)
def test_another_model(fields, found, folder):
    paste = " ".join(f"--config.model.{name}={value}" for name, value in found.items())
    name, value = next(iter(found.items()))
    with pytest.raises(UserError, match=rf"{name}={value} \(the recipe: {fields[name]}\).*; add {paste}$") as raised:
        convert.load_params(folder[0], dataclasses.replace(CFG, **fields))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.rename(p.with_name("moved")), rf"no such folder; give one with config.json and {WEIGHTS}"),
        (lambda p: edit_config(p, _class_name="PixArtTransformer2DModel"), "of a 'PixArtTransformer2DModel' model"),
        (lambda p: edit_config(p, num_layers="3"), "damaged: num_layers='3'"),
        (lambda p: edit_config(p, num_embeds_ada_norm=None), "damaged: num_embeds_ada_norm=None"),
        (lambda p: edit_config(p, out_channels=4), "out_channels=4 is neither in_channels=3 nor twice that"),
        (lambda p: edit_config(p, out_channels=None), r"add --config\.model\.learn_sigma=False$"),
        (lambda p: edit_config(p, norm_type="ada_norm_single"), r"norm_type=ada_norm_single .*there: ada_norm_zero"),
        (lambda p: edit_config(p, activation_fn="geglu"), "activation_fn=geglu is no DiT"),
        (lambda p: edit_config(p, attention_bias=False), "attention_bias=False is no DiT"),
        (lambda p: edit_config(p, norm_elementwise_affine=True), "norm_elementwise_affine=True is no DiT"),
        (lambda p: edit_config(p, norm_eps=1e-3), r"norm_eps=0\.001 is no DiT .*there: 1e-06"),
        (lambda p: (p / WEIGHTS).unlink(), rf"has no {WEIGHTS} and no {INDEX}"),
        (
            lambda p: (p / WEIGHTS).rename(p / "diffusion_pytorch_model.bin"),
            rf"pickled weights only \(diffusion_pytorch_model\.bin\).* with diffusers and .*, or download {WEIGHTS}",
        ),
        (lambda p: truncate(p, WEIGHTS), "damaged or cut short"),
        (lambda p: edit_weights(p, **{QUERY: lambda x: None}), rf"has no tensor '{QUERY}'"),
        (lambda p: edit_weights(p, **{QUERY: lambda x: x[:4]}), rf"{QUERY} has shape \(4, 8\); .* means \(8, 8\)"),
        (
            lambda p: edit_weights(p, **{EMBEDDER.format(2): lambda x: x + 1e-5}),
            rf"{EMBEDDER.format(2)} is not block 0's \(up to 1\.0e-05 apart\): .* embedders of their own",
        ),
        (lambda p: edit_weights(p, **{EMBEDDER.format(1): lambda x: x * np.nan}), "is not block 0's"),
    ],
)
def test_damage(damage, message, folder):
    damage(folder[0])
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder[0], CFG)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 0}, r"num_classes=0 cannot be exported: .* always asks for a class"),
        ({"mlp_ratio": 2}, r"mlp_ratio=2 cannot be exported: .* MLPs of 4 n_embd"),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express(fields, message, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    with pytest.raises(UserError, match=message):
        convert.save(random_params(cfg), cfg, tmp_path / "model")
    assert not [*tmp_path.iterdir()]


def test_export_replaces_only_its_own(folder):
    path, _ = folder
    convert.save(second := random_params(CFG, seed=1), CFG, path)
    assert_equal(convert.load_params(path, CFG), second)
    edit_config(path, remove=["_exported_by"])
    with pytest.raises(UserError, match="give a new folder"):
        convert.save(second, CFG, path)


@pytest.fixture
def theirs(monkeypatch):
    """diffusers' class, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.enable_propagation()  # what it warns of, caplog sees
    yield diffusers.DiTTransformer2DModel
    diffusers.utils.logging.disable_propagation()


@pytest.mark.parametrize("fields", [{}, {"learn_sigma": False, "num_classes": 2}], ids=str)
def test_ours_to_diffusers_and_back(fields, theirs, tmp_path, capsys, caplog):
    """from_pretrained finds every weight and knows every key; with the line printed its outputs are ours."""
    import torch

    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(cfg)
    convert.save(params, cfg, tmp_path / "ours")
    kwargs = {"low_cpu_mem_usage": False, "output_loading_info": True}
    model, found = theirs.from_pretrained(tmp_path / "ours", **kwargs)
    assert not any(found.values()) and not caplog.records
    model.save_pretrained(tmp_path / "again")
    assert_equal(convert.load_params(tmp_path / "again", cfg), params)
    exec(capsys.readouterr().out.splitlines()[-1].strip(), {"model": model})
    random = np.random.RandomState(1)
    x_BxHxWxC, t_B = random.normal(0, 1, (2, 6, 6, 3)).astype(np.float32), np.int32([3, 90])
    labels_B = np.int32([cfg.num_classes, 1])
    with torch.no_grad():
        x_BxCxHxW = torch.tensor(x_BxHxWxC).movedim(-1, 1)
        want = model(x_BxCxHxW, torch.tensor(t_B), torch.tensor(labels_B)).sample.movedim(1, -1)
    got = quick.jit(lambda params: DiT(cfg).apply({"params": params}, x_BxHxWxC, t_B, labels_B))(params)
    assert quick.relative_error(got, want.numpy()) <= 1e-5


def test_diffusers_to_ours_and_back(theirs, tmp_path):
    """A fresh model, whose blocks' embedders differ, is refused; with block 0's in all it comes back bit for bit."""
    sizes = {"sample_size": 6, "in_channels": 3, "out_channels": 6, "num_embeds_ada_norm": 5, "num_layers": 3}
    model = theirs(num_attention_heads=2, attention_head_dim=4, **sizes)
    model.save_pretrained(tmp_path / "fresh")
    with pytest.raises(UserError, match="is not block 0's"):
        convert.load_params(tmp_path / "fresh", CFG)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    assert (tmp_path / "theirs" / INDEX).is_file()
    convert.save(convert.load_params(tmp_path / "theirs", CFG), CFG, tmp_path / "ours")
    found = safetensors.numpy.load_file(tmp_path / "ours" / WEIGHTS)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert set(found) == set(state)
    assert all(found[name].tobytes() == state[name].tobytes() for name in state)
