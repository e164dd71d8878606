"""PyTorch's own file of tensors (`torch.save` of a dict), read and written without PyTorch, running nothing that is in it.

It is a zip file of one folder: data.pkl, a pickled dict in which a tensor is a call with a reference to a storage, its shape
and strides; and data/0, data/1, ..., the storages as they lie in memory.
"""

import collections
import math
import os
import pathlib
import pickle
import struct
import tempfile
import zipfile

import ml_dtypes
import numpy as np

from jaxvram.errors import UserError

DTYPES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip

MARK = "exported_by"  # a file in the zip: one that an export may replace; PyTorch does not look for it
ALIGNMENT = 64  # of a storage in the file, as PyTorch has it: torch.load(mmap=True) uses it where it lies


def read(file) -> dict[str, np.ndarray]:
    """Name -> array, in the dtype that is stored.

    Raises:
      UserError: there is no such file, it is damaged, in PyTorch's format from before 1.6, or holds more than tensors.
    """
    path = pathlib.Path(file).expanduser()
    try:
        with zipfile.ZipFile(path) as archive:
            index = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(index) as pickled:
                tensors = _Unpickler(pickled, archive, index.removesuffix("data.pkl")).load()
    except FileNotFoundError as error:
        raise UserError(f"init_from={file}: there is no such file") from error
    except _NotATensor as error:
        raise UserError(f"{path} holds more than tensors ({error}), and is not read: that could run any program") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is damaged, or no file of torch.save: {error or type(error).__name__}") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, np.ndarray) for x in tensors.values()):
        raise UserError(f"{path} is no dict of tensors")
    return tensors


class _NotATensor(pickle.UnpicklingError):
    pass


class _Unpickler(pickle.Unpickler):
    """Knows dicts, and how PyTorch writes a tensor down; calls nothing else."""

    def __init__(self, pickled, archive: zipfile.ZipFile, prefix: str):
        super().__init__(pickled)
        self._archive, self._prefix, self._storages = archive, prefix, {}

    def find_class(self, module, name):
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if (module, name) not in known:
            raise _NotATensor(f"it asks for {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._archive.read(f"{self._prefix}data/{key}"), dtype)
        return self._storages[key]


def _tensor(storage, offset, shape, strides, *_):
    """Elements lie `strides` apart in what is stored."""
    end = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (end > storage.size or min((0, offset, *strides)) < 0):
        raise ValueError("a tensor reaches beyond what is stored")
    bytes_apart = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_apart, writeable=False)


def write(file, tensors: dict[str, np.ndarray]) -> None:
    """A file that torch.load(weights_only=True) reads, as a dict of contiguous tensors on the CPU, in their order.

    It takes its name when it is complete. Of the tensors one at a time is copied in memory.

    Raises:
      UserError: there is a file that is no earlier export, or the disk is full.
    """
    path = pathlib.Path(file).expanduser()
    if path.exists() and not _is_ours(path):
        raise UserError(f"{path} is there and no export of jaxvram; give a new name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write beside {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            add = lambda name, content: _store(archive, f"{path.stem}/{name}", content)
            add("data.pkl", _pickled(tensors))
            add("byteorder", b"little")
            for i, tensor in enumerate(tensors.values()):
                add(f"data/{i}", np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            add("version", b"3\n")
            add(MARK, b"jaxvram")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; nothing was changed there") from error
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def _is_ours(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{MARK}") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _store(archive: zipfile.ZipFile, name: str, content) -> None:
    """With padding before it, in a field of the header that readers pass over, so that it begins at a multiple."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = len(content)
    is_large = entry.file_size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule: then the header has 20 bytes more
    begins = archive.fp.tell() + 30 + len(name.encode()) + 4 + 20 * is_large
    padding = -begins % ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(entry, "w") as out:
        out.write(content)


def _pickled(tensors: dict[str, np.ndarray]) -> bytes:
    """A dict of tensors in protocol 2, as `torch.save` writes it down; see `_Unpickler`."""
    storage_of = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    parts = [b"\x80\x02}("]
    for i, (name, tensor) in enumerate(tensors.items()):
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
        dtype, hooks = _name("torch", storage_of[tensor.dtype]), _name("collections", "OrderedDict") + b")R"
        storage = _tuple([_text("storage"), dtype, _text(str(i)), _text("cpu"), _int(tensor.size)]) + b"Q"
        arguments = [storage, _int(0), _tuple(map(_int, tensor.shape)), _tuple(map(_int, strides)), b"\x89", hooks]
        parts += [_text(name), _name("torch._utils", "_rebuild_tensor_v2"), _tuple(arguments), b"R"]
    return b"".join([*parts, b"u."])


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _int(number: int) -> bytes:
    """One that is not negative."""
    if number < 2**31:
        return b"J" + struct.pack("<i", number)
    size = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little")


def _tuple(parts) -> bytes:
    return b"(" + b"".join(parts) + b"t"
