"""Tokenizers that come as files: Hugging Face's tokenizer.json, SentencePiece's tokenizer.model, what a GGUF file carries.

Beyond the protocol of tokenizers.py they have `bos` and `eos` (ids or None) and `special(token) -> id or None`, with which
a prompt gets <s> or <|im_start|>: `encode` adds none, and never makes one of text that merely looks like it.
The libraries are imported where they are used: no other recipe waits for them.
"""

import json
import os
import re
from pathlib import Path

import numpy as np

from jaxvram.data.download import cache_dir, fetch
from jaxvram.data.gguf_metadata import read_metadata
from jaxvram.data.tokenizers import vocabulary_digest
from jaxvram.errors import UserError

NEOX_URL = "https://huggingface.co/EleutherAI/gpt-neox-20b/resolve/main/tokenizer.json"
NEOX_IDS, NEOX_EOT = 50277, "<|endoftext|>"
NO_NEOX = (
    "GPT-NeoX's vocabulary is not on this machine ({reason}). Three ways out: put the tokenizer.json of "
    "EleutherAI/gpt-neox-20b (Mamba's and Pythia's is the same) in a folder and set data.vocab_path=FOLDER; or "
    "`hf download EleutherAI/gpt-neox-20b tokenizer.json`; or run once with a network and data.download=True"
)
KINDS = (
    "a tokenizer.json (Hugging Face), a tokenizer.model (SentencePiece), a .gguf, or a folder that holds one of them"
)
MARKER = re.compile(r"<[|｜].*[|｜]>")  # special, whatever its file says: fine-tunes forget the flag
SPACE = "\u2581"  # SentencePiece's sign for a space
# token types of SentencePiece, and of GGUF after it
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
# llama.cpp's names for how a text is cut before byte pairs are merged; digits: as GPT-2, but numbers digit by digit
_GPT2, _DIGITS = (
    ("gpt-2", "phi-2", "mpt", "olmo", "jais"),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx")
GGUF_CUTS = dict.fromkeys(_GPT2, "gpt2") | dict.fromkeys(_DIGITS, "digits") | dict.fromkeys(_LLAMA3, "llama3")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECE = 1 << 20  # characters: the library takes half a kB a token while it works
_BREAK = re.compile(r"(?<=[^\r])\n(?=\S)")


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer`. Byte-level kinds give back every text; one that normalises gives back its normal form.

    One with a Metaspace pre-tokenizer cannot tell a text from the same with a space before it. Added tokens that are
    not special (GPT-NeoX's runs of spaces) are made of text, as the model expects.
    """

    def __init__(self, name: str, tokenizer, bos: int | None = None, eos: int | None = None):
        self.name, self.bos, self.eos = name, bos, eos
        self.eot = bos if eos is None else eos
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # that is: as the text they are
        id_of = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items()}
        self.vocab_size = max(id_of.values()) + 1
        self._known = np.zeros(self.vocab_size, bool)
        self._known[list(id_of.values())] = True
        self.identity = _identity(id_of, self.vocab_size)
        keep_apart(tokenizer, [token.content for token in added.values() if token.special])

    def encode(self, text: str) -> np.ndarray:
        return _in_pieces(self, text, lambda piece: self._tokenizer.encode(piece, add_special_tokens=False).ids)

    def decode(self, ids) -> str:
        """A dummy space that `encode` puts before a text is taken away again; see tokenizers.continuation."""
        ids_N = np.asarray(ids, np.int64).ravel()  # also of an empty list
        known_N = (ids_N >= 0) & (ids_N < self.vocab_size)
        known_N[known_N] = self._known[ids_N[known_N]]
        runs = np.split(ids_N, np.flatnonzero(~known_N)) if ids_N.size else []
        text = []
        for number, run in enumerate(runs):  # each but the first begins with an unknown id
            unknown = number > 0
            text.append("\ufffd" * unknown + self._tokenizer.decode(run[unknown:].tolist(), skip_special_tokens=False))
        return "".join(text)

    def special(self, token: str) -> int | None:
        return self._special.get(token)


class SentencePieceTokenizer:
    """A SentencePiece model. A text without SPACE comes back as it was if the model neither normalises nor tidies spaces.

    Llama's does not. It puts a dummy space before a text, which `decode` takes away before the first word, so that the
    words of a continuation need tokenizers.continuation. Pieces that the model calls user-defined are made of text.
    """

    def __init__(self, name: str, model: bytes, bos: int | None = None, eos: int | None = None):
        from sentencepiece import SentencePieceProcessor

        self._processor = sp = SentencePieceProcessor(model_proto=model)
        self.name, self.vocab_size = name, sp.get_piece_size()
        self.bos = _id_or_none(sp.bos_id() if bos is None else bos, self.vocab_size)
        self.eos = _id_or_none(sp.eos_id() if eos is None else eos, self.vocab_size)
        self.eot = self.bos if self.eos is None else self.eos
        pieces = [sp.id_to_piece(i) for i in range(self.vocab_size)]
        self._special = {piece: i for i, piece in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
        self._bytes = [self._bytes_of(i, piece) for i, piece in enumerate(pieces)]
        self.identity = _identity({piece: i for i, piece in enumerate(pieces)}, self.vocab_size)
        self._dummy_space = "".join(sp.encode("a", out_type=str)).startswith(SPACE)

    def _bytes_of(self, i: int, piece: str) -> bytes:
        if self._processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return (piece if piece in self._special else piece.replace(SPACE, " ")).encode("utf-8")

    def encode(self, text: str) -> np.ndarray:
        return _in_pieces(self, text, self._processor.encode)

    def decode(self, ids) -> str:
        special, pieces, begun = set(self._special.values()), [], not self._dummy_space
        for i in np.asarray(ids, np.int64).ravel().tolist():
            piece = self._bytes[i] if 0 <= i < self.vocab_size else b"\xef\xbf\xbd"
            if not begun and i not in special:
                piece, begun = piece.removeprefix(b" "), True
            pieces.append(piece)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def special(self, token: str) -> int | None:
        return self._special.get(token)


def _id_or_none(i: int | None, vocab_size: int) -> int | None:
    return i if i is not None and 0 <= i < vocab_size else None


def _identity(id_of: dict[str, int], vocab_size: int) -> str:
    """The same for one vocabulary in any of the three kinds of file."""
    return f"{vocab_size} tokens, {vocabulary_digest({token.encode(): i for token, i in id_of.items()})[:16]}"


def _in_pieces(tokenizer, text: str, encode) -> np.ndarray:
    """The ids of `text`, cut before a line break about every PIECE characters; next to a cut they can be others."""
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # half a pair becomes U+FFFD
    start, pieces = 0, [np.zeros(0, np.int32)]
    while start < len(text):
        cut = _BREAK.search(text, start + PIECE)
        stop = cut.start() if cut else len(text)
        ids_N = np.array(encode(text[start:stop]), np.int32)
        pieces.append(without_dummy_space(tokenizer, ids_N) if start else ids_N)
        start = stop
    return np.concatenate(pieces)


def without_dummy_space(tokenizer, ids_N: np.ndarray) -> np.ndarray:
    """Ids of a text that goes on from another, and begins with a line break: before that, a space stands by itself."""
    return ids_N[1:] if len(ids_N) and not tokenizer.decode(ids_N[:1]) else ids_N


def keep_apart(tokenizer, specials: list[str]):
    """A Unigram model finds "</s>" among its words and makes it of text: such text is cut behind its first character."""
    from tokenizers import Regex, pre_tokenizers

    made = lambda token: tokenizer.token_to_id(token) in tokenizer.encode(token, add_special_tokens=False).ids
    leaks = [token for token in specials if len(token) > 1 and made(token)]
    if leaks:
        pattern = Regex("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in leaks))
        cut = pre_tokenizers.Split(pattern, "merged_with_previous")
        before = tokenizer.pre_tokenizer
        tokenizer.pre_tokenizer = cut if before is None else pre_tokenizers.Sequence([before, cut])


def file_tokenizer(path: str | None):
    """The tokenizer that data.vocab_path names: of a file, or of the first kind of file that a folder holds."""
    if path is None:
        raise UserError(f"data.tokenizer=file needs data.vocab_path: {KINDS}")
    file = _file_in(Path(path).expanduser())
    readers = {".json": _from_json, ".model": _from_sentencepiece, ".gguf": _from_gguf}
    if file.suffix not in readers:
        raise UserError(f"data.vocab_path={file} must be {KINDS}")
    return readers[file.suffix](file)


def _file_in(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"data.vocab_path={path} does not exist; it must be {KINDS}")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        which = f"the folder has {len(found)} .gguf files, name one of them" if found else f"it must be {KINDS}"
        raise UserError(f"data.vocab_path={path}: {which}")
    return found[0]


def _from_json(file: Path, name: str | None = None) -> HuggingFaceTokenizer:
    import tokenizers

    named = _named_beside(file.parent)
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
        for added in content.get("added_tokens") or []:
            if added["content"] in named.values() or MARKER.fullmatch(added["content"]):
                added["special"] = True
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        ends = {of: t if isinstance(t, int) else tokenizer.token_to_id(t) for of, t in named.items()}
        return HuggingFaceTokenizer(name or str(file), tokenizer, **ends)
    except OSError as error:
        raise UserError(f"could not read {file}: {error.strerror or error}") from error
    except Exception as error:  # the library raises nothing narrower
        reason = f"{type(error).__name__}: {error}"[:120]
        raise UserError(
            f"{file} is damaged or is not a tokenizer.json of Hugging Face ({reason}): fetch it again"
        ) from error


def _named_beside(folder: Path) -> dict[str, str | int]:
    """{"bos": token or id, "eos": ...} by the first file of `folder` that names them; none need be there."""
    named = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        try:
            content = json.loads((folder / name).read_bytes().decode("utf-8")) if (folder / name).is_file() else {}
            for of in ("bos", "eos"):
                token = content.get(f"{of}_token", content.get(f"{of}_token_id"))
                token = token.get("content") if isinstance(token, dict) else token
                token = token[0] if isinstance(token, list) and token else token
                if isinstance(token, str | int):
                    named.setdefault(of, token)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / name} is damaged ({error}): fetch it again, or remove it") from error
    return named


def _from_sentencepiece(file: Path) -> SentencePieceTokenizer:
    try:
        return SentencePieceTokenizer(str(file), file.read_bytes())
    except OSError as error:
        raise UserError(f"could not read {file}: {error.strerror or error}") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file} is damaged or is not a model of SentencePiece: fetch it again") from error


def _from_gguf(file: Path):
    content = read_metadata(file)
    of = lambda key, default=None: content.get(f"tokenizer.ggml.{key}", default)
    kind, tokens = of("model"), of("tokens")
    if kind not in ("llama", "gpt2") or not tokens:
        known = "SentencePiece ('llama') and byte pairs ('gpt2') are known"
        raise UserError(f"{file} has a tokenizer of the kind {kind!r}; {known}: take the model's tokenizer.json")
    ends = {"bos": _id_or_none(of("bos_token_id"), len(tokens)), "eos": _id_or_none(of("eos_token_id"), len(tokens))}
    types = of("token_type") or [1] * len(tokens)
    types = [CONTROL if t == USER_DEFINED and MARKER.fullmatch(s) else t for s, t in zip(tokens, types, strict=False)]
    try:
        if kind == "llama":
            scores = of("scores") or [0.0] * len(tokens)
            model = _sentencepiece_model(tokens, scores, types, of("add_space_prefix", True))
            return SentencePieceTokenizer(str(file), model, **ends)
        return HuggingFaceTokenizer(str(file), _byte_pairs(file, tokens, of("merges") or [], types, of("pre")), **ends)
    except UserError:
        raise
    except Exception as error:  # neither library raises anything narrower
        reason = f"{type(error).__name__}: {error}"[:120]
        raise UserError(f"the tokenizer in {file} is damaged ({reason}): fetch it again") from error


def _byte_pairs(file: Path, tokens: list[str], merges: list[str], types: list[int], cut: str | None):
    """The `tokenizers.Tokenizer` of a GGUF's tokens, merges and llama.cpp's name for the way it cuts texts."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    how = GGUF_CUTS.get(cut)
    if how is None:
        raise UserError(
            f"{file} cuts texts by tokenizer.ggml.pre={cut!r}; known are {', '.join(sorted(GGUF_CUTS))}: "
            "take the model's tokenizer.json"
        )
    id_of = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(id_of, pairs, ignore_merges=how == "llama3"))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=how != "llama3")
    before = {
        "gpt2": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
        "llama3": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
    }[how]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    of_type = lambda *kinds: [AddedToken(s, normalized=False) for s, t in zip(tokens, types, strict=True) if t in kinds]
    tokenizer.add_special_tokens(of_type(CONTROL, UNKNOWN))
    tokenizer.add_tokens(of_type(USER_DEFINED))
    return tokenizer


def _sentencepiece_model(tokens: list[str], scores: list[float], types: list[int], dummy_space: bool) -> bytes:
    """SentencePiece's ModelProto, written by hand: its Python module for that would need protobuf."""
    unknown = types.index(UNKNOWN)
    pieces = [
        _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    all_bytes = {f"<0x{b:02X}>" for b in range(256)} <= set(tokens)
    pairs_by_score = 2  # trainer_spec.model_type
    trainer = (
        _field(3, pairs_by_score)
        + _field(35, int(all_bytes))
        + _field(40, unknown)
        + _field(45, tokens[unknown].encode())
    )
    normalizer = _field(1, b"identity") + _field(3, int(dummy_space)) + _field(4, 0) + _field(5, 1)  # no spaces tidied
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field in protobuf's wire format: a varint, a float or what has a length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + np.float32(value).tobytes()
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def neox_tokenizer(vocab_path: str | None = None, download: bool = True) -> HuggingFaceTokenizer:
    """GPT-NeoX-20B's, which is Mamba's, Pythia's and RWKV-4 Pile's: from `vocab_path`, else found here, else fetched."""
    if vocab_path is not None:
        path = Path(vocab_path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"data.vocab_path={path} must be GPT-NeoX's tokenizer.json or a folder that holds it")
        return _neox(file)
    own = cache_dir() / "neox" / "tokenizer.json"
    for file in (*sorted(_hub_cache().glob("models--EleutherAI--gpt-neox-20b/snapshots/*/tokenizer.json")), own):
        if file.is_file():
            return _neox(file)
    if not download:
        raise UserError(NO_NEOX.format(reason="and data.download=False"))
    try:
        return _neox(fetch(NEOX_URL, own, is_whole=_is_neox))
    except UserError as error:
        raise UserError(NO_NEOX.format(reason=error)) from error


def _hub_cache() -> Path:
    """Where Hugging Face's own programs keep what they downloaded."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _neox(file: Path) -> HuggingFaceTokenizer:
    wrong = f"replace it with {NEOX_URL}, or set data.vocab_path to another one"
    try:
        tokenizer = _from_json(file, "neox")
    except UserError as error:
        raise UserError(f"{error}; {wrong}") from error
    if tokenizer.vocab_size > NEOX_IDS or tokenizer.special(NEOX_EOT) != 0:
        raise UserError(
            f"{file} is not GPT-NeoX's vocabulary: it has {tokenizer.vocab_size:,} ids (at most {NEOX_IDS:,}) and "
            f"{NEOX_EOT} is {tokenizer.special(NEOX_EOT)} (it should be 0); {wrong}"
        )
    tokenizer.bos = tokenizer.eos = tokenizer.eot = 0
    return tokenizer


def _is_neox(file: Path) -> bool:
    try:
        return bool(_neox(file))
    except UserError:
        return False
