"""A GGUF file (llama.cpp's, ggml's format) as a source of tensors: one at a time, dequantised to fp32.

Its rows of W_q and W_k are those of Meta's files, in which pairs of RoPE lie side by side (layers/rope.py, `interleaved`).
"""

import math
import pathlib

import gguf
import numpy as np

from jaxvram.convert import huggingface
from jaxvram.data.gguf_metadata import read_header, read_metadata
from jaxvram.errors import UserError


def special_ids(file) -> dict[str, int]:
    """The tokens that begin, end and fill a text, by the names that config.json has for them; those that are told."""
    metadata = read_metadata(pathlib.Path(file).expanduser())
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    told = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    return {name: int(i) for name, i in told.items() if i is not None}


class GGUFFile:
    """Reads the header at once and tensors one at a time, as HuggingFaceFolder does.

    Raises (constructor and methods):
      UserError: the file is missing, damaged or cut short, of another architecture, or a tensor is not as asked for.
    """

    def __init__(self, file, architecture: str):
        self.path = pathlib.Path(file).expanduser()
        if not self.path.is_file():
            raise UserError(f"init_from={file}: there is no such file")
        self.metadata, self._tensors = read_header(self.path)
        if (found := self.metadata.get("general.architecture")) != architecture:
            raise UserError(f"{self.path} is of a {found!r} model; this recipe's model is {architecture!r}")
        if (parts := self.metadata.get("split.count", 1)) > 1:
            raise UserError(f"{self.path} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART OUT")
        size = self.path.stat().st_size
        for name, tensor in self._tensors.items():
            if tensor.offset + self._bytes(name) > size:
                raise UserError(f"{self.path} is damaged or cut short: {name} ends beyond its end; download it again")

    @property
    def names(self):
        return self._tensors.keys()

    def value(self, key: str, default=None):
        """What the header says of a key of its architecture."""
        return self.metadata.get(f"{self.metadata['general.architecture']}.{key}", default)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of that name, which must have that shape, in fp32."""
        found = self._tensors[name]
        if found.shape != shape:
            raise UserError(f"{self.path}: {name} has shape {found.shape}; its header means {shape}")
        data = np.fromfile(self.path, np.uint8, self._bytes(name), offset=found.offset)
        try:
            return gguf.quants.dequantize(data.reshape(*shape[:-1], -1), self._kind(name)).reshape(shape)
        except NotImplementedError as error:
            kind = self._kind(name).name
            raise UserError(f"{self.path}: {name} is stored as {kind}, which is not supported; use a Q8_0 file") from error

    def check_fields(self, wanted: dict, cfg) -> None:
        huggingface.check_fields(self.path, wanted, cfg)

    def _kind(self, name: str) -> gguf.GGMLQuantizationType:
        try:
            return gguf.GGMLQuantizationType(self._tensors[name].kind)
        except ValueError as error:
            which = f"{name} is stored in a format, number {self._tensors[name].kind}"
            raise UserError(f"{self.path}: {which}, that this version of gguf does not know; update gguf") from error

    def _bytes(self, name: str) -> int:
        shape, kind = self._tensors[name].shape, self._kind(name)
        block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise UserError(f"{self.path} is damaged: {name} of shape {shape} cannot be stored as {kind.name}")
        return math.prod(shape) // block * bytes_of_block
