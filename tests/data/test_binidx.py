"""binidx: bytes as Megatron and RWKV-LM lay them out, what is wrong told at the door, texts to pairs, pairs to batches."""

import itertools
import json
import struct

import numpy as np
import pytest

from jaxvram.data import DataConfig, load, prepare
from jaxvram.data.binidx import BinidxWriter, read_binidx
from jaxvram.data.prepare import prepare as run
from jaxvram.data.text import named_tokenizer
from jaxvram.errors import UserError

tokens = np.random.default_rng(0).integers(1, 50000, size=5000)
SIZES = [7, 4000, 1, 992]


def index(dtype_code, itemsize, sizes=SIZES, version=1, magic=b"MMIDIDX\x00\x00", starts=None):
    """The .idx, field by field as RWKV-LM's src/binidx.py reads it."""
    ends = list(itertools.accumulate(sizes))
    pointers = [itemsize * (end - size) for end, size in zip(ends, sizes, strict=True)]
    starts = range(len(sizes) + 1) if starts is None else starts
    raw = magic + struct.pack("<Q", version) + struct.pack("<B", dtype_code) + struct.pack("<QQ", len(sizes), len(starts))
    raw += b"".join(struct.pack("<i", s) for s in sizes) + b"".join(struct.pack("<q", p) for p in pointers)
    return raw + b"".join(struct.pack("<q", s) for s in starts)


def write(folder, code=8, dtype="<u2", name="pile", **fields):
    (folder / f"{name}.bin").write_bytes(tokens.astype(dtype).tobytes())
    (folder / f"{name}.idx").write_bytes(index(code, np.dtype(dtype).itemsize, **fields))
    return folder / name


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_every_type_of_token_is_read(tmp_path, code, dtype):
    got = read_binidx(write(tmp_path, code, dtype))
    assert got.dtype == np.dtype(dtype) and (got == tokens).all() and not got.flags.writeable


def test_the_writer_writes_these_bytes(tmp_path):
    with BinidxWriter(tmp_path / "mine", np.dtype("<u2")) as writer:
        for document in np.split(tokens, np.cumsum(SIZES)[:-1]):
            writer.append(document[:3])
            writer.append(document[3:])
            writer.end_document()
    theirs = write(tmp_path)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"mine{suffix}").read_bytes() == (tmp_path / f"{theirs.name}{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(RuntimeError), BinidxWriter(tmp_path / "failed", np.dtype("<u2")) as writer:
        raise RuntimeError
    assert len(list(tmp_path.iterdir())) == 4


def test_a_pair_trains_by_any_of_its_names(tmp_path):
    """The tail is held out; windows of the rest."""
    write(tmp_path, name="v1.5_text")
    names = [tmp_path / name for name in ("v1.5_text", "v1.5_text.bin", "v1.5_text.idx", ".")]
    sources = [load(DataConfig(path=str(name), tokenizer="world", order="shuffled"), 16, 0) for name in names]
    assert all("4,500 tokens to train on, 500 held out, 65,536" in source.description for source in sources)
    batches = [source.batch("train", 3, 4) for source in sources]
    assert all((batch["targets"] == batches[0]["targets"]).all() for batch in batches)
    row = np.concatenate([batches[0]["tokens"][0], batches[0]["targets"][0, -1:]])
    windows = [tokens[i : i + 17] for i in range(0, 4500 - 16, 16)]
    assert sum((row == window).all() for window in windows) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, r"pile\.idx is not the index of a binidx pair"),
        ({"version": 2}, "is of version 2; only version 1"),
        ({"code": 7}, r"code 7 \(floating-point\), which are no tokens; known: 1 uint8, 3 int16"),
        ({"code": 99}, r"code 99 \(an unknown type\)"),
        ({"sizes": [5, 4994]}, "10,000 bytes, but the 2 documents of the index need 9,998"),
        ({"sizes": [5001, -1]}, "damaged or empty"),
        ({"sizes": []}, "damaged or empty"),
    ],
)
def test_damaged_pairs_are_told(tmp_path, change, message):
    write(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        load(DataConfig(path=str(tmp_path / "pile"), tokenizer="world"), 16, 0)


def test_cut_files_and_lone_files_are_told(tmp_path):
    prefix = write(tmp_path)
    data, idx = tmp_path / "pile.bin", tmp_path / "pile.idx"
    whole, raw = data.read_bytes(), idx.read_bytes()
    for file, content, message in (
        (data, whole[:-2], "9,998 bytes, but the 4 documents of the index need 10,000"),
        (idx, raw[:-8], "114 bytes, but 4 documents need 122"),
        (idx, raw[:20], "is truncated: 20 bytes"),
        (idx, raw[:58] + struct.pack("<q", 2) + raw[66:], "one behind the other"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(DataConfig(path=str(prefix), tokenizer="world"), 16, 0)
        data.write_bytes(whole)
        idx.write_bytes(raw)
    with pytest.raises(UserError, match=r"holds no characters: set data.tokenizer=world"):
        load(DataConfig(path=str(prefix)), 16, 0)
    data.unlink()
    with pytest.raises(UserError, match=r"pile\.idx has no pile\.bin beside it"):
        load(DataConfig(path=str(prefix), tokenizer="world"), 16, 0)
    (tmp_path / "other.idx").write_bytes(raw)
    with pytest.raises(UserError, match=r"has 2 \.idx files: set data.path to one"):
        load(DataConfig(path=str(tmp_path), tokenizer="world"), 16, 0)


def test_negative_tokens_are_told(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.where(np.arange(5000) == 20, -5, tokens).astype("<i4").tobytes())
    (tmp_path / "a.idx").write_bytes(index(4, 4))
    with pytest.raises(UserError, match="holds token -5, but the world vocabulary"):
        load(DataConfig(path=str(tmp_path / "a"), tokenizer="world"), 16, 0)


TEXTS = {"a.txt": "To be, or\nnot to be\n" * 30, "b.txt": "日本 🤗\n\nthat is the question", "c.txt": "x"}


def test_texts_become_documents_with_token_0_behind_each(tmp_path, monkeypatch):
    """As make_data.py: the tokens of the `rwkv` package for each text, then 0. Cut into chunks or not, with any workers."""
    pytest.importorskip("rwkv")
    from rwkv.utils import PIPELINE

    theirs = PIPELINE(None, "rwkv_vocab_v20230424")
    folder, out = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    files = run(folder, out, "world", layout="binidx", workers=1)
    assert [f.name for f in files] == ["text.bin", "text.idx"]
    documents = [[*theirs.encode(text), 0] for text in TEXTS.values()]
    assert read_binidx(out / "text").tolist() == list(itertools.chain(*documents))
    assert (out / "text.idx").read_bytes() == index(8, 2, [len(d) for d in documents])
    before = [f.stat().st_mtime_ns for f in files]
    assert run(folder, out, "world", layout="binidx") == files and [f.stat().st_mtime_ns for f in files] == before
    source = load(DataConfig(path=str(out), tokenizer="world"), 16, 0)
    assert f"{sum(map(len, documents)) * 9 // 10:,} tokens to train on" in source.description
    with pytest.raises(UserError, match="was prepared with --tokenizer=world"):
        load(DataConfig(path=str(out), tokenizer="gpt2"), 16, 0)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 100)
    run(folder, tmp_path / "cut", "world", layout="binidx", workers=1)
    assert len(read_binidx(tmp_path / "cut" / "text")) >= len(read_binidx(out / "text"))
    assert (read_binidx(tmp_path / "cut" / "text") == 0).sum() == 3


def test_a_line_of_jsonl_is_a_document(tmp_path, monkeypatch):
    """As make_data.py reads them, whatever chunks they fall into."""
    lines = [{"text": "a\nb\n\n{c"}, {"meta": 1, "text": "日本\u2028" * 20}, {"text": "x"}, {"text": "y" * 99}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=i % 2) for i, line in enumerate(lines)))
    encode = named_tokenizer("world").encode
    want = list(itertools.chain(*([*encode(line["text"]).tolist(), 0] for line in lines)))
    for chunk_bytes in (1 << 20, 10):
        monkeypatch.setattr(prepare, "CHUNK_BYTES", chunk_bytes)
        run(tmp_path / "a.jsonl", tmp_path / f"{chunk_bytes}", "world", layout="binidx", workers=1)
        assert read_binidx(tmp_path / f"{chunk_bytes}" / "text").tolist() == want
    for i, line in enumerate(('{"text": 5}', "[]", "{")):
        (tmp_path / "b.jsonl").write_text(line)
        with pytest.raises(UserError, match=r'b\.jsonl has a line that is no JSON with a "text"'):
            run(tmp_path / "b.jsonl", tmp_path / f"b{i}", "world", layout="binidx", workers=1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "folder" / "a.jsonl")
    with pytest.raises(UserError, match="has no texts"):  # shards are of whole files
        run(tmp_path / "folder", tmp_path / "c", "world")
    assert run(tmp_path / "folder", tmp_path / "c", "world", layout="binidx")


def test_what_cannot_be_prepared_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    for options, message in (
        ({"layout": "parquet"}, "--format=parquet is unknown .*binidx, shards"),
        ({"layout": "binidx", "tokenizer": "char"}, "--format=binidx is for tokens: give --tokenizer=world"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "a.txt", tmp_path / "out", **options)
