"""What a GGUF file (versions 2 and 3, little-endian) says before its tensors: keys with values, and where each tensor lies.

`gguf.GGUFReader` makes several NumPy views of every token: seconds for a vocabulary that is read here in tenths.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxvram.errors import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class Tensor(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]  # NumPy's order: the last axis is contiguous
    kind: int  # ggml's number of its format
    offset: int  # from the start of the file


def read_metadata(file: Path) -> dict:
    """{key: number, bool, str or list of them} of all that `file` says of itself.

    Raises:
      UserError: it cannot be read, is truncated or damaged, or is no GGUF file.
    """
    return _read(file, lambda f, size, tensors, metadata: metadata)


def read_header(file: Path) -> tuple[dict, dict[str, Tensor]]:
    """What `read_metadata` gives, and {name: Tensor}. Raises as it does."""
    return _read(file, lambda f, size, tensors, metadata: (metadata, _tensors(f, size, tensors, metadata)))


def _read(file: Path, rest):
    """What `rest` makes of the open file, its size, the number of tensors, and the metadata."""
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if f.read(4) != MAGIC:
                raise ValueError("it does not begin with 'GGUF'")
            if (version := _number(f, "<I")) not in VERSIONS:
                raise ValueError(f"version {version} is not one of {VERSIONS}")
            tensors, pairs = _number(f, "<Q"), _number(f, "<Q")
            return rest(f, size, tensors, {_string(f, size): _value(f, _number(f, "<I"), size) for _ in range(pairs)})
    except OSError as error:
        raise UserError(f"could not read {file}: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{file} is truncated, damaged or not a GGUF file ({error}): fetch it again") from error


def _tensors(f: BinaryIO, size: int, count: int, metadata: dict) -> dict[str, Tensor]:
    found = {}
    for _ in range(count):
        name = _string(f, size)
        shape = tuple(_number(f, "<Q") for _ in range(_number(f, "<I")))[::-1]
        found[name] = Tensor(shape, _number(f, "<I"), _number(f, "<Q"))
    alignment = metadata.get("general.alignment", 32)
    start = -(-f.tell() // alignment) * alignment
    return {name: tensor._replace(offset=start + tensor.offset) for name, tensor in found.items()}


def _number(f: BinaryIO, form: str) -> int:
    return struct.unpack(form, f.read(struct.calcsize(form)))[0]


def _bytes(f: BinaryIO, count: int, size: int) -> bytes:
    if count > size - f.tell():  # before a damaged length asks for all of the memory
        raise ValueError(f"it ends at byte {size:,}, in the middle of a value")
    return f.read(count)


def _string(f: BinaryIO, size: int) -> str:
    return _bytes(f, _number(f, "<Q"), size).decode("utf-8")


def _value(f: BinaryIO, kind: int, size: int):
    if kind == STRING:
        return _string(f, size)
    if kind == ARRAY:
        of, count = _number(f, "<I"), _number(f, "<Q")
        if of in NUMBERS:
            dtype = np.dtype(NUMBERS[of])
            return np.frombuffer(_bytes(f, count * dtype.itemsize, size), dtype).tolist()
        return [_value(f, of, size) for _ in range(count)]
    if kind not in NUMBERS:
        raise ValueError(f"a value of the unknown kind {kind}")
    dtype = np.dtype(NUMBERS[kind])
    return np.frombuffer(_bytes(f, dtype.itemsize, size), dtype)[0].item()
