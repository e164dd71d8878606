"""RWKV-5's weights: official .pth of 5.0, 5.1 and 5.2, and folders like the hub's rwkv-5-world-*, both in and out.

Which of the three a checkpoint is, is told as the rwkv package tells it: by gate.weight, and by a time_decay of more than
one number a head. As there, a time_first of 5.1 or 5.2 stands for a bonus of exp(time_first).
"""

import numpy as np

from jaxvram.convert import rwkv, rwkv_world, torch_file
from jaxvram.convert.rwkv import Layout
from jaxvram.models.rwkv5 import RWKV5Config


def layout_of(cfg: RWKV5Config) -> Layout:
    D = cfg.n_embd
    vectors = {f"att.time_mix_{name}": ((D,), (1, 1, D)) for name in cfg.mixtures}
    vectors |= {f"ffn.time_mix_{name}": ((D,), (1, 1, D)) for name in "kr"}
    vectors |= {f"att.{name}": (cfg.decay_shape, cfg.decay_shape) for name in ("time_decay", cfg.bonus)}
    gate = () if cfg.version == "5.0" else ("gate",)
    return rwkv_world.layout_of(cfg, vectors, ("receptance", "key", "value", *gate, "output"))


def load_params(source, cfg: RWKV5Config) -> dict:
    """Parameters of `RWKV5(cfg)` as NumPy arrays (the tree inside of "params"), from a .pth or a folder.

    Raises:
      UserError: what `source` holds is incomplete, damaged or another model than `cfg`; the message names the overrides.
    """
    layout, about = layout_of(cfg), (rwkv_world.SIZES, _size, _told)
    if rwkv.is_official(source):
        return rwkv.read_official(source, cfg, layout, "RWKV-5", *about, lambda tensors: _settled(tensors, cfg))
    return rwkv_world.read_folder(source, "rwkv5", cfg, layout, *about)


def save(params, cfg: RWKV5Config, folder) -> None:
    """A folder like the hub's; see rwkv_world.save_folder."""
    rwkv_world.save_folder(params, cfg, layout_of(cfg), "rwkv5", folder)


def save_official(params, cfg: RWKV5Config, file) -> None:
    """A .pth that the rwkv package loads; see torch_file.write."""
    torch_file.write(file, rwkv.to_tensors(params, cfg, layout_of(cfg), official=True))


def _size(cfg: RWKV5Config, field: str):
    return cfg.hidden if field == "d_ffn" else getattr(cfg, field)


def _told(shape_of) -> dict:
    """Version and size of heads."""
    heads, *more = shape_of("blocks.0.att.time_decay") or (1,)
    of_channels = bool(more) and more[0] > 1
    version = "5.2" if of_channels else "5.1" if shape_of("blocks.0.att.gate.weight") else "5.0"
    return {"version": version, "head_dim": more[0] if of_channels else shape_of("emb.weight")[1] // heads}


def _settled(tensors: dict, cfg: RWKV5Config) -> dict:
    """With the bonus under the name that the version has it by."""
    found = dict(tensors)
    for name in tensors if cfg.bonus == "time_faaaa" else ():
        if name.endswith("att.time_first"):
            found[name.replace("time_first", "time_faaaa")] = np.exp(found.pop(name).astype(np.float32))
    return found
