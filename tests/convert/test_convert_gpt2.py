"""Weights to and from a Hugging Face folder: exact, complete or not there, and a clear line for each way it can fail."""

import dataclasses
import errno
import json
import os
import stat

import ml_dtypes
import numpy as np
import pytest
import quick
import safetensors.numpy
from checkpoints import (
    assert_equal,
    assert_transformers_agree,
    edit_config,
    edit_weights,
    random_params,
    rounded,
    store_as,
    truncate,
)
from parity import needs_transformers

from jaxvram.convert import gpt2 as convert
from jaxvram.convert import huggingface
from jaxvram.errors import UserError
from jaxvram.models.gpt2 import GPT2, GPT2Config

CFG = GPT2Config(vocab_size=37, vocab_multiple=16, block_size=12, n_layer=3, n_head=2, n_embd=8, dtype="float32")


@pytest.fixture
def folder(tmp_path):
    """An export of CFG, and its parameters."""
    params = random_params(CFG)
    convert.save(params, CFG, tmp_path / "model")
    return tmp_path / "model", params


@pytest.mark.parametrize("fields", [{}, {"tie_head": False}, {"bias": False}, {"param_dtype": "bfloat16"}], ids=str)
def test_round_trip_is_exact(fields, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(cfg)
    convert.save(params, cfg, tmp_path / "model")
    assert_equal(convert.load_params(tmp_path / "model", cfg), params)


def test_padding_is_not_exported(folder):
    path, _ = folder
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    assert tensors["transformer.wte.weight"].shape == (37, 8)
    assert json.loads((path / "config.json").read_text())["vocab_size"] == 37


def test_names_without_prefix_and_old_buffers(folder):
    """OpenAI's own files: no `transformer.`, the causal mask among the weights."""
    path, params = folder
    mask = {"h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32), "h.0.attn.masked_bias": np.float32([-1e4])}
    edit_weights(path, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()} | mask)
    assert_equal(convert.load_params(path, CFG), params)


def test_shards(folder):
    path, params = folder
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    file_of = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(file_of.values()):
        safetensors.numpy.save_file({n: tensors[n] for n in tensors if file_of[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    assert_equal(convert.load_params(path, CFG), params)
    (path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-1\.safetensors is missing"):
        convert.load_params(path, CFG)


@pytest.mark.parametrize("theirs", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_param_dtype(theirs, folder):
    path, params = folder
    store_as(path, theirs)
    assert_equal(convert.load_params(path, CFG), rounded(params, theirs))


def test_context_is_cropped(folder):
    path, params = folder
    cropped = convert.load_params(path, dataclasses.replace(CFG, block_size=5))
    np.testing.assert_array_equal(cropped["wpe"]["embedding"], params["wpe"]["embedding"][:5])


def test_an_untied_head_starts_as_a_copy(folder):
    path, params = folder
    loaded = convert.load_params(path, dataclasses.replace(CFG, tie_head=False))
    np.testing.assert_array_equal(loaded["lm_head"]["kernel"], params["wte"]["embedding"].T)


def test_a_longer_context_than_the_data_gives_the_same_hidden_states(folder):
    path, params = folder
    model = lambda n: GPT2(dataclasses.replace(CFG, block_size=n, remat="none"))
    small = convert.load_params(path, model(5).cfg)
    tokens_BxT = np.arange(10).reshape(2, 5)
    hidden = lambda m, p: quick.jit(lambda p: m.apply({"params": p}, tokens_BxT)[0])(p)
    np.testing.assert_array_equal(hidden(model(5), small), hidden(model(12), params))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 2}, r"n_layer=3 \(the recipe: 2\); add --config\.model\.n_layer=3"),
        ({"n_head": 4}, r"n_head=2 \(the recipe: 4\); add --config\.model\.n_head=2"),
        ({"n_embd": 16}, r"n_embd=8 \(the recipe: 16\); add --config\.model\.n_embd=8"),
        ({"vocab_size": 40}, r"vocab_size=37 \(the recipe: 40\); add --config\.model\.vocab_size=37"),
        ({"block_size": 13}, r"block_size=12 \(the recipe: 13\); add --config\.model\.block_size=12"),
        (
            {"activation": "gelu"},
            r"activation=gelu_tanh \(the recipe: gelu\); add --config\.model\.activation=gelu_tanh",
        ),
        ({"n_layer": 2, "n_embd": 4}, r"add --config\.model\.n_layer=3 --config\.model\.n_embd=8$"),
        ({"bias": False}, r"has biases \(first of them: h\.ln_1\.bias\).*--config\.model\.bias=True"),
    ],
)
def test_another_model(fields, message, folder):
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder[0], dataclasses.replace(CFG, **fields))
    assert "\n" not in str(raised.value)


def drop_one(path):
    edit_weights(path, lambda t: {k: v for k, v in t.items() if k != "transformer.h.1.mlp.c_fc.weight"})


def transpose_one(path):
    edit_weights(path, lambda t: t | {"transformer.h.1.mlp.c_fc.weight": t["transformer.h.1.mlp.c_fc.weight"].T})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.rename(p.with_name("moved")), "there is no such folder"),
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is damaged"),
        (lambda p: (p / "config.json").write_text("[]"), "must be a JSON object"),
        (lambda p: edit_config(p, model_type="llama"), "is of a 'llama' model"),
        (lambda p: edit_config(p, n_layer="three"), "damaged: n_layer='three'"),
        (lambda p: edit_config(p, activation_function="relu"), "activation_function='relu'"),
        (lambda p: edit_config(p, layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"),
        (lambda p: edit_config(p, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (lambda p: edit_config(p, n_inner=8), "n_inner=8"),
        (lambda p: edit_config(p, tie_word_embeddings=False), r"add --config\.model\.tie_head=False"),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickled weights only"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "damaged or cut short"),
        (truncate, "damaged or cut short"),
        (drop_one, r"has no tensor 'transformer\.h\.1\.mlp\.c_fc\.weight'"),
        (transpose_one, r"c_fc\.weight has shape \(32, 8\)"),
    ],
)
def test_damage(damage, message, folder):
    damage(folder[0])
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder[0], CFG)
    assert "\n" not in str(raised.value)


def test_export_replaces_only_its_own(folder):
    path, _ = folder
    convert.save(second := random_params(CFG, seed=1), CFG, path)
    assert_equal(convert.load_params(path, CFG), second)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="give a new folder"):
        convert.save(second, CFG, path)
    assert (path / "notes.txt").read_text() == "mine"
    other = path.with_name("other")
    other.mkdir()
    convert.save(second, CFG, other)  # an empty folder is fine
    edit_config(other, remove=[huggingface.OURS])
    with pytest.raises(UserError, match="give a new folder"):
        convert.save(second, CFG, other)
    with pytest.raises(UserError, match="is a file"):
        convert.save(second, CFG, other / "config.json")


def test_a_full_disk_leaves_the_old_export(folder, monkeypatch):
    path, params = folder

    def full(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface.safetensors.numpy, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        convert.save(random_params(CFG, seed=1), CFG, path)
    with pytest.raises(UserError, match="No space left"):
        convert.save(params, CFG, path.with_name("new"))
    assert_equal(convert.load_params(path, CFG), params)
    assert [p.name for p in path.parent.iterdir()] == ["model"]  # no new folder, nothing temporary


def test_export_can_be_read_by_others(folder):
    umask = os.umask(0)
    os.umask(umask)
    for file in folder[0].iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(folder[0].stat().st_mode) == 0o777 & ~umask


def test_tensors_are_read_one_at_a_time(folder, monkeypatch):
    """No whole-file load: each tensor is asked for once, by name."""
    asked = []
    tensor = huggingface.HuggingFaceFolder.tensor
    monkeypatch.setattr(
        huggingface.HuggingFaceFolder,
        "tensor",
        lambda self, name, shape: asked.append(name) or tensor(self, name, shape),
    )
    monkeypatch.delattr(huggingface.safetensors.numpy, "load_file")
    convert.load_params(folder[0], CFG)
    assert len(asked) == len(set(asked)) == 2 + 2 + 12 * CFG.n_layer


@needs_transformers
@pytest.mark.parametrize(
    "fields", [{}, {"tie_head": False, "activation": "gelu"}, {"bias": False, "activation": "gelu"}], ids=str
)
def test_transformers_loads_an_export(fields, tmp_path, monkeypatch, capsys):
    """from_pretrained finds every weight, gives our logits, and what it saves again comes back to us unchanged."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    cfg = dataclasses.replace(CFG, **fields, remat="none")
    assert_transformers_agree(transformers.GPT2LMHeadModel, cfg, random_params(cfg), tmp_path)
    assert ("biases of zero" in capsys.readouterr().out) == (not cfg.bias)
