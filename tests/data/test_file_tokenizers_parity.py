"""Ids equal those of transformers, SentencePiece and tokenizers, from which the files come; a GGUF's header gguf's own."""

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizer_files import (
    CORPUS,
    LOOKALIKES,
    TEXTS,
    byte_pairs,
    gguf_of_byte_pairs,
    gguf_of_pieces,
    random_texts,
    sentence_pieces,
)

from jaxvram.data import file_tokenizers
from jaxvram.data.file_tokenizers import file_tokenizer
from jaxvram.data.gguf_metadata import read_metadata


def test_json_equals_transformers(tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "json" / "tokenizer.json"))
    ours = file_tokenizer(str(tokenizer_folder / "json" / "tokenizer.json"))
    for text in TEXTS:
        theirs = other.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text).tolist() == theirs and ours.decode([3, *theirs]) == other.decode([3, *theirs])
    # the setting that all of it hangs on does something
    assert other.encode(LOOKALIKES, add_special_tokens=False) != ours.encode(LOOKALIKES).tolist()


@pytest.mark.parametrize("kind", ["unigram", "spbpe", "pieces.gguf"])
def test_pieces_equal_sentencepiece(tokenizer_folder, tokenizer, kind):
    model = tokenizer_folder / ("unigram" if kind == "unigram" else "spbpe") / "tokenizer.model"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*TEXTS, *random_texts(), "[INST] hi [/INST]", *CORPUS]:
        assert tokenizer.encode(text).tolist() == sp.encode(text)
    assert tokenizer.encode("[INST]").tolist()[-1] == sp.piece_to_id("[INST]")
    assert 0 not in tokenizer.encode("🤗")  # byte_fallback, also where the file had to be written anew


def test_the_dummy_space_of_a_gguf(tokenizer_folder, tmp_path):
    model = sentence_pieces(tmp_path, "bpe", add_dummy_prefix=False)
    without = file_tokenizer(str(gguf_of_pieces(tmp_path / "x.gguf", model, add_space_prefix=False)))
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in TEXTS:
        assert without.encode(text).tolist() == sp.encode(text) and without.decode(sp.encode(text)) == text


@pytest.mark.parametrize(
    ("cut", "before", "pieces"),
    [
        ("gpt-2", [], "I ' LL Ġ5678 . Ċ"),
        ("smollm", [tokenizers.pre_tokenizers.Digits(individual_digits=True)], "I ' LL Ġ 5 6 7 8 . Ċ"),
        (
            "llama-bpe",
            [tokenizers.pre_tokenizers.Split(tokenizers.Regex(file_tokenizers.LLAMA3_SPLIT), "isolated")],
            "I 'LL Ġ 567 8 .Ċ",
        ),
    ],
)
def test_byte_pairs_of_a_gguf_are_cut_as_it_says(tmp_path, cut, before, pieces):
    pairs = byte_pairs(use_regex=False, corpus=["567", ".\n"] * 9)  # merges that only the cuts prevent
    by_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut != "llama-bpe")
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, by_bytes])
    ours = file_tokenizer(str(gguf_of_byte_pairs(tmp_path / "x.gguf", pairs, cut)))
    pairs.encode_special_tokens = True
    for text in [*TEXTS, *random_texts(), *CORPUS]:
        assert ours.encode(text).tolist() == pairs.encode(text).ids
    assert " ".join(piece for piece, _ in ours._tokenizer.pre_tokenizer.pre_tokenize_str("I'LL 5678.\n")) == pieces


def test_smollm2_equals_transformers(smollm2):
    ours, other, _ = smollm2
    assert (ours.vocab_size, ours.bos, ours.eos) == (49152, 1, 2)
    assert (len(other), other.bos_token_id, other.eos_token_id) == (49152, 1, 2)
    assert [ours.special(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    for text in [*TEXTS, *random_texts(), *CORPUS]:
        theirs = other.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text).tolist() == theirs and ours.decode(theirs) == text


def test_gguf_metadata_equals_the_librarys(tokenizer_folder):
    for file in (tokenizer_folder / "pairs.gguf", tokenizer_folder / "pieces.gguf"):
        theirs = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items() if key[:5] != "GGUF."}
        assert read_metadata(file) == theirs and len(theirs) > 6
