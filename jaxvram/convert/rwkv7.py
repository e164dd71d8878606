"""RWKV-7's weights: from an official .pth, from and to a Hugging Face folder (rwkv7_hf's names, which its models load).

Both have matrices [out, in] and a list of layers; ours [in, out], the first layer apart and the others stacked. The small
matrices w1 to g2 are [in, out] in a .pth as well. Layer 0 of a .pth may have v0, v1, v2, which nothing reads.
"""

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from jaxvram.convert import torch_file
from jaxvram.convert.huggingface import HuggingFaceFolder, check_fields, check_names, write_folder
from jaxvram.errors import UserError
from jaxvram.models.rwkv7 import MIXTURES, RWKV7Config

SIZE_OF = {
    "vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "head_dim": "head_dim",
    "d_ffn": "intermediate_size", "d_decay": "decay_low_rank_dim", "d_rate": "a_low_rank_dim",
    "d_value": "v_low_rank_dim", "d_gate": "gate_low_rank_dim",
}  # fmt: skip
THEIR_MATRICES = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
THEIR_NORMS = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


class Parameter(NamedTuple):
    """One parameter of a layer: names within it, and shapes in the other layouts."""

    ours: tuple[str, ...]
    official: str
    official_shape: tuple[int, ...]
    hugging_face: str
    hugging_face_shape: tuple[int, ...]


def _layer(cfg: RWKV7Config, first: bool) -> list[Parameter]:
    D, F = cfg.n_embd, cfg.hidden
    found = []

    def add(ours, official, shape, theirs, their_shape=None):
        found.append(Parameter(tuple(ours.split("/")), official, shape, theirs, their_shape or shape))

    for norm in ("ln1", "ln2"):
        for ours, name in (("scale", "weight"), ("bias", "bias")):
            add(f"{norm}/{ours}", f"{norm}.{name}", (D,), f"{THEIR_NORMS[norm]}.{name}")
    for name in MIXTURES:
        add(f"att/x_{name}", f"att.x_{name}", (1, 1, D), f"attn.x_{name}")
    for name in "wag" if first else "wavg":
        R, lora = cfg.rank(name), f"attn.{name}_lora.lora"
        add(f"att/{name}1", f"att.{name}1", (D, R), f"{lora}.0.weight", (R, D))
        add(f"att/{name}2", f"att.{name}2", (R, D), f"{lora}.2.weight", (D, R))
        if name != "g":
            add(f"att/{name}0", f"att.{name}0", (1, 1, D), f"{lora}.2.bias", (D,))
    for name in ("k_k", "k_a"):
        add(f"att/{name}", f"att.{name}", (1, 1, D), f"attn.{name}", (D,))
    add("att/r_k", "att.r_k", (cfg.heads, cfg.head_dim), "attn.r_k")
    for ours, theirs in THEIR_MATRICES.items():
        add(f"att/{ours}/kernel", f"att.{ours}.weight", (D, D), f"attn.{theirs}.weight")
    for ours, name in (("scale", "weight"), ("bias", "bias")):
        add(f"att/ln_x_{ours}", f"att.ln_x.{name}", (D,), f"attn.g_norm.{name}")
    add("ffn/x_k", "ffn.x_k", (1, 1, D), "ffn.x_k", (D,))
    add("ffn/key/kernel", "ffn.key.weight", (F, D), "ffn.key.weight")
    add("ffn/value/kernel", "ffn.value.weight", (D, F), "ffn.value.weight")
    return found


def _outside(cfg: RWKV7Config) -> list[Parameter]:
    """What is in no layer, and ln0."""
    V, D = cfg.vocab_size, cfg.n_embd
    norms = {"ln0": ("blocks.0.ln0", "model.layers.0.pre_norm"), "norm_f": ("ln_out", "model.norm")}
    found = [
        Parameter(("embedding", "embedding"), "emb.weight", (V, D), "model.embeddings.weight", (V, D)),
        Parameter(("lm_head", "kernel"), "head.weight", (V, D), "lm_head.weight", (V, D)),
    ]
    for ours, (official, theirs) in norms.items():
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            found.append(Parameter((ours, leaf), f"{official}.{name}", (D,), f"{theirs}.{name}", (D,)))
    return found


def load_params(source, cfg: RWKV7Config) -> dict:
    """Parameters of `RWKV7(cfg)` as NumPy arrays (the tree inside of "params"), from a .pth or a folder.

    Raises:
      UserError: what `source` holds is incomplete, damaged or another model than `cfg`; the message names the overrides.
    """
    if pathlib.Path(source).suffix == ".pth":
        return _from_tensors(*_official(source, cfg), cfg, official=True)
    folder = HuggingFaceFolder(source, "rwkv7")
    folder.check_sizes(folder.config, SIZE_OF.values())
    wanted = {ours: folder.config[theirs] for ours, theirs in SIZE_OF.items()}
    folder.check_fixed(folder.config, {"norm_eps": (1e-5,), "head_dim": (64,), "norm_bias": (True,)}, "RWKV-7")
    folder.check_fields({k: v for k, v in wanted.items() if v != _size(cfg, k)}, cfg)
    return _from_tensors(folder.tensor, None, cfg, official=False)


def _size(cfg: RWKV7Config, field: str) -> int:
    """A field, or what it stands for where it is 0."""
    ranks = {"d_decay": "w", "d_rate": "a", "d_value": "v", "d_gate": "g"}
    if field in ranks:
        return cfg.rank(ranks[field])
    return cfg.hidden if field == "d_ffn" else getattr(cfg, field)


def _official(file, cfg: RWKV7Config):
    """(tensor by name and shape, all names) of a .pth whose sizes are those of `cfg`."""
    tensors, path = torch_file.read(file), pathlib.Path(file)
    shape = lambda name, axis: tensors[name].shape[axis] if name in tensors else None
    sizes = {
        "vocab_size": shape("emb.weight", 0), "n_embd": shape("emb.weight", 1), "head_dim": shape("blocks.0.att.r_k", 1),
        "n_layer": 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1),
        "d_ffn": shape("blocks.0.ffn.key.weight", 0), "d_decay": shape("blocks.0.att.w1", 1),
        "d_rate": shape("blocks.0.att.a1", 1), "d_value": shape("blocks.1.att.v1", 1), "d_gate": shape("blocks.0.att.g1", 1),
    }  # fmt: skip
    if None in sizes.values():
        raise UserError(f"{path} is no RWKV-7: it has no tensors for {', '.join(k for k, v in sizes.items() if v is None)}")
    check_fields(path, {k: v for k, v in sizes.items() if v != _size(cfg, k)}, cfg)

    def tensor(name, shape):
        found = tensors[name]
        if tuple(n for n in found.shape if n != 1) != tuple(n for n in shape if n != 1):
            raise UserError(f"{path}: {name} has shape {found.shape}, and should have {shape}")
        return found.reshape(shape)

    return tensor, (path, tensors)


def _from_tensors(tensor, source, cfg: RWKV7Config, official: bool) -> dict:
    layers = [_layer(cfg, i == 0) for i in range(cfg.n_layer)]
    if source is not None:
        names = [p.official for p in _outside(cfg)]
        names += [f"blocks.{i}.{p.official}" for i, layer in enumerate(layers) for p in layer]
        check_names(*source, names, may_be_there=UNUSED)
    prefix = "blocks" if official else "model.layers"

    def ours(p: Parameter, where=""):
        name, shape = (p.official, p.official_shape) if official else (p.hugging_face, p.hugging_face_shape)
        return _turned(tensor(where + name, shape), p, official).astype(_dtype(p, cfg))

    params = {}
    for p in _outside(cfg):
        value = ours(p)
        if p.ours[-1] in ("embedding", "kernel"):
            rows = np.zeros((cfg.table_rows, cfg.n_embd), value.dtype)
            rows[: cfg.vocab_size] = value.T if p.ours[-1] == "kernel" else value
            value = np.ascontiguousarray(rows.T) if p.ours[-1] == "kernel" else rows
        _put(params, p.ours, value)
    for p in layers[0]:
        _put(params, ("first", *p.ours), np.ascontiguousarray(ours(p, f"{prefix}.0.")))
    for p in layers[1]:
        rest = [ours(p, f"{prefix}.{i}.") for i in range(1, cfg.n_layer)]
        _put(params, ("layers", *p.ours), np.stack(rest))
    return params


def _dtype(p: Parameter, cfg: RWKV7Config) -> str:
    """Vectors and small matrices are fp32."""
    is_param = p.ours[-1] in ("kernel", "embedding", "scale", "bias") or p.ours[-1].startswith("ln_x")
    return cfg.param_dtype if is_param else "float32"


def _turned(x, p: Parameter, official: bool):
    """From one form to the other, of one layer: the way is the same."""
    name = p.ours[-1]
    is_pair = len(name) == 2 and name[0] in "wavg" and name[1] in "12"
    if name == "kernel" or (is_pair and not official):
        return x.T
    return x.reshape(-1) if x.ndim == 3 else x


def _put(tree: dict, path: tuple[str, ...], value) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def save(params, cfg: RWKV7Config, folder) -> None:
    """A folder that `rwkv7_hf.RWKV7ForCausalLM.from_pretrained` loads, with the same logits.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    params, tensors = jax.tree.map(np.asarray, params), {}

    def add(p: Parameter, value, where=""):
        tensors[where + p.hugging_face] = _turned(value, p, False).reshape(p.hugging_face_shape)

    for p in _outside(cfg):
        value = params[p.ours[0]][p.ours[1]]
        rows = value[: cfg.vocab_size] if p.ours[1] == "embedding" else value[..., : cfg.vocab_size]
        add(p, value if value.ndim == 1 else rows)
    for i in range(cfg.n_layer):
        for p in _layer(cfg, i == 0):
            value = params["layers" if i else "first"]
            for name in p.ours:
                value = value[name]
            add(p, value[i - 1] if i else value, f"model.layers.{i}.")
    config = {theirs: _size(cfg, ours) for ours, theirs in SIZE_OF.items()}
    config |= {"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "num_heads": cfg.heads, "norm_eps": 1e-5}
    config |= {"attention_hidden_size": cfg.n_embd, "norm_bias": True, "tie_word_embeddings": False}
    write_folder(folder, config | {"torch_dtype": cfg.param_dtype}, tensors)
