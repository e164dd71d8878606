"""What the checkpoints of all RWKV share: official files (.pth), and folders in Hugging Face's layout.

A model writes down its parameters once, as a `Layout`; what is read, checked and written follows from it. Theirs is a list
of layers; ours has a leading layer axis, and a table that may have rows of padding.
"""

import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np

from jaxvram.convert import torch_file
from jaxvram.convert.huggingface import check_fields, check_names
from jaxvram.errors import UserError


class Stored(NamedTuple):
    """A parameter as another layout has it."""

    name: str
    shape: tuple[int, ...]
    turned: bool = False  # a matrix, of which ours is the transpose


class Parameter(NamedTuple):
    """One parameter of ours, and what it is elsewhere; of a layer, all names are those within it."""

    ours: tuple[str, ...]
    shape: tuple[int, ...]  # without rows of padding
    official: Stored
    hugging_face: Stored | None = None
    fp32: bool = False  # whatever `param_dtype` is


class Layout(NamedTuple):
    """All of a model's parameters."""

    outside: list[Parameter]  # of no layer
    layers: list[list[Parameter]]
    hugging_face_layers: str = ""  # what stands before a layer's number
    first_apart: bool = False  # ours has the first layer in "first" and all others in "layers", else all there
    unused: tuple[str, ...] = ()  # official names that may be there, and that nothing reads

    def where(self, i: int, official: bool) -> str:
        """The prefix of a layer's names."""
        return f"{'blocks' if official else self.hugging_face_layers}.{i}."


def frame(cfg, table: str = "", head: str = "", norms: dict[str, str] | None = None) -> list[Parameter]:
    """Table, head, and the norms before the first and behind the last layer.

    Args:
      table, head, norms: Hugging Face's names of table and head, and of the norms by ours; none: there is no such layout.
    """
    V, D = cfg.vocab_size, cfg.n_embd
    theirs = lambda name, *more: Stored(name, *more) if name else None
    found = [
        Parameter(("embedding", "embedding"), (V, D), Stored("emb.weight", (V, D)), theirs(table, (V, D))),
        Parameter(("lm_head", "kernel"), (D, V), Stored("head.weight", (V, D), True), theirs(head, (V, D), True)),
    ]
    for ours, official in {"ln0": "blocks.0.ln0", "norm_f": "ln_out"}.items():
        name = (norms or {}).get(ours, "")
        for leaf, end in (("scale", "weight"), ("bias", "bias")):
            other = theirs(f"{name}.{end}" if name else "", (D,))
            found.append(Parameter((ours, leaf), (D,), Stored(f"{official}.{end}", (D,)), other))
    return found


def is_official(source) -> bool:
    return pathlib.Path(source).suffix == ".pth"


def read_official(
    file, cfg, layout: Layout, model: str, sizes: dict[str, tuple[str, int]], size_of=getattr, told=None, settle=None
) -> dict:
    """Parameters of `cfg` as NumPy arrays, from a .pth.

    Args:
      model: what it is called in a message, 'RWKV-' and its number.
      sizes: field of `cfg` -> (tensor, axis) that has its size, beside vocab_size, n_embd and n_layer.
      size_of: (cfg, field) -> what the field stands for where it is 0.
      told: further fields, of the function from a tensor's official name to its shape, () where there is none.
      settle: tensors -> tensors, of one of a parameter's several forms.
    Raises:
      UserError: the file is incomplete, damaged or of another model than `cfg`; the message names the overrides.
    """
    tensors, path = torch_file.read(file), pathlib.Path(file)
    _check_generation(path, tensors, model)
    tensors = settle(tensors) if settle else tensors
    shape_of = lambda name: tensors[name].shape if name in tensors else ()
    check_sizes(path, shape_of, tensors, cfg, model, sizes, size_of, told)
    names = [p.official.name for p in layout.outside]
    names += [layout.where(i, True) + p.official.name for i, layer in enumerate(layout.layers) for p in layer]
    check_names(path, tensors, names, may_be_there=layout.unused)

    def tensor(name, shape):
        got = tensors[name]
        if tuple(n for n in got.shape if n != 1) != tuple(n for n in shape if n != 1):
            raise UserError(f"{path}: {name} has shape {got.shape}, and should have {shape}")
        return got.reshape(shape)

    return from_tensors(tensor, cfg, layout, official=True)


def check_sizes(path, shape_of, names, cfg, model: str, sizes: dict, size_of=getattr, told=None) -> None:
    """The fields of `cfg` are as a checkpoint has them, of which `names` are all names; else as for `read_official`."""
    sizes = {"vocab_size": ("emb.weight", 0), "n_embd": ("emb.weight", 1), **sizes}
    found = {field: (*shape_of(name), *[None] * 9)[axis] for field, (name, axis) in sizes.items()}
    layers = [int(match[1]) for name in names if (match := re.search(r"\bblocks\.(\d+)\.", name))]
    found["n_layer"] = 1 + max(layers, default=-1)
    if lacking := [field for field, size in found.items() if not size]:
        raise UserError(f"{path} is no {model}: it has no tensors for {', '.join(lacking)}")
    found |= told(shape_of) if told else {}
    check_fields(path, {field: size for field, size in found.items() if size != size_of(cfg, field)}, cfg)


def _check_generation(path, tensors, model: str) -> None:
    """Raises a UserError that names the recipe, where a file is of another RWKV than `model`."""
    marks = {"7": "att.r_k", "6": "att.time_maa_x", "5": "att.ln_x.weight", "4": "att.time_first"}
    found = next((n for n, mark in marks.items() if f"blocks.0.{mark}" in tensors), None)
    if found and model != f"RWKV-{found}":
        raise UserError(f"{path} is an RWKV-{found}, and this recipe's model is {model}: take configs/rwkv{found}.py")


def from_tensors(tensor, cfg, layout: Layout, official: bool) -> dict:
    """Our tree, of `tensor(name, shape)`."""

    def ours(p: Parameter, where=""):
        stored = p.official if official else p.hugging_face
        value = tensor(where + stored.name, stored.shape)
        value = value.T if stored.turned else value.reshape(p.shape)
        return value.astype("float32" if p.fp32 else cfg.param_dtype)

    params = {}
    for p in layout.outside:
        _put(params, p.ours, _padded(ours(p), p, cfg))
    apart = int(layout.first_apart)
    for p in layout.layers[0] if apart else ():
        _put(params, ("first", *p.ours), np.ascontiguousarray(ours(p, layout.where(0, official))))
    for p in layout.layers[apart]:
        each = [ours(p, layout.where(i, official)) for i in range(apart, cfg.n_layer)]
        _put(params, ("layers", *p.ours), np.stack(each))
    return params


def to_tensors(params, cfg, layout: Layout, official: bool) -> dict[str, np.ndarray]:
    """Name -> array in the other layout, of our tree. Rows of padding are left out."""
    params, named = jax.tree.map(np.asarray, params), {}

    def add(p: Parameter, value, where=""):
        stored = p.official if official else p.hugging_face
        value = value[tuple(slice(n) for n in p.shape)]
        named[where + stored.name] = (value.T if stored.turned else value).reshape(stored.shape)

    for p in layout.outside:
        add(p, _at(params, p.ours))
    for i, layer in enumerate(layout.layers):
        for p in layer:
            if layout.first_apart:
                value = _at(params["first"], p.ours) if i == 0 else _at(params["layers"], p.ours)[i - 1]
            else:
                value = _at(params["layers"], p.ours)[i]
            add(p, value, layout.where(i, official))
    return named


def _padded(value, p: Parameter, cfg):
    """With the rows of a table, or the columns of a head, that stand for no token."""
    if p.ours[-1] not in ("embedding", "kernel"):
        return np.ascontiguousarray(value)
    wanted = (cfg.table_rows, cfg.n_embd) if p.ours[-1] == "embedding" else (cfg.n_embd, cfg.table_rows)
    full = np.zeros(wanted, value.dtype)
    full[tuple(slice(n) for n in p.shape)] = value
    return full


def _at(tree, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: dict, path: tuple[str, ...], value) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
