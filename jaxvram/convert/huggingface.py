"""A folder in Hugging Face's layout: config.json beside weights as safetensors, or beside shards and their index."""

import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import tempfile
from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors asks for by name
import numpy as np
import safetensors
import safetensors.numpy

from jaxvram.errors import UserError

CONFIG = "config.json"
LISTED = 10  # names in a message
SHARD_BYTES = 5_000_000_000  # of a file of weights that is written
COMPANIONS = (  # of a tokenizer and of sampling; what an export takes over from the weights that a run began from
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
OURS = "exported_by"  # in config.json: a folder that an export may replace


class Layout(NamedTuple):
    """What a library of Hugging Face's calls things."""

    library: str = "transformers"
    kind: str = "model_type"  # which model it is, in config.json
    weights: str = "model.safetensors"
    pickled: str = "pytorch_model.bin"
    mark: str = OURS
    config: str = CONFIG
    marked: str = ""  # the object in it that takes our mark, where a library objects to keys that it does not know

    @property
    def index(self) -> str:
        return f"{self.weights}.index.json"

    def shard(self, number: int, count: int) -> str:
        return self.weights.replace(".", f"-{number:05d}-of-{count:05d}.", 1)

    def is_ours(self, file: str) -> bool:
        """A file that an export writes."""
        stem, end = self.weights.split(".")
        is_shard = re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.{end}", file)
        return bool(is_shard) or file in (self.config, self.weights, self.index, *COMPANIONS)


TRANSFORMERS = Layout()
_STEM = "diffusion_pytorch_model"
# diffusers warns of every key of config.json that it does not know, unless it begins with an underscore
DIFFUSERS = Layout("diffusers", "_class_name", f"{_STEM}.safetensors", f"{_STEM}.bin", f"_{OURS}")
_STEM = "adapter_model"
PEFT = Layout("peft", "peft_type", f"{_STEM}.safetensors", f"{_STEM}.bin", OURS, "adapter_config.json", "auto_mapping")


class HuggingFaceFolder:
    """Reads the config at once and tensors one at a time, so that a model never lies in memory twice.

    `kinds` are the names that the model may go by in config.json, today's first.

    Raises (constructor and methods):
      UserError: a file is missing, is damaged, does not hold the tensor asked for, or is of another model.
    """

    def __init__(self, folder, *kinds: str, layout: Layout = TRANSFORMERS):
        self.path, self.layout = pathlib.Path(folder).expanduser(), layout
        if not self.path.is_dir():
            which = f"{layout.config} and {layout.weights}"
            raise UserError(f"init_from={folder}: there is no such folder; give one with {which}")
        self.config = self._json(layout.config)
        if (found := self.config.get(layout.kind)) not in kinds:
            raise UserError(f"{self.path / self.layout.config} is of a {found!r} model; this recipe's model is {kinds[0]!r}")
        self._files = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self):
        return self._file_of.keys()

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of that name, which must have that shape."""
        if name not in self._file_of:
            raise UserError(f"{self.path} has no tensor {name!r}: it is incomplete, or another kind of model")
        file = self.path / self._file_of[name]
        try:
            found = tuple(self._open(file).get_slice(name).get_shape())
            if found != shape:
                raise UserError(f"{file}: {name} has shape {found}; {self.layout.config} beside it means {shape}")
            return self._open(file).get_tensor(name)
        except safetensors.SafetensorError as error:  # an index that points to the wrong shard
            raise UserError(f"{file} does not give {name!r}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor of that name; () where there is none."""
        return tuple(self._open(self.path / self._file_of[name]).get_slice(name).get_shape()) if name in self else ()

    def some_rows(self, name: str, count: int) -> np.ndarray:
        """That many rows of a tensor, evenly spaced from its first to its last; all where it has no more."""
        if name not in self:
            raise UserError(f"{self.path} has no tensor {name!r}: it is incomplete, or another kind of model")
        found = self._open(self.path / self._file_of[name]).get_slice(name)
        rows = found.get_shape()[0]
        return np.concatenate([found[i : i + 1] for i in sorted({rows * k // count for k in range(count)} | {rows - 1})])

    def read_layers(self, name: str, out_L: np.ndarray, transposed: bool = False) -> None:
        """Fills out_L[i] with the tensor `name.format(i)`, in the dtype of out_L."""
        for i, out in enumerate(out_L):
            tensor = self.tensor(name.format(i), out.T.shape if transposed else out.shape)
            out[...] = tensor.T if transposed else tensor

    def check_sizes(self, config: dict, names) -> None:
        """Every one of `names` is a whole number of at least 1 in `config`."""
        if strange := [name for name in names if type(config[name]) is not int or config[name] < 1]:
            raise UserError(f"{self.path / self.layout.config} is damaged: {strange[0]}={config[strange[0]]!r}")

    def check_fixed(self, config: dict, fixed: dict[str, tuple], model: str) -> None:
        """What `config` says of a key is among the values that ours knows, of which the first is the usual one."""
        for key, values in fixed.items():
            if config.get(key, values[0]) not in values:
                which = f"{key}={config[key]} is no {model} (there: {values[0]})"
                raise UserError(f"{self.path / self.layout.config}: {which}; not supported")

    def check_fields(self, wanted: dict, cfg) -> None:
        """The fields of `cfg` are as the checkpoint has them; the message names the overrides."""
        check_fields(self.path, wanted, cfg)

    @functools.cached_property
    def _file_of(self) -> dict[str, str]:
        """Tensor name -> file name; asked for with the first tensor, as a plan needs config.json alone."""
        layout = self.layout
        if (self.path / layout.weights).is_file():
            return dict.fromkeys(self._open(self.path / layout.weights).keys(), layout.weights)
        if (self.path / layout.index).is_file():
            file_of = self._json(layout.index).get("weight_map")
            if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
                raise UserError(f"{self.path / layout.index} is damaged: it has no weight_map; download it again")
            return file_of
        if any((self.path / (layout.pickled + end)).exists() for end in ("", ".index.json")):
            raise UserError(
                f"{self.path} holds pickled weights only ({layout.pickled}); save them as safetensors: load the model "
                f"with {layout.library} and call save_pretrained, or download {layout.weights}"
            )
        raise UserError(f"{self.path} has no {layout.weights} and no {layout.index}")

    def _open(self, file: pathlib.Path):
        if file not in self._files:
            if not file.is_file():
                raise UserError(f"{file} is missing though {self.layout.index} names it; download it again")
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


def check_fields(path: pathlib.Path, wanted: dict, cfg) -> None:
    """Raises a UserError with the overrides to paste unless the fields of `cfg` are as the checkpoint at `path` has them."""
    if differ := {key: value for key, value in wanted.items() if getattr(cfg, key) != value}:
        values = ", ".join(f"{key}={value} (the recipe: {getattr(cfg, key)})" for key, value in differ.items())
        paste = " ".join(shlex.quote(f"--config.model.{key}={value}") for key, value in differ.items())
        raise UserError(f"the checkpoint in {path} has {values}; add {paste}")


def check_names(path: pathlib.Path, found, wanted, may_be_there=()) -> None:
    """Raises one UserError that lists what is missing and what is there instead.

    Args:
      may_be_there: names that are not wanted, and endings of names, that do no harm.
    """
    missing = [name for name in wanted if name not in found]
    unknown = sorted(name for name in set(found) - set(wanted) if not name.endswith(tuple(may_be_there)))
    some = lambda names: ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    parts = [f"lacks {some(missing)}"] if missing else []
    parts += [f"has {some(unknown)}, which this model has not"] if unknown else []
    if parts:
        raise UserError(f"{path} {'; it '.join(parts)}: it is incomplete, or another kind of model")


def write_folder(folder, config: dict, tensors: dict[str, np.ndarray], layout: Layout = TRANSFORMERS) -> None:
    """config.json and the weights, in a temporary folder that takes its name when it is complete.

    Weights of more than SHARD_BYTES become several files and their index. One file at a time is copied in memory.

    Raises:
      UserError: `folder` holds something that is not an export of ours, or the disk is full.
    """
    target = pathlib.Path(folder).expanduser()
    _check_replaceable(target, layout)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write beside {target}: {error.strerror}") from error
    try:
        _write_weights(temporary, tensors, layout)
        mark = {layout.mark: "jaxvram"}
        config = config | ({layout.marked: config[layout.marked] | mark} if layout.marked else mark)
        (temporary / layout.config).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _share(temporary)
        _put_in_place(temporary, target, layout)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}; nothing was changed there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(folder: pathlib.Path, tensors: dict[str, np.ndarray], layout: Layout) -> None:
    shards, bytes_left = [], 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > bytes_left:
            shards, bytes_left = [*shards, []], SHARD_BYTES
        shards[-1].append(name)
        bytes_left -= tensor.nbytes
    file_of = {}
    for i, names in enumerate(shards, 1):
        file = layout.weights if len(shards) == 1 else layout.shard(i, len(shards))
        # save_file writes the memory of an array as it lies: a transposed view would be stored wrongly, without a word
        contiguous = {name: np.ascontiguousarray(tensors[name]) for name in names}
        safetensors.numpy.save_file(contiguous, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / layout.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_replaceable(target: pathlib.Path, layout: Layout) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a new folder")
    if not target.is_dir() or not (held := {path.name for path in target.iterdir()}):
        return
    try:
        config = json.loads((target / layout.config).read_text(encoding="utf-8"))
        ours = layout.mark in (config[layout.marked] if layout.marked else config)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours or not all(map(layout.is_ours, held)):
        raise UserError(f"{target} is not empty and not (only) an export of jaxvram; give a new folder")


def _put_in_place(temporary: pathlib.Path, target: pathlib.Path, layout: Layout) -> None:
    if not (target / layout.config).exists():
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
