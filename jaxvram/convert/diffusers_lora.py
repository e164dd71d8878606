"""A LoRA of a denoiser as diffusers keeps it: pytorch_lora_weights.safetensors, which `load_lora_weights` reads.

diffusers multiplies B A as they are where a file says nothing of alpha: our scale is in B there. What is two matrices here
and one there (the halves of a gated MLP) becomes one LoRA of twice the rank: [A_1; A_2] and B_1, B_2 on a diagonal.
A converter says of each matrix of ours what it is called there: `LORA_PREFIX` and `lora_module(cfg, path, layer)`.
"""

import importlib
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from jaxvram.convert.huggingface import HuggingFaceFolder, Layout, check_names, write_folder
from jaxvram.errors import UserError
from jaxvram.models import name_of

_STEM = "pytorch_lora_weights"
LAYOUT = Layout("diffusers", "kind", f"{_STEM}.safetensors", f"{_STEM}.bin", config="adapter_config.json")
SAID = ("rank", "alpha", "rank_stabilised")  # fields of FinetuneConfig that say how large a LoRA's part is


class Module(NamedTuple):
    """A matrix of ours as diffusers has it."""

    name: str
    half: int | None = None  # which half of theirs it is
    is_conv: bool = False  # a convolution of one pixel there


def save(params, cfg, finetune, folder, base: str = "") -> None:
    """Writes the LoRAs; diffusers loads them into the model that they were trained on.

    Args:
      params: of the adapted model (finetune/adapted.py), whose configuration is `cfg`.
      finetune: its FinetuneConfig.
      base: name or folder of the base model, for the reader.
    Raises:
      UserError: what was added is no plain LoRA, or the folder can't be written (huggingface.write_folder).
    """
    if finetune.method != "lora" or finetune.dora:
        raise UserError("diffusers takes plain LoRAs: export with finetune.method=lora and finetune.dora=False, or merged")
    source, found = _converter(cfg), {}
    for path, leaf, layer in _pairs(params):
        module = source.lora_module(cfg, path, layer)
        found.setdefault(module.name, {})[module.half or 0] = (module, *leaf)
    theirs = {}
    for name, halves in found.items():
        A_rxD = np.concatenate([A_Dxr.T for _, (_, A_Dxr, _) in sorted(halves.items())])
        B_Fxr = _diagonal([finetune.scale * B_rxF.T for _, (_, _, B_rxF) in sorted(halves.items())])
        as_conv = (lambda x: x[..., None, None]) if halves[min(halves)][0].is_conv else (lambda x: x)
        theirs[f"{source.LORA_PREFIX}.{name}.lora_A.weight"] = as_conv(A_rxD)
        theirs[f"{source.LORA_PREFIX}.{name}.lora_B.weight"] = as_conv(B_Fxr)
    said = {"kind": "LORA", "base_model": base or None, "targets": finetune.targets}
    write_folder(folder, said | {name: getattr(finetune, name) for name in SAID}, theirs, LAYOUT)


def load(folder, target, cfg, finetune) -> dict:
    """The LoRAs of an export of ours, as a tree to join with the base's.

    Args:
      target: the adapted model's parameters or their shapes.
    Raises:
      UserError: the folder is incomplete or damaged, or of another rank, scale or targets.
    """
    source, folder = _converter(cfg), HuggingFaceFolder(folder, "LORA", layout=LAYOUT)
    differ = {name: folder.config.get(name) for name in SAID if folder.config.get(name) != getattr(finetune, name)}
    if differ:
        paste = " ".join(f"--config.finetune.{name}={value}" for name, value in differ.items())
        raise UserError(f"the adapter in {folder.path} was trained otherwise; add {paste}")
    modules = [(path, layer, source.lora_module(cfg, path, layer), leaf) for path, leaf, layer in _pairs(target)]
    name_of_part = lambda module, part: f"{source.LORA_PREFIX}.{module.name}.lora_{part}.weight"
    check_names(folder.path, folder.names, {name_of_part(m, part) for _, _, m, _ in modules for part in "AB"})
    added = {(*path, name): np.zeros(x.shape, np.float32) for *path, name, x in _leaves(target)}
    for path, layer, module, (A_Dxr, B_rxF) in modules:
        (D, r), (_, F) = A_Dxr.shape, B_rxF.shape
        halves, half = 1 if module.half is None else 2, module.half or 0
        one = (1, 1) if module.is_conv else ()
        A = folder.tensor(name_of_part(module, "A"), (halves * r, D, *one)).reshape(halves, r, D)[half].T
        B = folder.tensor(name_of_part(module, "B"), (halves * F, halves * r, *one)).reshape(halves, F, halves, r)
        at = ... if layer is None else layer
        added[*path, "lora_A"][at], added[*path, "lora_B"][at] = A, B[half, :, half].T / finetune.scale
    return traverse_util.unflatten_dict(added)


def _converter(cfg):
    return importlib.import_module(f"jaxvram.convert.{name_of(cfg)}")


def _leaves(params):
    for path, x in traverse_util.flatten_dict(params).items():
        if path[-1] in ("lora_A", "lora_B"):
            yield *path, x


def _pairs(params):
    """(path of a matrix, (A, B), layer or None) of each, of stacked ones a layer at a time. Works on shapes too."""
    flat = traverse_util.flatten_dict(params)
    for *path, name, A in _leaves(params):
        if name != "lora_A":
            continue
        B = flat[*path, "lora_B"]
        if len(A.shape) == 2:
            yield tuple(path), (A, B), None
            continue
        for layer in range(A.shape[0]):
            of_layer = lambda x, layer=layer: np.asarray(x[layer]) if hasattr(x, "__getitem__") else _Shape(x.shape[1:])
            yield tuple(path), (of_layer(A), of_layer(B)), layer


class _Shape(NamedTuple):
    shape: tuple[int, ...]


def _diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Blocks (F, r) along the diagonal of one matrix."""
    (F, r), n = blocks[0].shape, len(blocks)
    whole = np.zeros((n * F, n * r), np.float32)
    for i, block in enumerate(blocks):
        whole[i * F : (i + 1) * F, i * r : (i + 1) * r] = block
    return whole
