"""Files of torch.save, read without executing what they say, and written."""

import collections
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxvram.convert import torch_file
from jaxvram.errors import UserError


class _Storage:
    """Pickled as PyTorch writes a reference to one."""

    def __init__(self, dtype: str, key: str, size: int):
        self.pid = ("storage", _Named("torch", dtype), key, "cpu", size)


class _Named:
    """A name of another module, which need not be there."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class _Pickler(pickle._Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, _Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Named):
            return self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        if isinstance(obj, _Call):
            self.save(obj.function)
            self.save(obj.arguments)
            return self.write(pickle.REDUCE)
        return super().save(obj, save_persistent_id)


def tensor(dtype, key, offset, shape, strides, size):
    arguments = (_Storage(dtype, key, size), offset, shape, strides, False, collections.OrderedDict())
    return _Call(_Named("torch._utils", "_rebuild_tensor_v2"), *arguments)


def written(path, content, storages):
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("model/data.pkl", "w") as file:
            _Pickler(file, protocol=2).dump(content)
        for key, array in storages.items():
            archive.writestr(f"model/data/{key}", array.tobytes())
    return path


NUMBERS = np.arange(6, dtype=np.float32)


def test_tensors_come_as_they_are_stored(tmp_path):
    """Transposed, a part of a storage that two share, bf16, and without elements."""
    content = {
        "transposed": tensor("FloatStorage", "0", 0, (3, 2), (1, 3), 6),
        "tail": tensor("FloatStorage", "0", 4, (2,), (1,), 6),
        "half": tensor("BFloat16Storage", "1", 0, (2,), (1,), 2),
        "empty": tensor("FloatStorage", "0", 0, (0, 4), (4, 1), 6),
    }
    half = np.array([1.5, -2], ml_dtypes.bfloat16)
    found = torch_file.read(written(tmp_path / "model.pth", content, {"0": NUMBERS, "1": half}))
    np.testing.assert_array_equal(found["transposed"], NUMBERS.reshape(2, 3).T)
    np.testing.assert_array_equal(found["tail"], [4, 5])
    assert found["half"].dtype == ml_dtypes.bfloat16 and list(found["half"]) == [1.5, -2]
    assert found["empty"].shape == (0, 4)


def test_what_torch_saves_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    saved = {"whole": whole, "part": whole[1:3, ::2], "half": whole.bfloat16(), "trained": torch.nn.Parameter(whole.T)}
    torch.save(saved, tmp_path / "model.pth")
    found = torch_file.read(tmp_path / "model.pth")
    assert found.keys() == saved.keys()
    for name, x in saved.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), x.detach().float().numpy())


@pytest.mark.parametrize("function", [_Named("posix", "system"), _Named("builtins", "eval")], ids=["system", "eval"])
def test_no_program_in_a_file_is_run(tmp_path, function):
    mark = tmp_path / "mark"
    argument = f"touch {mark}" if function.name == "system" else f"__import__('pathlib').Path({str(mark)!r}).touch()"
    path = written(tmp_path / "model.pth", {"x": _Call(function, argument)}, {})
    with pytest.raises(UserError, match=f"more than tensors .it asks for {function.module}.{function.name}"):
        torch_file.read(path)
    assert not mark.exists()
    with zipfile.ZipFile(path) as archive:  # which is one that would run, were it unpickled
        pickle.loads(archive.read("model/data.pkl"))
    assert mark.exists()


def test_damaged_files_are_told(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        torch_file.read(tmp_path / "none.pth")
    path = written(tmp_path / "model.pth", {"x": tensor("FloatStorage", "0", 0, (6,), (1,), 6)}, {"0": NUMBERS})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged, or no file of"):
        torch_file.read(path)
    path.write_text("weights")
    with pytest.raises(UserError, match="is damaged, or no file of"):
        torch_file.read(path)


BEYOND = {"long": (0, (7,), (1,)), "strides": (3, (2, 2), (3, 1)), "before": (-1, (2,), (1,)), "back": (0, (2,), (-1,))}


@pytest.mark.parametrize("reach", BEYOND.values(), ids=BEYOND)
def test_no_tensor_reaches_beyond_its_storage(tmp_path, reach):
    path = written(tmp_path / "model.pth", {"x": tensor("FloatStorage", "0", *reach, 6)}, {"0": NUMBERS})
    with pytest.raises(UserError, match="beyond what is stored"):
        torch_file.read(path)


def test_only_a_dict_of_tensors_will_do(tmp_path):
    for content in ([1, 2], {"x": 1}):
        with pytest.raises(UserError, match="no dict of tensors"):
            torch_file.read(written(tmp_path / f"{os.urandom(4).hex()}.pth", content, {}))


TENSORS = {
    "matrix": NUMBERS.reshape(2, 3), "turned": NUMBERS.reshape(2, 3).T, "half": NUMBERS.astype(ml_dtypes.bfloat16),
    "number": np.array(3.5, np.float32), "none": np.zeros((0, 3), np.float32), "whole": np.arange(3),
    "\u00e9": np.ones((1, 1, 2), np.float16),
}  # fmt: skip


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    """Also with the larger headers of files beyond 2 GB, and in the place of an earlier export."""
    for limit in (zipfile.ZIP64_LIMIT, 8):
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        torch_file.write(tmp_path / "new" / "model.pth", TENSORS)
        found = torch_file.read(tmp_path / "new" / "model.pth")
        assert list(found) == list(TENSORS)
        for name, x in TENSORS.items():
            np.testing.assert_array_equal(found[name], x, strict=True)
        raw = (tmp_path / "new" / "model.pth").read_bytes()
        for entry in zipfile.ZipFile(tmp_path / "new" / "model.pth").infolist():
            lengths = struct.unpack_from("<HH", raw, entry.header_offset + 26)  # of the name, and of what follows it
            assert entry.compress_type == zipfile.ZIP_STORED and (entry.header_offset + 30 + sum(lengths)) % 64 == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.pth"]


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written(tmp_path, mmap):
    torch = pytest.importorskip("torch")
    torch_file.write(tmp_path / "model.pth", TENSORS)
    found = torch.load(tmp_path / "model.pth", weights_only=True, mmap=mmap)
    assert list(found) == list(TENSORS)
    for name, x in TENSORS.items():
        assert found[name].is_contiguous() and str(found[name].dtype) == f"torch.{x.dtype}"
        np.testing.assert_array_equal(found[name].float().numpy(), x.astype(np.float32), strict=True)
        assert found[name].data_ptr() % 64 == 0


def test_a_file_that_is_not_ours_is_kept(tmp_path):
    path = written(tmp_path / "model.pth", {"x": tensor("FloatStorage", "0", 0, (6,), (1,), 6)}, {"0": NUMBERS})
    before = path.read_bytes()
    for there in (path, tmp_path):
        with pytest.raises(UserError, match="is there and no export of jaxvram; give a new name"):
            torch_file.write(there, TENSORS)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="cannot write beside"):
        torch_file.write(path / "model.pth", TENSORS)


def test_a_large_number_is_pickled():
    assert [pickle.loads(b"\x80\x02" + torch_file._int(n) + b".") for n in (0, 2**31 - 1, 2**31, 2**40, 255 << 32)] == [
        0, 2**31 - 1, 2**31, 2**40, 255 << 32
    ]  # fmt: skip
