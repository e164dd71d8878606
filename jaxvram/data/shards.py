"""Token files: nanoGPT's train.bin, val.bin and meta.pkl, and llm.c's shards. Read as memory maps, checked at the door.

nanoGPT `3adf61e`: bare little-endian uint16 tokens; meta.pkl, for character sets, is a dict of vocab_size, stoi, itos.
llm.c `f1e2ace`: 256 int32 of header (magic 20240520, version 1, number of tokens, zeros), then the uint16 tokens; for
vocabularies beyond 65,536 ids, such as Llama 3's, magic 20240801, version 7 and uint32 tokens.
"""

import glob
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np

from jaxvram.data.tokenizers import CharTokenizer, GPT2Tokenizer
from jaxvram.errors import UserError

HEADER_BYTES = 256 * 4
TOKEN, WIDE_TOKEN = np.dtype("<u2"), np.dtype("<u4")
KINDS = {TOKEN: (20240520, 1), WIDE_TOKEN: (20240801, 7)}  # magic, version
PROGRESS = "prepare.json"  # what --mode=prepare was asked for, beside its files
_VAL = re.compile(r"(?<![a-z])val", re.IGNORECASE)
MAX_META_BYTES = 1 << 24  # 65,536 characters need 2 MB


def token_dtype(vocab_size: int) -> np.dtype:
    """What a token of the vocabulary takes in a file, and in memory before it is part of a batch."""
    return TOKEN if vocab_size <= 1 << 16 else WIDE_TOKEN


def read_shard(file: Path) -> np.ndarray:
    """The tokens of one llm.c shard, uint16 or uint32 (N,), as a memory map."""
    size = file.stat().st_size
    header = np.fromfile(file, "<i4", 256)
    kinds = {magic: (dtype, version) for dtype, (magic, version) in KINDS.items()}
    if len(header) < 3 or header[0] not in kinds:
        raise UserError(
            f"{file} is not an llm.c shard (magic {' or '.join(map(str, kinds))}); for nanoGPT's train.bin and "
            "val.bin give their folder, and make shards from text with --mode=prepare"
        )
    dtype, version = kinds[header[0]]
    if header[1] != version:
        raise UserError(
            f"{file} is an llm.c shard of version {header[1]}; only version {version} of its kind ({dtype.name} tokens, "
            f"as for {'GPT-2' if dtype == TOKEN else 'Llama-3'}) is known"
        )
    count = int(header[2])
    if size != (expected := HEADER_BYTES + dtype.itemsize * count):
        raise UserError(
            f"{file} is truncated or damaged: {size:,} bytes, but {count:,} tokens need {expected:,}; fetch it again"
        )
    return map_tokens(file, HEADER_BYTES, count, dtype)


def write_shard(file: Path, tokens_N: np.ndarray):
    """One llm.c shard, whole or not at all."""
    with TokenWriter(file) as writer:
        writer.append(tokens_N)


class TokenWriter:
    """Appends tokens to FILE.part; leaving the `with` block without an exception makes it FILE.

    With llm.c's header, or bare as nanoGPT has it.
    """

    def __init__(self, file: Path, header: bool = True, dtype: np.dtype = TOKEN):
        self.file, self.part = file, file.with_name(file.name + ".part")
        self.header, self.dtype, self.count = header, dtype, 0

    def __enter__(self):
        self._out = open(self.part, "wb")
        self._out.write(bytes(HEADER_BYTES if self.header else 0))
        return self

    def append(self, tokens_N: np.ndarray):
        self._out.write(np.asarray(tokens_N, self.dtype).tobytes())
        self.count += len(tokens_N)

    def __exit__(self, kind, *_):
        if kind is not None:
            self._out.close()
            self.part.unlink()
            return
        if self.header:
            header = np.zeros(256, "<i4")
            header[:3] = *KINDS[self.dtype], self.count
            self._out.seek(0)
            self._out.write(header.tobytes())
        publish(self._out, self.part, self.file)


def check_vocabulary(folder: Path, arrays: list[np.ndarray], tokenizer):
    """Raises a UserError if the token files in `folder` cannot be, or are not said to be, ids of `tokenizer`."""
    dtype = token_dtype(tokenizer.vocab_size)
    if other := next((a.dtype for a in arrays if a.dtype != dtype), None):
        raise UserError(
            f"{folder} holds {other.name} tokens, but the {tokenizer.vocab_size:,} ids of {tokenizer.name} are kept as "
            f"{dtype.name}: the files were made with another tokenizer; set data.tokenizer and data.vocab_path"
        )
    check_prepared(folder, tokenizer)


def check_prepared(folder: Path, tokenizer):
    """Raises a UserError if --mode=prepare made the files in `folder`, with another tokenizer."""
    try:
        request = json.loads((folder / PROGRESS).read_text())["request"]
        made, how = request.get("vocabulary", GPT2Tokenizer.identity), request["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # nobody has said
    if made != tokenizer.identity:
        raise UserError(
            f"{folder} was prepared with --tokenizer={how} ({made}), but data.tokenizer is {tokenizer.name} "
            f"({tokenizer.identity}): set data.tokenizer={how} and the data.vocab_path that was used"
        )


def find_shards(path: str) -> tuple[list[Path], list[Path]]:
    """(train files, val files) of a shard, a folder of shards or a glob; a val shard has a word `val...` in its name."""
    pattern = path
    if Path(path).exists():  # then brackets and stars are part of its name
        pattern = glob.escape(path) if Path(path).is_file() else os.path.join(glob.escape(path), "*.bin")
    files = sorted(Path(name) for name in glob.glob(pattern))
    if not files:
        raise UserError(f"no shard matches data.path={path}")
    if Path(path).is_file():  # has to be both
        return files, []
    val = [file for file in files if _VAL.search(file.name)]
    return [file for file in files if file not in val], val


def read_nanogpt(folder: Path) -> tuple[np.ndarray, np.ndarray, CharTokenizer | None]:
    """(train tokens, val tokens, the tokenizer of meta.pkl or None) of a folder that nanoGPT's prepare.py made."""
    tokens = []
    for file in (folder / "train.bin", folder / "val.bin"):
        if not file.is_file():
            raise UserError(f"{file} is missing: a nanoGPT folder has train.bin and val.bin")
        size = file.stat().st_size
        if size % TOKEN.itemsize:
            raise UserError(
                f"{file} is truncated: {size:,} bytes are not a whole number of 2-byte tokens; fetch it again"
            )
        if size == 0:
            raise UserError(f"{file} is empty: prepare it again")
        tokens.append(map_tokens(file, 0, size // TOKEN.itemsize, TOKEN))
    meta = folder / "meta.pkl"
    return tokens[0], tokens[1], read_meta(meta) if meta.is_file() else None


def write_nanogpt_meta(file: Path, chars: str):
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as out:
        pickle.dump(meta, out)
        publish(out, part, file)


class _PlainUnpickler(pickle.Unpickler):
    """Knows no classes and no functions, so a pickle can build dicts, strings and numbers with it and run nothing."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_meta(file: Path) -> CharTokenizer:
    """The character tokenizer of a meta.pkl, without running any code that the file may carry."""
    try:
        if file.stat().st_size > MAX_META_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes is too large for one")
        with open(file, "rb") as f:
            meta = _PlainUnpickler(f).load()
        itos, stoi, size = meta["itos"], meta["stoi"], meta["vocab_size"]
        chars = [itos[i] for i in range(size)]
        if not all(isinstance(c, str) and len(c) == 1 for c in chars) or stoi != {c: i for i, c in enumerate(chars)}:
            raise ValueError("stoi and itos are not one another's inverse")
        if not chars or len(itos) != size:
            raise ValueError("itos and vocab_size disagree")
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{file} is damaged or is not nanoGPT's meta.pkl ({error}): prepare the data again") from error
    return CharTokenizer("".join(chars))


def map_tokens(file: Path, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
    """`count` tokens from byte `offset` on, as a memory map."""
    if count == 0:  # mmap refuses an empty range
        return np.zeros(0, dtype)
    # a plain view: slicing the memmap subclass costs microseconds for nothing
    return np.memmap(file, dtype, "r", offset, (count,)).view(np.ndarray)


def publish(out, part: Path, file: Path):
    """Close the written `part` and give it its name: after a crash there is the whole file or none."""
    out.flush()
    os.fsync(out.fileno())
    out.close()
    os.replace(part, file)
