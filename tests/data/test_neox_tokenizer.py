"""GPT-NeoX's tokenizer: from a folder, a cache or the network, and what to do where it is nowhere."""

import json

import pytest
import tokenizers
from tokenizer_files import CORPUS, TEXTS, byte_pairs, random_texts, write_corpus

from jaxvram.data import DataConfig, file_tokenizers, load
from jaxvram.data.file_tokenizers import file_tokenizer, neox_tokenizer
from jaxvram.errors import UserError


@pytest.fixture(scope="module")
def neox_json():
    """A small tokenizer as GPT-NeoX's: <|endoftext|> is 0, and runs of spaces are added tokens."""
    pairs = byte_pairs()
    pairs.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    return pairs.to_str()


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.mark.usefixtures("no_hub")
def test_neox_from_a_folder_or_a_file(neox_json, tmp_path):
    (tmp_path / "tokenizer.json").write_text(neox_json)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        neox = neox_tokenizer(str(path), download=False)
        assert (neox.name, neox.bos, neox.eos, neox.eot, neox.vocab_size) == ("neox", 0, 0, 0, 503)
        assert neox.encode("a    b")[1] == 500 and 0 not in neox.encode("<|endoftext|>")
        for text in [*TEXTS, *random_texts()]:
            assert neox.decode(neox.encode(text)) == text
    assert neox.identity == file_tokenizer(str(tmp_path)).identity  # the same ids, however they were named
    with pytest.raises(UserError, match=r"must be GPT-NeoX's tokenizer.json or a folder"):
        neox_tokenizer(str(tmp_path / "hf"))


def test_neox_from_the_caches(neox_json, no_hub, tmp_path, monkeypatch):
    snapshot = "models--EleutherAI--gpt-neox-20b/snapshots/abc/tokenizer.json"
    places = {
        "HF_HOME": (tmp_path / "one", tmp_path / "one" / "hub"),
        "HF_HUB_CACHE": (tmp_path / "two", tmp_path / "two"),
        "XDG_CACHE_HOME": (tmp_path / "three", tmp_path / "three" / "huggingface" / "hub"),
        "HOME": (tmp_path / "four", tmp_path / "four" / ".cache" / "huggingface" / "hub"),
    }
    for variable, (value, hub) in places.items():
        with monkeypatch.context() as patch:
            patch.delenv("HF_HOME")
            patch.setenv(variable, str(value))
            with pytest.raises(UserError, match="not on this machine"):
                neox_tokenizer(download=False)
            (hub / snapshot).parent.mkdir(parents=True)
            (hub / snapshot).write_text(neox_json)
            assert neox_tokenizer(download=False).eot == 0
    with pytest.raises(UserError, match="not on this machine"):
        neox_tokenizer(download=False)
    (tmp_path / "cache" / "neox").mkdir(parents=True)
    (tmp_path / "cache" / "neox" / "tokenizer.json").write_text(neox_json)
    assert neox_tokenizer(download=False).eot == 0


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("download", [True, False])
def test_no_neox_names_three_ways_out(download):
    with pytest.raises(UserError, match=r"data\.vocab_path=FOLDER.*hf download.*data\.download=True") as caught:
        neox_tokenizer(download=download)
    assert ("could not download" in str(caught.value)) == download


def test_not_a_neox_vocabulary(neox_json, tokenizer_folder, tmp_path):
    file = tmp_path / "tokenizer.json"
    content = json.loads(neox_json)
    too_many = {f"token{i}": 1000 + i for i in range(50_000)}
    content["model"]["vocab"] |= too_many
    for raw, message in (
        (tokenizer_folder.joinpath("prefixed", "tokenizer.json").read_text(), r"is not GPT-NeoX's vocabulary.*is None"),
        (json.dumps(content), r"not GPT-NeoX's vocabulary: it has 51,000 ids \(at most 50,277\)"),
        (neox_json[:1000], "damaged or is not a tokenizer.json"),
    ):
        file.write_text(raw)
        with pytest.raises(UserError, match=message + ".*replace it with https://.*data.vocab_path"):
            neox_tokenizer(str(tmp_path))


@pytest.fixture
def neox_server(server, monkeypatch):
    """In place of the page that has the tokenizer."""
    monkeypatch.setattr(file_tokenizers, "NEOX_URL", server.url + "/tokenizer.json")
    return server


@pytest.mark.usefixtures("no_hub")
def test_neox_comes_from_the_network_once(neox_server, neox_json, tmp_path):
    neox_server.files["/tokenizer.json"], neox_server.break_at = neox_json.encode(), 5000
    with pytest.raises(UserError, match="broke at 5,000"):
        neox_tokenizer()
    for _ in range(2):
        assert neox_tokenizer().vocab_size == 503
    assert neox_server.asked == [("GET", None), ("GET", "bytes=5000-")]
    assert (tmp_path / "cache" / "neox" / "tokenizer.json").read_text() == neox_json


@pytest.mark.usefixtures("no_hub")
def test_what_is_no_neox_is_not_kept(neox_server, tokenizer_folder, tmp_path):
    for body in (b"<html>log in</html>", (tokenizer_folder / "prefixed" / "tokenizer.json").read_bytes()):
        neox_server.files["/tokenizer.json"] = body
        with pytest.raises(UserError, match=r"sent something else than was asked for.*Three ways out"):
            neox_tokenizer()
        kept = {file.name for file in (tmp_path / "cache" / "neox").iterdir()}
        assert kept <= {"tokenizer.json.lock"}, kept


@pytest.mark.usefixtures("no_hub")
def test_texts_in_neox_tokens(neox_json, tmp_path):
    texts = write_corpus(tmp_path / "texts")
    (tmp_path / "tokenizer.json").write_text(neox_json)
    cfg = DataConfig(path=str(texts), tokenizer="neox", vocab_path=str(tmp_path), val_fraction=0.01, order="shuffled")
    source = load(cfg, 16, 0)
    neox = neox_tokenizer(str(tmp_path))
    expected = [i for text in CORPUS for i in (0, *neox.encode(text))]
    assert source.vocab_size == 503 and f"{int(len(expected) * 0.99):,} tokens to train on" in source.description
    rows = {tuple(row) for row in source.batch("train", 0, 64)["tokens"].tolist()}
    windows = {tuple(expected[i : i + 16]) for i in range(0, len(expected), 16)}
    assert rows <= windows
