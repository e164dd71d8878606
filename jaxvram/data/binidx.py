"""Megatron's MMapIndexedDataset, which RWKV's authors call binidx: FILE.bin of bare tokens, FILE.idx to say what they are.

FILE.idx, little-endian: 9 bytes MMIDIDX 0 0; uint64 version 1; uint8 code of the tokens' type; uint64 documents; uint64
length of the last list; then int32 sizes (tokens), int64 pointers (bytes) and int64 numbers at which documents begin, with
the end. The tokens of all documents lie one behind the other, and training reads them as one text.
"""

import struct
from pathlib import Path

import numpy as np

from jaxvram.data.shards import TokenWriter, map_tokens, publish
from jaxvram.errors import UserError

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEAD = struct.Struct("<9sQBQQ")
CODES = {code: np.dtype(name) for code, name in ((1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))}
OTHER_CODES = {2: "int8", 6: "floating-point", 7: "floating-point"}  # there are, and no tokens are kept so


def prefix_of(path: Path) -> Path | None:
    """FILE of FILE.bin and FILE.idx, given as FILE or either of them; None: it is none of these."""
    for prefix in (path.with_suffix("") if path.suffix in (".bin", ".idx") else path, path):
        if _file(prefix, ".idx").is_file() or (path.suffix == ".idx" and path.is_file()):
            return prefix
    return None


def read_binidx(prefix: Path) -> np.ndarray:
    """All tokens of FILE.bin in a row, (N,), as a memory map in the type that FILE.idx states.

    Raises:
      UserError: one of the two is missing, damaged, or not what the other says.
    """
    data, index = _file(prefix, ".bin"), _file(prefix, ".idx")
    if not data.is_file():
        raise UserError(f"{index} has no {data.name} beside it: both files are needed")
    dtype, sizes_N, pointers_N = _read_index(index)
    size, expected = data.stat().st_size, int(sizes_N.sum()) * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{data} is truncated or damaged, or not {index.name}'s: {size:,} bytes, but the {len(sizes_N):,} documents of "
            f"the index need {expected:,}; fetch both again"
        )
    if (pointers_N != _pointers(sizes_N, dtype)).any():
        raise UserError(f"{index} does not list the documents of {data.name} one behind the other: make the pair again")
    return map_tokens(data, 0, size // dtype.itemsize, dtype)


def _read_index(file: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """(type of the tokens, tokens of each document int64, byte at which it begins)."""
    raw = file.read_bytes()
    if not raw.startswith(MAGIC):
        raise UserError(f"{file} is not the index of a binidx pair (it begins with {raw[:9]!r}, not {MAGIC!r})")
    if len(raw) < HEAD.size:
        raise UserError(f"{file} is truncated: {len(raw)} bytes, its head has {HEAD.size}; fetch it again")
    _, version, code, documents, starts = HEAD.unpack_from(raw)
    if version != VERSION:
        raise UserError(f"{file} is of version {version}; only version {VERSION} is known")
    if code not in CODES:
        what = OTHER_CODES.get(code, "an unknown type")
        known = ", ".join(f"{c} {dtype.name}" for c, dtype in CODES.items())
        raise UserError(f"{file} states numbers of code {code} ({what}), which are no tokens; known: {known}")
    expected = HEAD.size + 12 * documents + 8 * starts
    if len(raw) != expected:
        raise UserError(
            f"{file} is truncated or damaged: {len(raw):,} bytes, but {documents:,} documents need {expected:,}; "
            "fetch it again"
        )
    sizes_N = np.frombuffer(raw, "<i4", documents, HEAD.size)
    if documents == 0 or sizes_N.min() < 0:
        raise UserError(f"{file} is damaged or empty: it lists {documents} documents")
    return CODES[code], sizes_N.astype(np.int64), np.frombuffer(raw, "<i8", documents, HEAD.size + 4 * documents)


class BinidxWriter:
    """Appends tokens and ends documents; leaving the `with` block without an exception makes FILE.bin and FILE.idx."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix, self.dtype, self.sizes = prefix, np.dtype("<i4") if dtype == np.dtype("<u4") else dtype, []
        self._data = TokenWriter(_file(prefix, ".bin"), header=False, dtype=self.dtype)

    def __enter__(self):
        self._data.__enter__()
        self._begun = 0
        return self

    def append(self, tokens_N: np.ndarray):
        self._data.append(tokens_N)

    def end_document(self):
        self.sizes.append(self._data.count - self._begun)
        self._begun = self._data.count

    def __exit__(self, kind, *rest):
        self._data.__exit__(kind, *rest)
        if kind is None:
            _write_index(_file(self.prefix, ".idx"), np.array(self.sizes, np.int64), self.dtype)


def _write_index(file: Path, sizes_N: np.ndarray, dtype: np.dtype):
    if sizes_N.max(initial=0) >= 1 << 31:
        raise UserError("a document has 2^31 tokens or more, which binidx cannot say: cut it into several files")
    code = next(code for code, known in CODES.items() if known == dtype)
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as out:
        out.write(HEAD.pack(MAGIC, VERSION, code, len(sizes_N), len(sizes_N) + 1))
        out.write(sizes_N.astype("<i4").tobytes())
        out.write(_pointers(sizes_N, dtype).astype("<i8").tobytes())
        out.write(np.arange(len(sizes_N) + 1, dtype="<i8").tobytes())
        publish(out, part, file)


def _pointers(sizes_N: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return (np.cumsum(sizes_N) - sizes_N) * dtype.itemsize


def _file(prefix: Path, suffix: str) -> Path:
    """A name may have dots of its own."""
    return prefix.with_name(prefix.name + suffix)
