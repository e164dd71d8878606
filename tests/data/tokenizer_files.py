"""Small tokenizers as files of every kind, and texts that are hard on them."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers

from jaxvram.data import shards

KINDS = ("json", "pairs.gguf", "unigram", "spbpe", "pieces.gguf", "prefixed")
with_each_kind = pytest.mark.parametrize("kind", KINDS)
SPECIALS = ["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LOOKALIKES = "a <|endoftext|> b</s> <s>c</s><|im_end|>\n<|im_start|>user <unk>"
TEXTS = (
    "Hello world", " one space", "  two", "ends ", "\n", "\n\nlines\n \n", "", " ", "\t\ttabs", "naïve café", "日本語。",
    "🤗👍🏽",
    "12345 67,890", "I'LL we'll DON'T don't", "e\u0301 decomposed", "a\r\nb", "nul \0 byte", "x" * 50, "     many   spaces",
    LOOKALIKES,
)  # fmt: skip
CODE = Path(shards.__file__)
CORPUS = [CODE.read_text(encoding="utf-8") * 2, "the cat sat on the mat, and we'll see 12 34 567.\n" * 50]


def random_texts(count=60):
    rng = np.random.default_rng(0)
    bits = [*TEXTS, *" \n\t.,'", "the ", " cat", "<", "/s>", "\u3000", "\u00ad", "\U0001f9d1\u200d"]
    return ["".join(rng.choice(bits, size=rng.integers(1, 9))) for _ in range(count)]


def write_corpus(folder):
    """Two documents of a few hundred tokens each; returns the new folder."""
    folder.mkdir()
    for name, text in zip("ab", CORPUS, strict=True):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def byte_pairs(use_regex=True, corpus=CORPUS):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def sentence_pieces(folder, kind, corpus=CORPUS, **options):
    """The file of a SentencePiece model, trained in `folder`."""
    options = {
        "vocab_size": 600, "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "character_coverage": 0.98, "user_defined_symbols": ["[INST]"], "control_symbols": ["<|im_end|>"],
    } | options  # fmt: skip
    (folder / "corpus.txt").write_text("\n".join(corpus), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


def write_gguf(file, model, tokens, types, **more):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_of_byte_pairs(file, tokenizer, cut):
    content = json.loads(tokenizer.to_str())
    id_of = tokenizer.get_vocab()
    tokens = sorted(id_of, key=id_of.get)
    types = [3 if token in SPECIALS else 1 for token in tokens]
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return write_gguf(file, "gpt2", tokens, types, token_merges=merges, tokenizer_pre=cut, **ends)


def gguf_of_pieces(file, model, **more):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(sp.get_piece_size())
    tokens = [sp.id_to_piece(i) for i in ids]
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
    types = [4 if token == "[INST]" else kind(i) for i, token in enumerate(tokens)]
    scores = [sp.get_score(i) for i in ids]
    return write_gguf(file, "llama", tokens, types, token_scores=scores, bos_token_id=1, eos_token_id=2, **more)


def write_every_kind(folder):
    """A file of each of KINDS."""
    for name in ("json", "unigram", "spbpe", "prefixed"):
        (folder / name).mkdir()
    pairs = byte_pairs()
    pairs.save(str(folder / "json" / "tokenizer.json"))
    (folder / "json" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    gguf_of_byte_pairs(folder / "pairs.gguf", pairs, "gpt-2")
    sentence_pieces(folder / "unigram", "unigram")
    model = sentence_pieces(folder / "spbpe", "bpe")
    gguf_of_pieces(folder / "pieces.gguf", model)
    # as Llama 2's tokenizer.json: SentencePiece's pieces and dummy space in the other library
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "unigram" / "tokenizer.model"))
    vocabulary = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    normalizers = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    unigram.normalizer = tokenizers.normalizers.Sequence(normalizers)
    unigram.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    unigram.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])
    unigram.save(str(folder / "prefixed" / "tokenizer.json"))
    (folder / "prefixed" / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 0]}')
