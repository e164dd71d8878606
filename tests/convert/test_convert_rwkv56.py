"""RWKV's official files as we write them; what tells versions and generations apart; the hub's folders."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import assert_equal, edit_config, edit_weights, random_params
from parity import installed

from jaxvram import convert
from jaxvram.convert import torch_file
from jaxvram.errors import UserError
from jaxvram.main import main
from jaxvram.models.rwkv4 import RWKV4Config
from jaxvram.models.rwkv5 import VERSIONS, RWKV5Config
from jaxvram.models.rwkv6 import RWKV6Config
from jaxvram.models.rwkv7 import RWKV7Config

COMMON = {"vocab_size": 37, "vocab_multiple": 16, "n_layer": 2, "n_embd": 16, "d_ffn": 12, "dtype": "float32"}
CFGS = {version: RWKV5Config(**COMMON, version=version, head_dim=8) for version in VERSIONS}
CFGS |= {"4": RWKV4Config(**COMMON), "6": RWKV6Config(**COMMON, head_dim=8, d_mix=3, d_decay=5)}
CFGS["7"] = RWKV7Config(**COMMON | {"n_embd": 64}, d_decay=3, d_rate=4, d_value=2, d_gate=5)


def written(version, path):
    """Random weights in a .pth of ours."""
    params = random_params(CFGS[version])
    convert.converter(CFGS[version]).save_official(params, CFGS[version], path)
    return params


def load(source, version, **fields):
    cfg = dataclasses.replace(CFGS[version], **fields)
    return convert.converter(cfg).load_params(source, cfg)


def edited(path, edit):
    torch_file.write(path, edit(dict(torch_file.read(path))))


@pytest.mark.parametrize("version", CFGS)
def test_an_official_file_and_back_is_exact(version, tmp_path):
    params = written(version, tmp_path / "model.pth")
    assert_equal(load(tmp_path / "model.pth", version), params)


@pytest.mark.skipif(not installed("torch"), reason="needs torch")
def test_pytorch_reads_it_under_the_authors_names_and_shapes(tmp_path):
    import torch

    params = written("6", tmp_path / "model.pth")
    found = torch.load(tmp_path / "model.pth", weights_only=True, mmap=True)  # as the rwkv package does
    assert found["emb.weight"].shape == found["head.weight"].shape == (37, 16)
    shapes = {
        "time_maa_x": (1, 1, 16), "time_maa_w1": (16, 15), "time_maa_w2": (5, 3, 16), "time_decay": (1, 1, 16),
        "time_decay_w1": (16, 5), "time_decay_w2": (5, 16), "time_faaaa": (2, 8), "ln_x.weight": (16,),
        "gate.weight": (16, 16),
    }  # fmt: skip
    assert {name: tuple(found[f"blocks.1.att.{name}"].shape) for name in shapes} == shapes
    key = params["layers"]["ffn"]["key"]["kernel"][1]
    np.testing.assert_array_equal(found["blocks.1.ffn.key.weight"].numpy(), key.T)


@pytest.mark.parametrize(("there", "wanted"), [("5.0", "5.1"), ("5.1", "5.2"), ("5.2", "5.0")])
def test_a_version_is_told(there, wanted, tmp_path):
    written(there, tmp_path / "model.pth")
    convert.converter(CFGS[there]).save(random_params(CFGS[there]), CFGS[there], tmp_path / "folder")
    for source in ("model.pth", "folder"):
        message = rf"{source} has version={there} \(the recipe: {wanted}\); add --config\.model\.version={there}$"
        with pytest.raises(UserError, match=message):
            load(tmp_path / source, wanted)


@pytest.mark.parametrize(("there", "wanted"), [("4", "5.2"), ("5.0", "6"), ("6", "7"), ("7", "6"), ("5.2", "4")])
def test_another_generation_is_told(there, wanted, tmp_path):
    written(there, tmp_path / "model.pth")
    message = rf"is an RWKV-{there[0]}, and this recipe's model is RWKV-{wanted[0]}: take configs/rwkv{there[0]}\.py$"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "model.pth", wanted)


def test_a_bonus_by_its_other_name_is_its_exponential(tmp_path):
    """As the rwkv package reads it: time_first, with a row for each head or only a number, in 5.1 as well."""
    params = written("5.1", tmp_path / "model.pth")
    first = lambda x: np.linspace(-2, 1, x.size).astype(np.float32)[:, None]
    edited(
        tmp_path / "model.pth",
        lambda t: {k.replace("faaaa", "first"): first(x) if "faaaa" in k else x for k, x in t.items()},
    )
    found = load(tmp_path / "model.pth", "5.1")
    wanted = np.exp(np.linspace(-2, 1, 2)).astype(np.float32)
    np.testing.assert_allclose(found["layers"]["att"]["time_faaaa"], [wanted, wanted], rtol=1e-6)
    found["layers"]["att"]["time_faaaa"] = params["layers"]["att"]["time_faaaa"]
    assert_equal(found, params)


LAST = "blocks.1.att.time_decay"


@pytest.mark.parametrize(
    ("version", "edit", "message"),
    [
        ("6", lambda t: {k: t[k] for k in t if k != LAST}, f"lacks {LAST}: it is incomplete"),
        ("6", lambda t: t | {LAST: t[LAST][..., 1:]}, rf"{LAST} has shape \(1, 1, 15\), and should have \(1, 1, 16\)"),
        ("6", lambda t: t | {"blocks.0.att.time_maa_w2": t[LAST]}, r"d_mix=1 \(the recipe: 3\); add --config.model.d_mix=1"),
        ("6", lambda t: {k: t[k] for k in t if "w2" not in k}, "is no RWKV-6: it has no tensors for d_mix"),
        ("5.0", lambda t: {k.replace("first", "faaaa"): x for k, x in t.items()}, "lacks .*time_first.*has .*time_faaaa"),
    ],
)
def test_an_official_file_that_is_damaged(version, edit, message, tmp_path):
    written(version, tmp_path / "model.pth")
    edited(tmp_path / "model.pth", edit)
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "model.pth", version)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_a_folder_has_the_hubs_names(version, tmp_path):
    """Those that convert_rwkv5_checkpoint_to_hf.py and convert_rwkv6_... make of the official ones."""
    cfg = CFGS[version]
    params = random_params(cfg)
    convert.converter(cfg).save(params, cfg, tmp_path / "model")
    found = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    convert.converter(cfg).save_official(params, cfg, tmp_path / "model.pth")
    official = torch_file.read(tmp_path / "model.pth")
    long = {"_k": "_key", "_v": "_value", "_r": "_receptance", "_g": "_gate"}

    def hubs(name):
        name = name.replace("emb.", "embeddings.").replace("blocks.0.ln0", "blocks.0.pre_ln")
        name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        name = name[:-2] + long[name[-2:]] if "time_mix" in name else name
        return name if name == "head.weight" else f"rwkv.{name}"

    assert_equal(found, {hubs(name): np.array(x) for name, x in official.items()})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["model_type"], config["head_size"], config["hidden_size"]) == (f"rwkv{version[0]}", 8, 16)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: edit_config(p, model_type="rwkv5"), "is of a 'rwkv5' model; this recipe's model is 'rwkv6'"),
        (lambda p: edit_config(p, layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06 is no RWKV-6"),
        (lambda p: edit_weights(p, lambda t: {k: t[k] for k in t if "1.ln2.bias" not in k}), "has no tensor 'rwkv.blocks.1"),
        (
            lambda p: edit_weights(p, lambda t: {k: x[..., :4] if "decay_w1" in k else x for k, x in t.items()}),
            r"d_decay=4 \(the recipe: 5\); add --config.model.d_decay=4",
        ),
    ],
)
def test_a_damaged_folder_of_rwkv6(damage, message, tmp_path):
    convert.converter(CFGS["6"]).save(random_params(CFGS["6"]), CFGS["6"], tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "model", "6")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("out", ["again.pth", "folder"])
def test_the_export_of_a_file_is_that_file(out, tmp_path, quick_compile, capsys):
    params = written("6", tmp_path / "model.pth")
    recipe = pathlib.Path(__file__).parents[2] / "configs" / "rwkv6.py"
    fields = {"vocab_size": 37, "vocab_multiple": 16, "n_layer": 2, "n_embd": 16, "d_ffn": 12, "head_dim": 8}
    arguments = [f"--config.model.{k}={v}" for k, v in (fields | {"d_mix": 3, "d_decay": 5, "reset_token": -1}).items()]
    arguments += [f"--config.train.init_from={tmp_path / 'model.pth'}", f"--workdir={tmp_path / 'run'}", "--mode=export"]
    assert main(["launch.py", f"--config={recipe}:tiny", *arguments, f"--out={tmp_path / out}"]) == 0
    assert str(tmp_path / out) in capsys.readouterr().out
    assert_equal(load(tmp_path / out, "6"), params)
