"""An export has the tokenizer and the special tokens of the weights that it began from."""

import dataclasses
import json
import shutil
import types

import gguf
import pytest
from tiny_llama import CFG, random_params

from jaxvram import modes
from jaxvram.convert import companions, llama
from jaxvram.errors import UserError

IDS = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}


@pytest.fixture
def base(tmp_path):
    """Weights of somebody else's, with what lies beside them."""
    folder = tmp_path / "base"
    llama.save(random_params(CFG), CFG, folder)
    for name in ("tokenizer.json", "generation_config.json", "README.md"):
        (folder / name).write_text(json.dumps({"I am": name}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | IDS))
    return folder


def test_files_and_ids_go_along_and_an_export_can_be_repeated(base, tmp_path):
    for seed in (1, 2):
        llama.save(random_params(CFG, seed), CFG, tmp_path / "out")
        assert sorted(companions.add(tmp_path / "out", base)) == ["generation_config.json", "tokenizer.json"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"I am": "tokenizer.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in IDS} == IDS and config["hidden_size"] == CFG.n_embd
    assert llama.load_params(tmp_path / "out", CFG).keys() == random_params(CFG).keys()


def test_the_ids_of_a_gguf_file(tmp_path):
    llama.save(random_params(CFG), CFG, tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert companions.add(tmp_path / "out", tmp_path / "base.gguf") == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_what_cannot_be_read(base, tmp_path):
    (base / "config.json").write_text("{")
    llama.save(random_params(CFG), CFG, tmp_path / "out")
    with pytest.raises(UserError, match="cannot copy tokenizer files"):
        companions.add(tmp_path / "out", base)


def test_export_does_so(base, tmp_path, tiny_recipe, monkeypatch, capsys):
    recipe = dataclasses.replace(tiny_recipe(**{"train": {"init_from": str(base)}}), model=CFG)
    task = types.SimpleNamespace(model=types.SimpleNamespace(cfg=CFG))
    monkeypatch.setattr(modes, "load_checkpoint", lambda *args, **kwargs: (task, random_params(CFG), 3))
    options = types.SimpleNamespace(out=str(tmp_path / "out"), checkpoint="best", adapter=False, storage=None)
    assert modes.export(recipe, tmp_path, options) == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()
    shutil.rmtree(base)
    assert modes.export(recipe, tmp_path, options) == 0  # weights that are trained need nothing of where they began
    assert not (tmp_path / "out" / "tokenizer.json").exists() and "is not there any more" in capsys.readouterr().err
