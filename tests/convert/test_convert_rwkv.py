"""RWKV's weights from official files, and to and from folders: exact or not there, and a clear line for each failure."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import assert_equal, edit_config, edit_weights, random_params, rounded, store_as
from parity import installed, needs_transformers

from jaxvram import convert
from jaxvram.convert import rwkv
from jaxvram.errors import UserError
from jaxvram.models.rwkv4 import RWKV4Config
from jaxvram.models.rwkv5 import RWKV5Config
from jaxvram.models.rwkv6 import RWKV6Config
from jaxvram.models.rwkv7 import RWKV7Config

COMMON = {"vocab_size": 37, "vocab_multiple": 16, "n_layer": 2, "dtype": "float32"}
MODELS = {
    "rwkv4": RWKV4Config(**COMMON, n_embd=8, d_ffn=12),
    "rwkv5": RWKV5Config(**COMMON, n_embd=8, head_dim=4, d_ffn=12),
    "rwkv6": RWKV6Config(**COMMON, n_embd=8, head_dim=4, d_ffn=12, d_mix=3, d_decay=5),
    "rwkv7": RWKV7Config(**COMMON, n_embd=64, d_ffn=12, d_decay=3, d_rate=4, d_value=2, d_gate=5),
}
each = pytest.mark.parametrize("name", MODELS)
with_folder = each  # all that have a layout of Hugging Face's
needs_torch = pytest.mark.skipif(not installed("torch"), reason="needs torch")


def exported(cfg, folder):
    params = random_params(cfg)
    convert.converter(cfg).save(params, cfg, folder)
    return params


def official(cfg, file, edit=lambda tensors: tensors):
    """Random weights, written by PyTorch under their official names."""
    import torch

    params = random_params(cfg)
    tensors = edit(rwkv.to_tensors(params, cfg, convert.converter(cfg).layout_of(cfg), official=True))
    of_torch = lambda x: torch.tensor(x.astype(np.float32)).to(getattr(torch, x.dtype.name))
    torch.save({name: of_torch(x) for name, x in tensors.items()}, file)
    return params


def load(source, cfg):
    return convert.converter(cfg).load_params(source, cfg)


@with_folder
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_folder_and_back_is_exact(name, param_dtype, tmp_path):
    cfg = dataclasses.replace(MODELS[name], param_dtype=param_dtype)
    params = exported(cfg, tmp_path / "model")
    assert_equal(load(tmp_path / "model", cfg), params)


@needs_torch
@each
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_an_official_file_is_read_exactly(name, param_dtype, tmp_path):
    cfg = dataclasses.replace(MODELS[name], param_dtype=param_dtype)
    params = official(cfg, tmp_path / "model.pth")
    assert_equal(load(tmp_path / "model.pth", cfg), params)


@needs_torch
@each
def test_an_official_file_in_bf16_becomes_fp32(name, tmp_path):
    """As the authors publish them."""
    half = lambda tensors: {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    params = official(MODELS[name], tmp_path / "model.pth", half)
    assert_equal(load(tmp_path / "model.pth", MODELS[name]), rounded(params, ml_dtypes.bfloat16))


@with_folder
def test_half_precision_becomes_param_dtype_but_vectors_stay_fp32(name, tmp_path):
    params = exported(MODELS[name], tmp_path / "model")
    store_as(tmp_path / "model", ml_dtypes.bfloat16)
    assert_equal(load(tmp_path / "model", MODELS[name]), rounded(params, ml_dtypes.bfloat16))
    in_bf16 = load(tmp_path / "model", dataclasses.replace(MODELS[name], param_dtype="bfloat16"))
    layer = in_bf16["layers"]
    assert layer["ffn"]["key"]["kernel"].dtype == layer["ln1"]["scale"].dtype == ml_dtypes.bfloat16
    vectors = {
        "rwkv4": ("time_decay", "time_first", "time_mix_k"), "rwkv5": ("time_decay", "time_faaaa", "time_mix_g"),
        "rwkv6": ("time_decay", "time_faaaa", "time_maa_x", "time_maa_w1"), "rwkv7": ("w0", "w1", "k_k", "x_r"),
    }[name]  # fmt: skip
    assert all(layer["att"][vector].dtype == np.float32 for vector in vectors)


@with_folder
def test_padding_is_not_exported(name, tmp_path):
    exported(MODELS[name], tmp_path / "model")
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    rows = ("model.embeddings.weight", "lm_head.weight") if name == "rwkv7" else ("rwkv.embeddings.weight", "head.weight")
    assert all(tensors[row].shape == (37, MODELS[name].n_embd) for row in rows)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 37


@needs_torch
@each
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 3}, r"n_layer=2 \(the recipe: 3\); add --config\.model\.n_layer=2$"),
        ({"vocab_size": 40}, r"vocab_size=37 \(the recipe: 40\); add --config\.model\.vocab_size=37$"),
        ({"d_ffn": 0}, r"d_ffn=12 \(the recipe: 0\); add --config\.model\.d_ffn=12$"),
    ],
)
def test_another_size(name, fields, message, tmp_path):
    cfg = dataclasses.replace(MODELS[name], **fields)
    exported(MODELS[name], tmp_path / "model")
    official(MODELS[name], tmp_path / "model.pth")
    for source in ("model", "model.pth"):
        with pytest.raises(UserError, match=message) as raised:
            load(tmp_path / source, cfg)
        assert "\n" not in str(raised.value)


@needs_torch
def test_a_width_is_told_apart(tmp_path):
    official(MODELS["rwkv4"], tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"n_embd=8 \(the recipe: 16\)"):
        load(tmp_path / "model.pth", dataclasses.replace(MODELS["rwkv4"], n_embd=16))


LAST = "blocks.1.ffn.value.weight"


@needs_torch
@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("rwkv4", lambda t: {k: t[k] for k in t if k != LAST}, f"lacks {LAST}"),
        ("rwkv4", lambda t: t | {LAST: t[LAST].T}, rf"{LAST} has shape \(12, 8\), and should have \(8, 12\)"),
        ("rwkv4", lambda t: t | {"blocks.0.att.ln_y.weight": np.ones(8, np.float32)}, "has blocks.0.att.ln_y.weight, which"),
        ("rwkv4", lambda t: {"a": np.ones(1, np.float32)}, "is no RWKV-4: it has no tensors for vocab_size, n_embd, d_ffn"),
        ("rwkv7", lambda t: {k: t[k] for k in t if k != "blocks.1.att.v1"}, "is no RWKV-7: it has no tensors for d_value"),
    ],
)  # fmt: skip
def test_an_official_file_of_something_else(name, edit, message, tmp_path):
    official(MODELS[name], tmp_path / "model.pth", edit)
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "model.pth", MODELS[name])
    assert "\n" not in str(raised.value)


@needs_torch
def test_what_layer_0_of_rwkv7_does_not_use_may_be_there(tmp_path):
    unused = lambda t: t | {f"blocks.0.att.{name}": np.ones(3, np.float32) for name in ("v0", "v1", "v2")}
    params = official(MODELS["rwkv7"], tmp_path / "model.pth", unused)
    assert_equal(load(tmp_path / "model.pth", MODELS["rwkv7"]), params)


THEIR_LAST = "rwkv.blocks.1.feed_forward.value.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: edit_config(p, model_type="mamba"), "is of a 'mamba' model; this recipe's model is 'rwkv'"),
        (lambda p: edit_config(p, layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06 is no RWKV-4"),
        (lambda p: edit_config(p, attention_hidden_size=16), "attention_hidden_size=16 is no RWKV-4"),
        (lambda p: edit_config(p, hidden_size="wide"), "damaged: hidden_size='wide'"),
        (lambda p: edit_weights(p, lambda t: {k: t[k] for k in t if k != THEIR_LAST}), f"has no tensor '{THEIR_LAST}'"),
        (lambda p: edit_weights(p, lambda t: t | {THEIR_LAST: t[THEIR_LAST].T}), r"value\.weight has shape \(12, 8\)"),
    ],
)
def test_a_damaged_folder(damage, message, tmp_path):
    exported(MODELS["rwkv4"], tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "model", MODELS["rwkv4"])
    assert "\n" not in str(raised.value)


def test_what_transformers_may_leave_out_of_its_config(tmp_path):
    cfg = dataclasses.replace(MODELS["rwkv4"], d_ffn=0)
    params = exported(cfg, tmp_path / "model")
    edit_config(tmp_path / "model", remove=["intermediate_size", "attention_hidden_size"], rescale_every=6)
    assert_equal(load(tmp_path / "model", cfg), params)


@needs_transformers
def test_what_transformers_saves_comes_back(tmp_path, monkeypatch):
    """from_pretrained finds every weight of an export, gives our logits, and what it saves again comes back unchanged."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers
    from checkpoints import assert_transformers_agree

    cfg = MODELS["rwkv4"]
    assert_transformers_agree(transformers.RwkvForCausalLM, cfg, random_params(cfg, std=0.3), tmp_path)
