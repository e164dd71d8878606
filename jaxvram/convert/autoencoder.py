"""An autoencoder's weights from and to a folder of diffusers' AutoencoderKL; a Stable Diffusion folder has one in `vae`.

A kernel of theirs is [out, in, height, width], here (height, width, in, out); a Linear of theirs is [out, in]; q, k and v
of the middle's attention, side by side here, are three there. Files from before 2023 call them query, key, value and
proj_attn; both are read. config.json's scaling_factor is what latents are multiplied by for a denoiser: 1 over their
standard deviation on the data that an autoencoder learnt from.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvram.convert.huggingface import DIFFUSERS, HuggingFaceFolder, write_folder
from jaxvram.errors import UserError
from jaxvram.models.autoencoder import AutoencoderConfig, AutoencoderKL

CLASS, PIPELINE_PART = "AutoencoderKL", "vae"
DEFAULTS = {  # what diffusers takes for a key that config.json leaves out, of those that are sizes
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
}
SCALE = 0.18215  # diffusers' default for a folder that says none: Stable Diffusion's
FIXED = {  # what our autoencoder is, and config.json may change
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

_QKV = ("to_q", "to_k", "to_v")
_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_RENAMED = (  # our path -> theirs, one after the other
    (r"^conv_out/", "decoder/conv_out/"),
    (r"^((post_)?quant)/", r"\1_conv/"),
    (r"/(down|up)_(\d+)/", r"/\1_blocks/\2/"),
    (r"/mid/", "/mid_block/"),
    (r"/resnet_(\d+)/", r"/resnets/\1/"),
    (r"/skip/", "/conv_shortcut/"),
    (r"/(down|up)sample/", r"/\1samplers/0/"),
    (r"/attention/norm/", "/attentions/0/group_norm/"),
    (r"/attention/attn/c_attn/", f"/attentions/0/{_QKV[0]}/"),
    (r"/attention/attn/c_proj/", "/attentions/0/to_out/0/"),
    (r"coder/norm_out/", "coder/conv_norm_out/"),
    (r"/(kernel|scale)$", "/weight"),
)
_1X1 = re.compile(r"(skip|quant)/kernel$")  # matrices here, convolutions of one pixel there


def folder_of(folder) -> pathlib.Path:
    """Where the autoencoder lies: in a pipeline's folder, in its part `vae`."""
    folder = pathlib.Path(folder).expanduser()
    return folder / PIPELINE_PART if (folder / "model_index.json").is_file() else folder


def load_params(folder, cfg: AutoencoderConfig) -> dict:
    """{"autoencoder": parameters of `AutoencoderKL(cfg)`} as NumPy arrays in cfg.param_dtype, as its task has them.

    `folder` is the model's, or that of a whole Stable Diffusion.

    Raises:
      UserError: the folder is incomplete, damaged, or holds another model than `cfg`; the message names the overrides.
    """
    source = HuggingFaceFolder(folder_of(folder), CLASS, layout=DIFFUSERS)
    source.check_fields(_fields(source) | {"image_size": cfg.image_size}, cfg)  # any size goes through
    params = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _shapes(cfg).items()}
    for name, out in params.items():
        theirs = _their_names(name)
        for their_name, part in zip(theirs, np.split(out, len(theirs), axis=-1), strict=True):  # views
            _read(source, name, their_name, part)
    return {"autoencoder": unflatten_dict(params, sep="/")}


def read_config(folder, **fields) -> tuple[AutoencoderConfig, float]:
    """(what a folder's model is, its scaling factor). `fields`: how to compute, as AutoencoderConfig has them.

    Raises:
      UserError: it is no autoencoder of ours.
    """
    source = HuggingFaceFolder(folder_of(folder), CLASS, layout=DIFFUSERS)
    scale = source.config.get("scaling_factor", SCALE)
    if type(scale) not in (int, float) or not 0 < scale < float("inf"):
        raise UserError(f"{source.path / 'config.json'} is damaged: scaling_factor={scale!r}")
    return AutoencoderConfig(**_fields(source), **fields), float(scale)


def save(params, cfg: AutoencoderConfig, folder, scaling_factor: float) -> None:
    """A folder that `diffusers.AutoencoderKL.from_pretrained` loads; complete or not there.

    Args:
      params: as the task has them; a discriminator is left out.
    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    if not np.isfinite(scaling_factor):
        raise UserError(f"the latents have no spread that could be scaled (1 / {scaling_factor}): train first")
    tensors = {}
    for name, x in flatten_dict(jax.tree.map(np.asarray, params["autoencoder"]), sep="/").items():
        theirs = _their_names(name)
        for their_name, part in zip(theirs, np.split(x, len(theirs), axis=-1), strict=True):
            tensors[their_name] = _as_theirs(name, part)
    levels = len(cfg.widths)
    config = {key: values[0] for key, values in FIXED.items() if values[0] is not None}
    config |= {key: [block] * levels for key, block in BLOCKS.items()}
    config |= {
        "_class_name": CLASS,
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "block_out_channels": list(cfg.widths),
        "layers_per_block": cfg.res_blocks,
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": cfg.groups,
        "sample_size": cfg.image_size,
        "scaling_factor": scaling_factor,
    }
    write_folder(folder, config, tensors, DIFFUSERS)


def _their_names(name: str) -> list[str]:
    """Their names for our parameter, side by side in ours where there are several."""
    for ours, theirs in _RENAMED:
        name = re.sub(ours, theirs, name)
    name = name.replace("/", ".")
    return [name.replace(_QKV[0], part) for part in _QKV] if f".{_QKV[0]}." in name else [name]


def _as_theirs(name: str, x: np.ndarray) -> np.ndarray:
    """Our parameter in their order of axes, a view."""
    if _1X1.search(name):
        return x.T[:, :, None, None]
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def _read(source: HuggingFaceFolder, name: str, theirs: str, out: np.ndarray) -> None:
    """Fills `out`, our parameter or a third of it, with their tensor, also under its older name."""
    for new, old in _OLD.items():
        older = theirs.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        theirs = older if theirs not in source and older in source else theirs
    view = _as_theirs(name, out)
    view[...] = source.tensor(theirs, view.shape)


def _shapes(cfg: AutoencoderConfig) -> dict:
    """Our path -> shape and dtype; kernels and remat, which only say how to compute, may not suit this machine."""
    cfg = dataclasses.replace(cfg, kernels="xla", remat="none")
    image = jnp.zeros((1, cfg.image_size, cfg.image_size, cfg.channels))
    return flatten_dict(jax.eval_shape(lambda: AutoencoderKL(cfg).init(jax.random.key(0), image)["params"]), sep="/")


def _fields(source: HuggingFaceFolder) -> dict:
    """Fields of our config, from theirs."""
    theirs, where = DEFAULTS | source.config, source.path / "config.json"
    if isinstance(theirs["sample_size"], list):  # height and width
        theirs["sample_size"] = theirs["sample_size"][0]
    source.check_sizes(theirs, DEFAULTS)
    source.check_fixed(theirs, FIXED, "AutoencoderKL of Stable Diffusion's kind")
    widths = theirs.get("block_out_channels", [64])
    if not isinstance(widths, list) or not widths or not all(type(w) is int and w > 0 for w in widths):
        raise UserError(f"{where} is damaged: block_out_channels={widths!r}")
    for key, block in BLOCKS.items():
        if theirs.get(key, [block]) != [block] * len(widths):
            raise UserError(f"{where}: {key}={theirs.get(key)} is not {block} at every level; not supported")
    if odd := [width for width in widths if width % widths[0]]:
        raise UserError(f"{where}: {odd[0]} channels are no multiple of the first level's {widths[0]}; not supported")
    if theirs["out_channels"] != theirs["in_channels"]:
        raise UserError(f"{where}: out_channels differ from in_channels; not supported")
    return {
        "image_size": theirs["sample_size"],
        "channels": theirs["in_channels"],
        "latent_channels": theirs["latent_channels"],
        "width": widths[0],
        "multipliers": tuple(width // widths[0] for width in widths),
        "res_blocks": theirs["layers_per_block"],
        "groups": theirs["norm_num_groups"],
    }
