import pickle

import numpy as np
import pytest

from jaxvram.data import DataConfig, load, shards
from jaxvram.errors import UserError

tokens = np.random.default_rng(0).integers(50257, size=5000).astype(np.uint16)


def test_shard_layout_is_llm_cs(tmp_path):
    file = tmp_path / "a.bin"
    shards.write_shard(file, tokens)
    header = np.frombuffer(file.read_bytes()[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 5000] and (header[3:] == 0).all()
    assert (np.frombuffer(file.read_bytes()[1024:], "<u2") == tokens).all()
    assert (shards.read_shard(file) == tokens).all()
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), shards.TokenWriter(tmp_path / "a.bin") as writer:
        writer.append(tokens)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def damage(raw: bytes, what: str) -> bytes:
    header = np.frombuffer(raw[:1024], "<i4").copy()
    if what in ("short", "long", "headless", "empty"):
        return {"short": raw[:-1], "long": raw + b"\0\0", "headless": raw[:6], "empty": b""}[what]
    position, value = {"magic": (0, 20240521), "llama": (0, 20240801), "version": (1, 7), "count": (2, -1)}[what]
    header[position] = value
    return header.tobytes() + raw[1024:]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", "truncated"),
        ("long", "truncated or damaged"),
        ("count", "damaged"),
        ("headless", "not an llm.c shard"),
        ("empty", "not an llm.c shard"),
        ("magic", "magic 20240520"),
        ("llama", "Llama-3"),
        ("version", "version 7"),
    ],
)
def test_damaged_shards(tmp_path, what, message):
    file = tmp_path / "train_1.bin"
    shards.write_shard(file, tokens)
    file.write_bytes(damage(file.read_bytes(), what))
    with pytest.raises(UserError, match=message):
        load(DataConfig(tokenizer="gpt2", path=str(file)), 8, 0)


def test_folder_file_and_glob(tmp_path):
    for i, name in enumerate(["interval_000001.bin", "x_train_000002.bin", "x_val_000000.bin"]):
        shards.write_shard(tmp_path / name, tokens[i * 1000 : i * 1000 + 500 + i * 100])
    whole = load(DataConfig(tokenizer="gpt2", path=str(tmp_path)), 8, 0)
    assert "1,100 tokens to train on, 700 held out" in whole.description
    train = load(DataConfig(tokenizer="gpt2", path=str(tmp_path / "*[12].bin"), val_fraction=0.6), 8, 0)
    assert "440 tokens to train on, 660 held out" in train.description  # the cut lies inside the first shard
    one = load(DataConfig(tokenizer="gpt2", path=str(tmp_path / "x_val_000000.bin")), 8, 0)
    assert "630 tokens to train on, 70 held out" in one.description
    with pytest.raises(UserError, match="no shard matches"):
        load(DataConfig(tokenizer="gpt2", path=str(tmp_path / "y*.bin")), 8, 0)
    with pytest.raises(UserError, match=r"data\.tokenizer=gpt2"):
        load(DataConfig(path=str(tmp_path)), 8, 0)
    (tmp_path / "interval_000001.bin").unlink(), (tmp_path / "x_train_000002.bin").unlink()
    with pytest.raises(UserError, match="val shards alone"):
        load(DataConfig(tokenizer="gpt2", path=str(tmp_path)), 8, 0)


@pytest.mark.parametrize("at", [3, 90_000])
def test_tokens_beyond_the_vocabulary(tmp_path, at):
    long = np.zeros(100_000, np.uint16)
    long[at] = 50257
    shards.write_shard(tmp_path / "x.bin", long)
    cfg = DataConfig(tokenizer="gpt2", path=str(tmp_path / "x.bin"), val_fraction=0.02)
    with pytest.raises(UserError, match=r"token 50257.*ends at 50256"):
        source = load(cfg, 1000, 0)  # the head is looked at here, the rest as it is read
        for n in range(200):
            source.batch("train", n, 8)


@pytest.fixture
def nanogpt(tmp_path):
    chars = "abcdefghij"
    for name, part in (("train", tokens[:4000] % 10), ("val", tokens[4000:] % 10)):
        (tmp_path / f"{name}.bin").write_bytes(part.astype("<u2").tobytes())
    shards.write_nanogpt_meta(tmp_path / "meta.pkl", chars)
    return tmp_path


def test_nanogpt_folder(nanogpt):
    source = load(DataConfig(path=str(nanogpt)), 16, 0)
    assert source.vocab_size == 10 and "4,000 tokens to train on, 1,000 held out" in source.description
    assert source.tokenizer.decode(source.tokenizer.encode("jab")) == "jab"
    with pytest.raises(UserError, match=r"has a meta\.pkl.*set char"):
        load(DataConfig(path=str(nanogpt), tokenizer="gpt2"), 16, 0)
    meta = pickle.loads((nanogpt / "meta.pkl").read_bytes())  # the keys that nanoGPT's sample.py reads
    assert meta["vocab_size"] == 10 and meta["stoi"]["b"] == 1 and meta["itos"][9] == "j"
    (nanogpt / "meta.pkl").unlink()
    with pytest.raises(UserError, match=r"has no meta\.pkl.*set gpt2"):
        load(DataConfig(path=str(nanogpt)), 16, 0)
    assert load(DataConfig(path=str(nanogpt), tokenizer="gpt2"), 16, 0).vocab_size == 50257


@pytest.mark.parametrize(("size", "message"), [(3999, "truncated"), (0, "empty"), (None, "missing")])
def test_damaged_nanogpt_files(nanogpt, size, message):
    file = nanogpt / "val.bin"
    raw = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes((raw * 2)[:size])
    with pytest.raises(UserError, match=message):
        load(DataConfig(path=str(nanogpt)), 16, 0)


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib, os; pathlib.Path(os.environ['JAXVRAM_CACHE']).mkdir()",))


GOOD = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}


@pytest.mark.parametrize(
    "meta",
    [
        [1],
        "x",
        {"stoi": {}},
        {"vocab_size": 0, "itos": {}, "stoi": {}},
        GOOD | {"vocab_size": 3},
        GOOD | {"vocab_size": 1},
        GOOD | {"itos": {0: "ab", 1: "b"}},
        GOOD | {"stoi": {"a": 1, "b": 0}},
        GOOD | {"x": Evil()},
    ],
)
def test_damaged_meta_is_refused_and_runs_nothing(tmp_path, meta):
    file = tmp_path / "meta.pkl"
    file.write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match="damaged"):
        shards.read_meta(file)
    assert not (tmp_path / "cache").exists()


def test_truncated_meta_is_refused(tmp_path):
    file = tmp_path / "meta.pkl"
    file.write_bytes(pickle.dumps(GOOD)[:-9])
    with pytest.raises(UserError, match="damaged"):
        shards.read_meta(file)
    file.write_bytes(pickle.dumps(GOOD))
    assert shards.read_meta(file).chars == "ab"
