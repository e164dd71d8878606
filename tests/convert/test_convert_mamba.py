"""Mamba's weights to and from a Hugging Face folder: exact or not there, and a clear line for each way it can fail."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import assert_equal, edit_config, edit_weights, random_params, rounded, store_as
from parity import needs_transformers

from jaxvram import convert
from jaxvram.errors import UserError
from jaxvram.models.mamba import MambaConfig
from jaxvram.models.mamba2 import Mamba2Config

COMMON = {"vocab_size": 37, "vocab_multiple": 16, "n_layer": 2, "n_embd": 8, "d_state": 4, "dtype": "float32"}
MODELS = {
    "mamba": MambaConfig(**COMMON, dt_rank=3),
    "mamba2": Mamba2Config(**COMMON, head_dim=4, n_groups=2),
}
FP32 = {"A_log", "D", "dt_bias"}
both = pytest.mark.parametrize("name", MODELS)


def exported(cfg, folder):
    params = random_params(cfg)
    convert.converter(cfg).save(params, cfg, folder)
    return params


def load(folder, cfg):
    return convert.converter(cfg).load_params(folder, cfg)


@both
@pytest.mark.parametrize("fields", [{}, {"tie_head": False}, {"param_dtype": "bfloat16"}], ids=str)
def test_round_trip_is_exact(name, fields, tmp_path):
    cfg = dataclasses.replace(MODELS[name], **fields)
    params = exported(cfg, tmp_path / "model")
    assert_equal(load(tmp_path / "model", cfg), params)


@both
def test_padding_is_not_exported(name, tmp_path):
    exported(MODELS[name], tmp_path / "model")
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["backbone.embeddings.weight"].shape == (37, 8)
    assert tensors["backbone.layers.0.mixer.conv1d.weight"].shape[1:] == (1, 4)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 37


@both
def test_names_without_prefix(name, tmp_path):
    params = exported(MODELS[name], tmp_path / "model")
    edit_weights(tmp_path / "model", lambda t: {k.removeprefix("backbone."): v for k, v in t.items()})
    assert_equal(load(tmp_path / "model", MODELS[name]), params)


@both
def test_half_precision_becomes_param_dtype_but_decays_stay_fp32(name, tmp_path):
    params = exported(MODELS[name], tmp_path / "model")
    store_as(tmp_path / "model", ml_dtypes.bfloat16)
    assert_equal(load(tmp_path / "model", MODELS[name]), rounded(params, ml_dtypes.bfloat16))
    in_bf16 = load(tmp_path / "model", dataclasses.replace(MODELS[name], param_dtype="bfloat16"))
    for path, x in jax.tree.leaves_with_path(in_bf16):
        assert x.dtype == (np.float32 if path[-1].key in FP32 else ml_dtypes.bfloat16), path


@both
def test_an_untied_head_starts_as_a_copy(name, tmp_path):
    params = exported(MODELS[name], tmp_path / "model")
    loaded = load(tmp_path / "model", dataclasses.replace(MODELS[name], tie_head=False))
    np.testing.assert_array_equal(loaded["lm_head"]["kernel"], params["embedding"]["embedding"].T)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mamba", {"n_layer": 3}, r"n_layer=2 \(the recipe: 3\); add --config\.model\.n_layer=2"),
        ("mamba", {"dt_rank": 1}, r"dt_rank=3 \(the recipe: 1\); add --config\.model\.dt_rank=3"),
        ("mamba", {"d_state": 16, "d_conv": 3}, r"add --config\.model\.d_state=4 --config\.model\.d_conv=4$"),
        ("mamba", {"vocab_size": 40}, r"vocab_size=37 \(the recipe: 40\); add --config\.model\.vocab_size=37"),
        ("mamba2", {"n_embd": 16}, r"n_embd=8 \(the recipe: 16\); add --config\.model\.n_embd=8$"),
        ("mamba2", {"head_dim": 8}, r"head_dim=4 \(the recipe: 8\); add --config\.model\.head_dim=4$"),
        ("mamba2", {"n_groups": 1}, r"n_groups=2 \(the recipe: 1\); add --config\.model\.n_groups=2$"),
    ],
)
def test_another_size(name, fields, message, tmp_path):
    exported(MODELS[name], tmp_path / "model")
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "model", dataclasses.replace(MODELS[name], **fields))
    assert "\n" not in str(raised.value)


LAST = "backbone.layers.1.mixer.out_proj.weight"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("mamba", lambda p: edit_config(p, model_type="mamba2"), "is of a 'mamba2' model; this recipe's model is 'mamba'"),
        ("mamba2", lambda p: edit_config(p, model_type="mamba"), "is of a 'mamba' model"),
        ("mamba", lambda p: edit_config(p, use_bias=True), "use_bias=True is no Mamba"),
        ("mamba", lambda p: edit_config(p, time_step_scale=2.0), r"time_step_scale=2\.0"),
        ("mamba", lambda p: edit_config(p, hidden_size="wide"), "damaged: hidden_size='wide'"),
        ("mamba", lambda p: edit_config(p, layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"),
        ("mamba2", lambda p: edit_config(p, hidden_act="relu"), "hidden_act=relu is no Mamba-2"),
        ("mamba2", lambda p: edit_config(p, time_step_limit=[0.01, 0.1]), "bounds step sizes"),
        ("mamba2", lambda p: edit_config(p, num_heads=8), "num_heads=8.* do not make"),
        ("mamba", lambda p: edit_config(p, tie_word_embeddings=False), "None"),  # as no head is there: see the body
        ("mamba2", lambda p: edit_weights(p, lambda t: {k: t[k] for k in t if k != LAST}), f"has no tensor '{LAST}'"),
        ("mamba", lambda p: edit_weights(p, lambda t: t | {LAST: t[LAST].T}), r"out_proj\.weight has shape \(16, 8\)"),
        ("mamba", lambda p: (p / "model.safetensors").write_bytes(b""), "damaged or cut short"),
    ],
)
def test_damage(name, damage, message, tmp_path):
    params = exported(MODELS[name], tmp_path / "model")
    damage(tmp_path / "model")
    if message == "None":  # an untied model without a head is a tied one, whatever its config.json says
        assert_equal(load(tmp_path / "model", MODELS[name]), params)
        return
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "model", MODELS[name])
    assert "\n" not in str(raised.value)


@both
def test_an_untied_checkpoint_asks_for_an_untied_recipe(name, tmp_path):
    exported(dataclasses.replace(MODELS[name], tie_head=False), tmp_path / "model")
    with pytest.raises(UserError, match=r"add --config\.model\.tie_head=False"):
        load(tmp_path / "model", MODELS[name])


@both
def test_defaults_of_transformers_are_known(name, tmp_path):
    """A config.json may leave out what is as transformers has it; ours then differs from the recipe, and is told."""
    exported(MODELS[name], tmp_path / "model")
    edit_config(tmp_path / "model", remove=["expand", "conv_kernel"])
    load(tmp_path / "model", MODELS[name])
    edit_config(tmp_path / "model", remove=["num_hidden_layers"])
    default = {"mamba": 32, "mamba2": 64}[name]
    with pytest.raises(UserError, match=rf"n_layer={default} \(the recipe: 2\)"):
        load(tmp_path / "model", MODELS[name])


@needs_transformers
@both
@pytest.mark.parametrize("fields", [{}, {"tie_head": False}], ids=str)
def test_what_transformers_saves_comes_back(name, fields, tmp_path, monkeypatch):
    """from_pretrained finds every weight of an export, and what it saves again comes back to us unchanged."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    cfg = dataclasses.replace(MODELS[name], **fields)
    params = exported(cfg, tmp_path / "ours")
    cls = {"mamba": transformers.MambaForCausalLM, "mamba2": transformers.Mamba2ForCausalLM}[name]
    model, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "theirs")
    assert_equal(load(tmp_path / "theirs", cfg), params)
