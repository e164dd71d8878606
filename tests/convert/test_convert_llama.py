"""Llama's weights to and from a Hugging Face folder: exact, lazy, and a clear line for each way it can fail."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import (
    assert_equal,
    assert_transformers_agree,
    edit_config,
    edit_weights,
    rounded,
    store_as,
    truncate,
)
from parity import installed, needs_transformers
from tiny_llama import CFG, LLAMA3, random_params

from jaxvram.convert import huggingface
from jaxvram.convert import llama as convert
from jaxvram.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """An export of CFG, and its parameters."""
    params = random_params(CFG)
    convert.save(params, CFG, tmp_path / "model")
    return tmp_path / "model", params


VARIANTS = [
    {}, {"tie_head": True, "head_dim": 6}, {"attention_bias": True, "mlp_bias": True}, {"rope_layout": "interleaved"},
    {"rope_layout": "interleaved", "attention_bias": True, **LLAMA3}, {"param_dtype": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_round_trip_is_exact(fields, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(cfg)
    convert.save(params, cfg, tmp_path / "model")
    assert_equal(convert.load_params(tmp_path / "model", cfg), params)


@needs_transformers
@pytest.mark.parametrize("fields", VARIANTS[:5], ids=str)
def test_transformers_loads_an_export(fields, tmp_path, monkeypatch):
    """from_pretrained finds every weight, gives our logits, and what it saves again comes back to us unchanged."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    cfg = dataclasses.replace(CFG, **fields)
    assert_transformers_agree(transformers.LlamaForCausalLM, cfg, random_params(cfg), tmp_path)


def test_large_exports_are_sharded(tmp_path, monkeypatch):
    """Files no larger than the limit, with an index, each replaceable by a later export and read back exactly."""
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    params, path = random_params(CFG), tmp_path / "model"
    convert.save(random_params(CFG, seed=1), CFG, path)
    convert.save(params, CFG, path)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 45_000 for file in path.glob("*.safetensors"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for file in files for t in safetensors.numpy.load_file(path / file).values()
    )
    assert_equal(convert.load_params(path, CFG), params)
    if installed("torch", "transformers"):
        import transformers

        _, found = transformers.LlamaForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(found.values())
    (path / files[1]).unlink()
    with pytest.raises(UserError, match=f"{files[1]} is missing"):
        convert.load_params(path, CFG)


@pytest.mark.parametrize("theirs", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_param_dtype(theirs, folder):
    path, params = folder
    store_as(path, theirs)
    assert_equal(convert.load_params(path, CFG), rounded(params, theirs))


def test_names_without_prefix_old_buffers_and_a_tied_copy(tmp_path):
    """LlamaModel's own files; angles among the weights, as before transformers 4.32; a head that repeats the table."""
    cfg = dataclasses.replace(CFG, tie_head=True)
    convert.save(params := random_params(cfg), cfg, tmp_path / "m")
    more = {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_weights(tmp_path / "m", lambda t: {k.removeprefix("model."): v for k, v in t.items()} | more)
    assert_equal(convert.load_params(tmp_path / "m", cfg), params)
    copy = lambda t: t | {"lm_head.weight": t["embed_tokens.weight"]}
    edit_weights(tmp_path / "m", copy)
    assert_equal(convert.load_params(tmp_path / "m", cfg), params)


def test_an_untied_head_starts_as_a_copy(tmp_path):
    cfg = dataclasses.replace(CFG, tie_head=True)
    convert.save(params := random_params(cfg), cfg, tmp_path / "m")
    loaded = convert.load_params(tmp_path / "m", dataclasses.replace(cfg, tie_head=False))
    np.testing.assert_array_equal(loaded["lm_head"]["kernel"], params["embed_tokens"]["embedding"].T)


def test_todays_and_yesterdays_config(tmp_path):
    """transformers 5 says rope_parameters, 4 rope_theta and rope_scaling, `type` before `rope_type`; G and K may lack."""
    cfg = dataclasses.replace(CFG, n_kv_head=4, **LLAMA3)
    convert.save(params := random_params(cfg), cfg, path := tmp_path / "m")
    scaling = json.loads((path / "config.json").read_text())["rope_scaling"]
    edit_config(path, remove=["num_key_value_heads", "head_dim"])
    assert_equal(convert.load_params(path, cfg), params)
    edit_config(path, rope_scaling=scaling | {"type": scaling["rope_type"]})
    assert_equal(convert.load_params(path, cfg), params)
    edit_config(path, remove=["rope_scaling", "rope_theta"], rope_parameters=scaling | {"rope_theta": 50})
    assert_equal(convert.load_params(path, cfg), params)


def test_tensors_come_one_at_a_time_in_the_order_of_the_tree(folder, monkeypatch):
    """Each is read when it is asked for; a parameter's layers follow one another, [in, out]; `put` has each when whole."""
    path, params = folder
    read = []
    tensor = huggingface.HuggingFaceFolder.tensor
    noted = lambda self, name, shape: read.append(name) or tensor(self, name, shape)
    monkeypatch.setattr(huggingface.HuggingFaceFolder, "tensor", noted)
    monkeypatch.delattr(huggingface.safetensors.numpy, "load_file")
    seen = []
    for path_of, layer, array in convert.tensors(path, CFG):
        seen.append((path_of, layer))
        assert len(read) == len(seen)
        want = params
        for name in path_of:
            want = want[name]
        np.testing.assert_array_equal(array, want if layer is None else want[layer])
    assert len(set(seen)) == len(seen) == 3 + 9 * CFG.n_layer
    assert [layer for path_of, layer in seen if path_of[-2] == "q_proj"] == [0, 1, 2]
    put = []
    tree = convert.load_params(path, CFG, put=lambda path_of, array: put.append((path_of, array.shape)) or array.sum())
    assert put == [(p, np.shape(_at(params, p))) for p in dict.fromkeys(p for p, _ in seen)]
    assert tree["layers"]["mlp"]["up_proj"]["kernel"] == params["layers"]["mlp"]["up_proj"]["kernel"].sum()


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 2}, r"n_layer=3 \(the recipe: 2\); add --config\.model\.n_layer=3$"),
        ({"n_head": 8}, r"n_head=4 .*head_dim=8 .*add --config\.model\.n_head=4 --config\.model\.head_dim=8$"),
        ({"n_kv_head": 4}, r"add --config\.model\.n_kv_head=2$"),
        ({"n_embd": 64, "head_dim": 8}, r"add --config\.model\.n_embd=32$"),
        ({"n_inner": 65}, r"add --config\.model\.n_inner=64$"),
        ({"head_dim": 6}, r"add --config\.model\.head_dim=8$"),
        ({"vocab_size": 40}, r"add --config\.model\.vocab_size=37$"),
        ({"block_size": 13}, r"add --config\.model\.block_size=12$"),
        ({"rope_theta": 5e5}, r"rope_theta=10000\.0 \(the recipe: 500000\.0\); add --config\.model\.rope_theta=10000\.0$"),
        ({"norm_eps": 1e-6}, r"add --config\.model\.norm_eps=1e-05$"),
        ({"rope_factor": 8.0}, r"add --config\.model\.rope_factor=1\.0$"),
        ({"tie_head": True}, r"add --config\.model\.tie_head=False$"),
        ({"attention_bias": True}, r"add --config\.model\.attention_bias=False$"),
        ({"n_layer": 2, "n_inner": 4}, r"add --config\.model\.n_layer=3 --config\.model\.n_inner=64$"),
    ],
)
def test_another_model(fields, message, folder):
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder[0], dataclasses.replace(CFG, **fields))
    assert "\n" not in str(raised.value)


def test_another_scaling(tmp_path):
    convert.save(random_params(CFG), dataclasses.replace(CFG, **LLAMA3), tmp_path / "m")
    with pytest.raises(UserError, match=r"rope_factor=4\.0 --config\.model\.rope_theta=50\.0 .*original_context=32$"):
        convert.load_params(tmp_path / "m", CFG)


def test_a_shorter_context_is_fine(folder):
    path, params = folder
    assert_equal(convert.load_params(path, dataclasses.replace(CFG, block_size=5)), params)


GATE = "model.layers.1.mlp.gate_proj.weight"


def without(*names):
    return lambda path: edit_weights(path, lambda t: {k: v for k, v in t.items() if not k.endswith(names)})


def renamed(path):
    edit_weights(path, lambda t: {k.replace(".mlp.gate_proj", ".mlp.w1"): v for k, v in t.items()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.rename(p.with_name("moved")), "there is no such folder"),
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: edit_config(p, model_type="mistral"), "is of a 'mistral' model; this recipe's model is 'llama'"),
        (lambda p: edit_config(p, num_hidden_layers="three"), "damaged: num_hidden_layers='three'"),
        (lambda p: edit_config(p, hidden_act="gelu"), "hidden_act=gelu"),
        (lambda p: edit_config(p, partial_rotary_factor=0.5), r"partial_rotary_factor=0\.5"),
        (lambda p: edit_config(p, rope_scaling={"type": "linear", "factor": 2.0}), "rope_type=linear is no Llama"),
        (lambda p: edit_config(p, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "damaged: low_freq_factor=None"),
        (lambda p: edit_config(p, rope_theta="much"), "damaged: rope_theta='much'"),
        (lambda p: edit_config(p, rms_norm_eps=0), "damaged: norm_eps=0"),
        (lambda p: edit_config(p, attention_bias=True), r"add --config\.model\.attention_bias=True"),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickled weights only"),
        (truncate, "damaged or cut short"),
        (without("1.mlp.gate_proj.weight"), rf"lacks {GATE}: it is incomplete"),
        (without("lm_head.weight"), r"lacks lm_head\.weight: it is incomplete"),
        (without("_proj.weight"), r"lacks (model\.layers\.\d\.\S+, ){9}model\.layers\.\d\.\S+ and 11 more: it is"),
        (renamed, r"lacks model\.layers\.0\.mlp\.gate_proj\.weight, .*; it has model\.layers\.0\.mlp\.w1\.weight, .*which"),
        (lambda p: edit_weights(p, lambda t: t | {GATE: t[GATE].T}), r"gate_proj\.weight has shape \(32, 64\).*\(64, 32\)"),
    ],
)
def test_damage(damage, message, folder):
    damage(folder[0])
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder[0], CFG)
    assert "\n" not in str(raised.value)
