"""A folder in Hugging Face's layout: config.json beside model.safetensors, or beside shards and their index."""

import json
import os
import pathlib
import shutil
import tempfile

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors asks for by name
import numpy as np
import safetensors
import safetensors.numpy

from jaxvram.errors import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
OURS = "exported_by"  # in config.json: a folder that an export may replace


class HuggingFaceFolder:
    """Reads the config at once and tensors one at a time, so that a model never lies in memory twice.

    Raises (constructor and `tensor`):
      UserError: a file is missing, is damaged, or does not hold the tensor asked for.
    """

    def __init__(self, folder, model_type: str):
        self.path = pathlib.Path(folder).expanduser()
        if not self.path.is_dir():
            raise UserError(f"init_from={folder}: there is no such folder; give one with {CONFIG} and {WEIGHTS}")
        self.config = self._json(CONFIG)
        if (found := self.config.get("model_type")) != model_type:
            raise UserError(f"{self.path / CONFIG} is of a {found!r} model; this recipe's model is {model_type!r}")
        self._files = {}
        self._file_of = self._tensor_names()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of that name, which must have that shape."""
        if name not in self._file_of:
            raise UserError(f"{self.path} has no tensor {name!r}: it is incomplete, or another kind of model")
        file = self.path / self._file_of[name]
        try:
            found = tuple(self._open(file).get_slice(name).get_shape())
            if found != shape:
                raise UserError(f"{file}: {name} has shape {found}; {CONFIG} beside it means {shape}")
            return self._open(file).get_tensor(name)
        except safetensors.SafetensorError as error:  # an index that points to the wrong shard
            raise UserError(f"{file} does not give {name!r}: {error}") from error

    def _tensor_names(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self.path / WEIGHTS).is_file():
            return dict.fromkeys(self._open(self.path / WEIGHTS).keys(), WEIGHTS)
        if (self.path / INDEX).is_file():
            file_of = self._json(INDEX).get("weight_map")
            if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
                raise UserError(f"{self.path / INDEX} is damaged: it has no weight_map; download it again")
            return file_of
        if any((self.path / name).exists() for name in PICKLED):
            raise UserError(
                f"{self.path} holds pickled weights only (pytorch_model.bin); save them as safetensors: load the model "
                f"with transformers and call save_pretrained, or download {WEIGHTS}"
            )
        raise UserError(f"{self.path} has no {WEIGHTS} and no {INDEX}")

    def _open(self, file: pathlib.Path):
        if file not in self._files:
            if not file.is_file():
                raise UserError(f"{file} is missing though {INDEX} names it; download it again")
            try:
                self._files[file] = safetensors.safe_open(file, framework="numpy")
            except safetensors.SafetensorError as error:
                raise UserError(f"{file} is damaged or cut short ({error}); download it again") from error
        return self._files[file]

    def _json(self, name: str) -> dict:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} has no {name}: it is no Hugging Face model folder") from error
        except ValueError as error:
            raise UserError(f"{self.path / name} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name} is damaged: it must be a JSON object")
        return content


def write_folder(folder, config: dict, tensors: dict[str, np.ndarray]) -> None:
    """config.json and model.safetensors, in a temporary folder that takes its name when it is complete.

    Raises:
      UserError: `folder` holds something that is not an export of ours, or the disk is full.
    """
    target = pathlib.Path(folder).expanduser()
    _check_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write beside {target}: {error.strerror}") from error
    try:
        # save_file writes the memory of an array as it lies: a transposed view would be stored wrongly, without a word
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps({**config, OURS: "jaxvram"}, indent=2) + "\n", encoding="utf-8")
        _share(temporary)
        _put_in_place(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}; nothing was changed there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(target: pathlib.Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a new folder")
    if not target.is_dir() or not (held := {path.name for path in target.iterdir()}):
        return
    try:
        ours = OURS in json.loads((target / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ours = False
    if not ours or held - {CONFIG, WEIGHTS}:
        raise UserError(f"{target} is not empty and not (only) an export of jaxvram; give a new folder")


def _put_in_place(temporary: pathlib.Path, target: pathlib.Path) -> None:
    if not (target / CONFIG).exists():
        temporary.rename(target)  # onto an empty folder, or nothing
        return
    old = temporary.with_name(temporary.name + "-old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _share(folder: pathlib.Path) -> None:
    """The permissions that ordinary files would have; mkdtemp and safetensors let nobody else read."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
