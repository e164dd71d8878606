"""Which file is the tokenizer, and a clear line where there is none, or a damaged one, or one of an unknown kind."""

import shutil
from pathlib import Path

import pytest
from tokenizer_files import byte_pairs, gguf_of_byte_pairs, write_gguf

from jaxvram.data import DataConfig, load
from jaxvram.data.file_tokenizers import file_tokenizer
from jaxvram.errors import UserError


def test_which_file_of_a_folder(tokenizer_folder, tmp_path):
    with pytest.raises(UserError, match=r"data.vocab_path=.*: it must be a tokenizer.json"):
        file_tokenizer(str(tmp_path))
    shutil.copy(tokenizer_folder / "pairs.gguf", tmp_path / "b.gguf")
    assert file_tokenizer(str(tmp_path)).name == str(tmp_path / "b.gguf")
    shutil.copy(tokenizer_folder / "pairs.gguf", tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"2 \.gguf files, name one"):
        file_tokenizer(str(tmp_path))
    shutil.copy(tokenizer_folder / "spbpe" / "tokenizer.model", tmp_path)
    assert file_tokenizer(str(tmp_path)).name == str(tmp_path / "tokenizer.model")
    shutil.copy(tokenizer_folder / "json" / "tokenizer.json", tmp_path)
    assert file_tokenizer(str(tmp_path)).name == str(tmp_path / "tokenizer.json")


def test_a_missing_path():
    with pytest.raises(UserError, match=r"data\.tokenizer=file needs data\.vocab_path: a tokenizer\.json"):
        load(DataConfig(dataset="offline", tokenizer="file"), 8, 0)
    with pytest.raises(UserError, match="/nowhere does not exist; it must be"):
        file_tokenizer("/nowhere")


def damages(good: bytes) -> list[bytes]:
    return [good[: len(good) // 2], good[:3], b"", b"\xff" * 100, b"{}", b"[1]"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json/tokenizer.json", "damaged or is not a tokenizer.json"),
        ("spbpe/tokenizer.model", "damaged or is not a model of SentencePiece"),
        ("pairs.gguf", "truncated, damaged or not a GGUF"),
        ("pieces.gguf", "truncated, damaged or not a GGUF"),
    ],
)
def test_damaged_files(tokenizer_folder, tmp_path, name, message):
    file = tmp_path / Path(name).name
    for raw in damages((tokenizer_folder / name).read_bytes()):
        file.write_bytes(raw)
        with pytest.raises(UserError, match=message) as caught:
            file_tokenizer(str(file))
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    shutil.copy(tokenizer_folder / name, tmp_path / "tokenizer.txt")
    with pytest.raises(UserError, match=r"tokenizer\.txt must be a tokenizer.json"):
        file_tokenizer(str(tmp_path / "tokenizer.txt"))


def test_ggufs_of_other_kinds(tokenizer_folder, tmp_path):
    file = tmp_path / "x.gguf"
    with pytest.raises(UserError, match=r"pre='qwen2'; known are .*smollm.*: take the model's tokenizer.json"):
        file_tokenizer(str(gguf_of_byte_pairs(file, byte_pairs(), "qwen2")))
    with pytest.raises(UserError, match="of the kind 'bert'"):
        file_tokenizer(str(write_gguf(file, "bert", ["a"], [1])))
    with pytest.raises(UserError, match=r"the tokenizer in .* is damaged"):
        file_tokenizer(str(write_gguf(file, "llama", ["a", "b"], [1, 1], token_scores=[0.0, 0.0])))
    merges = {"token_merges": ["a c"], "tokenizer_pre": "gpt-2"}
    with pytest.raises(UserError, match=r"the tokenizer in .* is damaged"):
        file_tokenizer(str(write_gguf(file, "gpt2", ["a", "b"], [1, 1], **merges)))
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "json" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is damaged"):
        file_tokenizer(str(tmp_path))
