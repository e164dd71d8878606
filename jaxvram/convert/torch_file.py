"""PyTorch's own file of tensors (`torch.save` of a dict), read without PyTorch and without running anything in it."""

import collections
import math
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np

from jaxvram.errors import UserError

DTYPES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


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
