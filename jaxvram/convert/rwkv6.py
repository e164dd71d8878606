"""RWKV-6's weights: official .pth, and folders like the hub's rwkv-6-world-*, both in and out."""

from jaxvram.convert import rwkv, rwkv_world, torch_file
from jaxvram.convert.rwkv import Layout
from jaxvram.models.rwkv6 import MIXTURES, RWKV6Config

SIZES = rwkv_world.SIZES | {
    "head_dim": ("blocks.0.att.time_faaaa", 1),
    "d_mix": ("blocks.0.att.time_maa_w2", 1),
    "d_decay": ("blocks.0.att.time_decay_w1", 1),
}


def layout_of(cfg: RWKV6Config) -> Layout:
    D, R, M = cfg.n_embd, cfg.decay_rank, cfg.mix_rank
    vectors = {f"att.time_maa_{name}": ((D,), (1, 1, D)) for name in "x" + MIXTURES}
    vectors |= {f"ffn.time_maa_{name}": ((D,), (1, 1, D)) for name in "kr"} | {"att.time_decay": ((D,), (1, 1, D))}
    shapes = {
        "time_maa_w1": (D, len(MIXTURES) * M), "time_maa_w2": (len(MIXTURES), M, D), "time_decay_w1": (D, R),
        "time_decay_w2": (R, D), "time_faaaa": (cfg.heads, cfg.head_dim),
    }  # fmt: skip
    vectors |= {f"att.{name}": (shape, shape) for name, shape in shapes.items()}
    return rwkv_world.layout_of(cfg, vectors, ("receptance", "key", "value", "gate", "output"))


def load_params(source, cfg: RWKV6Config) -> dict:
    """Parameters of `RWKV6(cfg)` as NumPy arrays (the tree inside of "params"), from a .pth or a folder.

    Raises:
      UserError: what `source` holds is incomplete, damaged or another model than `cfg`; the message names the overrides.
    """
    if rwkv.is_official(source):
        return rwkv.read_official(source, cfg, layout_of(cfg), "RWKV-6", SIZES, _size)
    return rwkv_world.read_folder(source, "rwkv6", cfg, layout_of(cfg), SIZES, _size)


def save(params, cfg: RWKV6Config, folder) -> None:
    """A folder like the hub's; see rwkv_world.save_folder."""
    rwkv_world.save_folder(params, cfg, layout_of(cfg), "rwkv6", folder)


def save_official(params, cfg: RWKV6Config, file) -> None:
    """A .pth that the rwkv package loads; see torch_file.write."""
    torch_file.write(file, rwkv.to_tensors(params, cfg, layout_of(cfg), official=True))


def _size(cfg: RWKV6Config, field: str) -> int:
    """A field, or what it stands for where it is 0."""
    stands_for = {"d_ffn": cfg.hidden, "d_mix": cfg.mix_rank, "d_decay": cfg.decay_rank}
    return stands_for.get(field, getattr(cfg, field))
