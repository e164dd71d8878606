"""Token files: nanoGPT's train.bin, val.bin and meta.pkl, and llm.c's shards. Read as memory maps, checked at the door.

nanoGPT `3adf61e`: bare little-endian uint16 tokens; meta.pkl, for character sets, is a dict of vocab_size, stoi, itos.
llm.c `f1e2ace`: 256 int32 of header (magic 20240520, version 1, number of tokens, zeros), then the uint16 tokens.
"""

import glob
import os
import pickle
import re
from pathlib import Path

import numpy as np

from jaxvram.data.tokenizers import CharTokenizer
from jaxvram.errors import UserError

MAGIC, VERSION = 20240520, 1
LLAMA_MAGIC = 20240801  # llm.c's uint32 shards of Llama-3 tokens
HEADER_BYTES = 256 * 4
TOKEN = np.dtype("<u2")
_VAL = re.compile(r"(?<![a-z])val", re.IGNORECASE)
MAX_META_BYTES = 1 << 24  # 65,536 characters need 2 MB


def read_shard(file: Path) -> np.ndarray:
    """The tokens of one llm.c shard, uint16 (N,), as a memory map."""
    size = file.stat().st_size
    header = np.fromfile(file, "<i4", 256)
    if len(header) < 3 or header[0] != MAGIC:
        what = (
            "Llama-3 tokens, which no tokenizer here reads"
            if len(header) and header[0] == LLAMA_MAGIC
            else "something else"
        )
        raise UserError(
            f"{file} is not an llm.c shard of GPT-2 tokens (magic {MAGIC}), but {what}; for nanoGPT's train.bin and "
            "val.bin give their folder, and make shards from text with --mode=prepare"
        )
    if header[1] != VERSION:
        raise UserError(
            f"{file} is an llm.c shard of version {header[1]}; only version {VERSION} (uint16 tokens) is known"
        )
    count = int(header[2])
    if size != (expected := HEADER_BYTES + TOKEN.itemsize * count):
        raise UserError(
            f"{file} is truncated or damaged: {size:,} bytes, but {count:,} tokens need {expected:,}; fetch it again"
        )
    return _map(file, HEADER_BYTES, count)


def write_shard(file: Path, tokens_N: np.ndarray):
    """One llm.c shard, whole or not at all."""
    with TokenWriter(file) as writer:
        writer.append(tokens_N)


class TokenWriter:
    """Appends tokens to FILE.part; leaving the `with` block without an exception makes it FILE.

    With llm.c's header, or bare as nanoGPT has it.
    """

    def __init__(self, file: Path, header: bool = True):
        self.file, self.part = file, file.with_name(file.name + ".part")
        self.header, self.count = header, 0

    def __enter__(self):
        self._out = open(self.part, "wb")
        self._out.write(bytes(HEADER_BYTES if self.header else 0))
        return self

    def append(self, tokens_N: np.ndarray):
        self._out.write(np.asarray(tokens_N, TOKEN).tobytes())
        self.count += len(tokens_N)

    def __exit__(self, kind, *_):
        if kind is not None:
            self._out.close()
            self.part.unlink()
            return
        if self.header:
            header = np.zeros(256, "<i4")
            header[:3] = MAGIC, VERSION, self.count
            self._out.seek(0)
            self._out.write(header.tobytes())
        _publish(self._out, self.part, self.file)


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
        tokens.append(_map(file, 0, size // TOKEN.itemsize))
    meta = folder / "meta.pkl"
    return tokens[0], tokens[1], read_meta(meta) if meta.is_file() else None


def write_nanogpt_meta(file: Path, chars: str):
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as out:
        pickle.dump(meta, out)
        _publish(out, part, file)


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


def _map(file: Path, offset: int, count: int) -> np.ndarray:
    if count == 0:  # mmap refuses an empty range
        return np.zeros(0, TOKEN)
    # a plain view: slicing the memmap subclass costs microseconds for nothing
    return np.memmap(file, TOKEN, "r", offset, (count,)).view(np.ndarray)


def _publish(out, part: Path, file: Path):
    """Close the written `part` and give it its name: after a crash there is the whole file or none."""
    out.flush()
    os.fsync(out.fileno())
    out.close()
    os.replace(part, file)
