"""Tokenizers of every kind of file: every text comes back, and none becomes a special token."""

import json

import numpy as np
from tokenizer_files import CORPUS, KINDS, LOOKALIKES, SPECIALS, TEXTS, random_texts, with_each_kind

from jaxvram.data import file_tokenizers
from jaxvram.data.file_tokenizers import file_tokenizer
from jaxvram.data.tokenizers import continuation


@with_each_kind
def test_every_text_comes_back(tokenizer):
    for text in [*TEXTS, *random_texts()]:
        ids_N = tokenizer.encode(text)
        assert ids_N.dtype == np.int32 and ids_N.ndim == 1 and tokenizer.decode(ids_N) == text
        assert not len(ids_N) or 0 <= ids_N.min() <= ids_N.max() < tokenizer.vocab_size


@with_each_kind
def test_no_text_becomes_a_special_token(tokenizer):
    specials = {i for token in [*SPECIALS, "<unk>"] if (i := tokenizer.special(token)) is not None}
    assert {tokenizer.special("<s>"), tokenizer.special("</s>"), tokenizer.special("<|im_end|>")} <= specials
    for text in [*TEXTS, *random_texts(), *SPECIALS]:
        assert not specials & set(tokenizer.encode(text).tolist()), text
    assert tokenizer.special("the") is tokenizer.special("<|nothing|>") is None


@with_each_kind
def test_specials_and_unknown_ids_in_a_text(tokenizer):
    bos, eos = tokenizer.special("<s>"), tokenizer.special("</s>")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eot) == (bos, eos, eos) == (1, 2, 2)
    ids_N = tokenizer.encode("a cat")
    # this decoder takes the dummy space away only where nothing stands before it
    dummy = " " if tokenizer.name.endswith("prefixed/tokenizer.json") else ""
    assert tokenizer.decode([bos, *ids_N, eos]) == f"<s>{dummy}a cat</s>"
    assert tokenizer.decode([*ids_N, tokenizer.vocab_size, -1]) == "a cat\ufffd\ufffd"
    assert tokenizer.decode([10**6]) == "\ufffd" and tokenizer.decode([]) == ""


@with_each_kind
def test_a_continuation_keeps_its_first_space(tokenizer):
    for text in ("the cat sat on the mat", "naïve 🤗👍🏽 日本", " a  b"):
        ids_N = tokenizer.encode(text)
        for cut in range(1, len(ids_N)):
            before = tokenizer.decode(ids_N[:cut])
            if text.startswith(before):  # else the cut goes through a character
                assert before + continuation(tokenizer, ids_N[:cut], ids_N[cut:]) == text


def test_one_vocabulary_has_one_identity_in_every_kind_of_file(tokenizer_folder):
    identity = {kind: file_tokenizer(str(tokenizer_folder / kind)).identity for kind in KINDS}
    assert identity["json"] == identity["pairs.gguf"] and identity["spbpe"] == identity["pieces.gguf"]
    assert identity["unigram"] == identity["prefixed"] and len(set(identity.values())) == 3
    assert identity["json"].startswith("500 tokens, ")


def test_a_marker_is_special_whatever_its_file_says(tokenizer_folder, tmp_path):
    content = json.loads((tokenizer_folder / "json" / "tokenizer.json").read_text())
    content["added_tokens"] = [token | {"special": False} for token in content["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "bos_token": null}')
    ours = file_tokenizer(str(tmp_path))
    assert not {0, 2, 3, 4} & set(ours.encode(LOOKALIKES).tolist())
    assert 1 in ours.encode(LOOKALIKES)  # <s>: neither named as an end nor of a marker's form
    assert ours.bos is None and ours.eot == ours.eos == 2
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    assert (file_tokenizer(str(tmp_path)).eos, file_tokenizer(str(tmp_path)).eot) == (None, 1)
    (tmp_path / "special_tokens_map.json").unlink()
    assert file_tokenizer(str(tmp_path)).eot is None


def test_a_long_text_is_cut_before_line_breaks(tokenizer_folder, monkeypatch):
    text = CORPUS[0]
    for kind in ("json", "spbpe", "prefixed"):
        ours = file_tokenizer(str(tokenizer_folder / kind))
        whole = ours.encode(text)
        monkeypatch.setattr(file_tokenizers, "PIECE", 500)
        pieces = ours.encode(text)
        monkeypatch.undo()
        assert ours.decode(pieces) == text
        assert kind != "json" or pieces.tolist() == whole.tolist()  # GPT-2's pattern ends there anyway
