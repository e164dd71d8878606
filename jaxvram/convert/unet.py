"""A U-Net's weights from and to a folder of diffusers' UNet2DModel or, with a text, UNet2DConditionModel.

A convolution is (height, width, in, out) here and (out, in, height, width) there; a matrix [in, out] and [out, in], and
where theirs is a convolution of one pixel, [out, in, 1, 1]; the two halves of the gated MLP are one matrix there.
Levels count from the largest image on both sides of ours, on the way down only of theirs.

`attention_head_dim` is a head's size in UNet2DModel, and in UNet2DConditionModel, in spite of its name, their number.
A model whose text encoder was trained with it becomes two folders, as in a pipeline: unet/ and text_encoder/.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvram.convert import text_encoder
from jaxvram.convert.diffusers_lora import Module
from jaxvram.convert.huggingface import DIFFUSERS, HuggingFaceFolder, check_fields, write_folder
from jaxvram.errors import UserError
from jaxvram.models.unet import UNet, UNetConfig

LORA_PREFIX = "unet"
PIXELS, TEXT = "UNet2DModel", "UNet2DConditionModel"
UNET = "unet"  # folder of a pipeline
DEFAULTS = {  # of diffusers, for a key that config.json leaves out
    "sample_size": None,
    "in_channels": {PIXELS: 3, TEXT: 4},
    "out_channels": {PIXELS: 3, TEXT: 4},
    "block_out_channels": {PIXELS: [224, 448, 672, 896], TEXT: [320, 640, 1280, 1280]},
    "down_block_types": {
        PIXELS: ["DownBlock2D", *3 * ["AttnDownBlock2D"]], TEXT: [*3 * ["CrossAttnDownBlock2D"], "DownBlock2D"],
    },
    "up_block_types": {PIXELS: [*3 * ["AttnUpBlock2D"], "UpBlock2D"], TEXT: ["UpBlock2D", *3 * ["CrossAttnUpBlock2D"]]},
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "norm_num_groups": 32,
    "cross_attention_dim": {PIXELS: None, TEXT: 1280},
    "num_class_embeds": None,
}  # fmt: skip
FIXED = {  # what our U-Net is, and config.json may change
    "center_input_sample": (False,), "time_embedding_type": ("positional",), "time_embedding_dim": (None,),
    "freq_shift": (0,), "flip_sin_to_cos": (True,), "mid_block_scale_factor": (1,), "downsample_padding": (1,),
    "downsample_type": ("conv",), "upsample_type": ("conv",), "act_fn": ("silu", "swish"), "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default",), "add_attention": (True,), "class_embed_type": (None,),
    "attn_norm_num_groups": (None,), "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "only_cross_attention": (False,), "transformer_layers_per_block": (1,), "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,), "addition_embed_type": (None,), "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,), "time_embedding_act_fn": (None,), "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
    "cross_attention_norm": (None,), "mid_block_only_cross_attention": (None, False),
}  # fmt: skip
KINDS = {PIXELS: ["AttnDownBlock2D", "AttnUpBlock2D"], TEXT: ["CrossAttnDownBlock2D", "CrossAttnUpBlock2D"]}
PLAIN = ("DownBlock2D", "UpBlock2D")  # levels without attention

_OUTER = {"time_fc1": "time_embedding.linear_1", "time_fc2": "time_embedding.linear_2", "norm_out": "conv_norm_out"}
_RES = {"t_proj": "time_emb_proj", "skip": "conv_shortcut"}
_QKV = {"c_q": "to_q", "c_k": "to_k", "c_v": "to_v", "c_proj": "to_out.0"}
_OLD_QKV = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in folders of 2022
_PIXEL_BLOCK = {"norm": "group_norm"} | {f"attn/{ours}": theirs for ours, theirs in _QKV.items()}
_TEXT_BLOCK = {
    **{f"ln_{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)},
    **{f"attn/{ours}": f"transformer_blocks.0.attn1.{theirs}" for ours, theirs in _QKV.items()},
    **{f"cross_attn/{ours}": f"transformer_blocks.0.attn2.{theirs}" for ours, theirs in _QKV.items()},
    "mlp/c_fc": "transformer_blocks.0.ff.net.0.proj",
    "mlp/c_gate": "transformer_blocks.0.ff.net.0.proj",  # behind the half above
    "mlp/c_proj": "transformer_blocks.0.ff.net.2",
}
_LEAF = {"kernel": "weight", "bias": "bias", "scale": "weight"}
_TABLE = "y_embed/table/embedding"
_HALVES = ("mlp/c_fc/", "mlp/c_gate/")  # of one tensor there, in this order


def load_params(folder, cfg: UNetConfig) -> dict:
    """Parameters of `UNet(cfg)` as NumPy arrays in cfg.param_dtype (the tree inside of "params").

    `folder` is the model's, or that of a whole pipeline, such as Stable Diffusion's.

    Raises:
      UserError: the folder is incomplete, damaged, or holds another model than `cfg`; the message names the overrides.
    """
    folder = whole = pathlib.Path(folder).expanduser()
    if (folder / UNET).is_dir() and not (folder / "config.json").is_file():
        folder = folder / UNET
    source = HuggingFaceFolder(folder, TEXT if cfg.context_dim else PIXELS, layout=DIFFUSERS)
    _check_config(source, cfg)
    params = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _shapes(cfg).items()}
    for ours, array in params.items():
        if not ours.startswith("text/"):
            _read(source, ours, _their_name(cfg, ours), array)
    params = unflatten_dict(params, sep="/")
    if cfg.text_layers:
        params["text"] = _text(whole / text_encoder.ENCODER, cfg)
    return params


def save(params, cfg: UNetConfig, folder) -> None:
    """A folder that `from_pretrained` of diffusers' class loads; complete or not there.

    Raises:
      UserError: diffusers has no such model, `folder` holds anything but an earlier export, or the disk is full.
    """
    config = _config_json(cfg)
    params = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    tensors = {}
    for ours, array in params.items():
        if ours.startswith("text/") or _HALVES[1] in ours:
            continue
        if _HALVES[0] in ours:
            array = np.concatenate([array, params[ours.replace(*_HALVES)]], axis=-1)
        name = _their_name(cfg, ours)
        theirs = array if ours == _TABLE else _turned(array)
        tensors[name] = theirs[..., None, None] if _is_one_pixel(ours) else theirs
    folder = pathlib.Path(folder).expanduser()
    if cfg.text_layers:
        text = {name.removeprefix("text/"): array for name, array in params.items() if name.startswith("text/")}
        text_encoder.save(unflatten_dict(text, sep="/"), cfg.text, folder / text_encoder.ENCODER)
    write_folder(folder / UNET if cfg.text_layers else folder, config, tensors, DIFFUSERS)


def lora_module(cfg: UNetConfig, path: tuple[str, ...], layer: None) -> Module:
    """Where the LoRA of a matrix of ours belongs there (convert/diffusers_lora.py)."""
    ours = "/".join((*path, "kernel"))
    half = next((i for i, part in enumerate(_HALVES) if part in ours), None)
    return Module(_their_name(cfg, ours).removesuffix(".weight"), half, _is_one_pixel(ours))


def _text(folder: pathlib.Path, cfg: UNetConfig) -> dict:
    """The encoder that was trained with it."""
    found = text_encoder.find(folder).cfg
    wanted = {"context_length": found.length, "text_layers": found.n_layer, "text_heads": found.n_head}
    wanted |= {"context_dim": found.n_embd, "text_ngrams": found.ngrams}
    check_fields(folder, wanted, cfg)
    params, _ = text_encoder.load_params(folder)
    return jax.tree.map(lambda p: np.asarray(p, cfg.param_dtype), params)


def _shapes(cfg: UNetConfig) -> dict:
    """Our path -> shape and dtype; kernels and remat, which only say how to compute, may not suit this machine."""
    cfg = dataclasses.replace(cfg, kernels="xla", remat="none")
    image, number = jnp.zeros((1, cfg.image_size, cfg.image_size, cfg.channels)), jnp.zeros(1, jnp.int32)
    condition = number if cfg.num_classes else None
    if cfg.context_dim:
        features = jnp.zeros((1, cfg.context_length, cfg.context_dim))
        tokens = jnp.zeros((1, cfg.context_length), jnp.int32)
        condition = {"context_BxSxE": features, "tokens_BxS": tokens, "length_B": number}
    shapes = jax.eval_shape(lambda: UNet(cfg).init(jax.random.key(0), image, number, condition)["params"])
    return flatten_dict(shapes, sep="/")


def _their_name(cfg: UNetConfig, ours: str) -> str:
    if ours == _TABLE:
        return "class_embedding.weight"
    *path, leaf = ours.split("/")
    outer, inner = path[0], "/".join(path[1:])
    if not (match := re.fullmatch(r"(down|mid|up)_(?:(\d+)_)?(res|spatial|sample)(?:_(\d+))?", outer)):
        return f"{_OUTER.get(outer, outer)}.{_LEAF[leaf]}"
    way, level, kind, index = match.groups()
    level = len(cfg.multipliers) - 1 - int(level) if way == "up" else level
    block = "mid_block" if way == "mid" else f"{way}_blocks.{level}"
    if kind == "sample":
        return f"{block}.{way}samplers.0.conv.{_LEAF[leaf]}"
    inside = _RES if kind == "res" else _TEXT_BLOCK if cfg.context_dim else _PIXEL_BLOCK
    module = "resnets" if kind == "res" else "attentions"
    return f"{block}.{module}.{index or 0}.{inside.get(inner, inner)}.{_LEAF[leaf]}"


def _turned(array: np.ndarray) -> np.ndarray:
    """Between our layout of an array and theirs: back is `_back`."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _back(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _is_one_pixel(ours: str) -> bool:
    """A matrix of ours that is a convolution of theirs."""
    return ours.endswith(("/skip/kernel", "/proj_in/kernel", "/proj_out/kernel"))


def _read(source: HuggingFaceFolder, ours: str, name: str, out: np.ndarray) -> None:
    """Fills `out`, a parameter of ours, with the tensor `name`, or with its half of it."""
    if ours == _TABLE:
        out[...] = source.tensor(name, out.shape)
        return
    if name not in source:
        for today, then in _OLD_QKV.items():
            if (old := name.replace(f".{today}.", f".{then}.")) in source:
                name = old
    theirs = list(_turned(out).shape)
    half = next((i for i, part in enumerate(_HALVES) if part in ours), None)
    if half is not None:
        F = theirs[0]
        out[...] = _back(source.tensor(name, (2 * F, *theirs[1:]))[half * F : (half + 1) * F])
    elif _is_one_pixel(ours) and len(source.shape(name)) != 2:
        out[...] = source.tensor(name, (*theirs, 1, 1))[..., 0, 0].T
    else:
        out[...] = _back(source.tensor(name, tuple(theirs)))


def _check_config(source: HuggingFaceFolder, cfg: UNetConfig) -> None:
    kind, where = source.config["_class_name"], source.path / "config.json"
    of_kind = lambda value: value[kind] if isinstance(value, dict) else value
    theirs = {key: of_kind(value) for key, value in DEFAULTS.items()} | source.config
    source.check_fixed(theirs, FIXED, "U-Net that we know")
    source.check_sizes(theirs, ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"))
    channels, C = theirs["block_out_channels"], theirs["in_channels"]
    if any(type(D) is not int or D < 1 or D % channels[0] for D in channels):
        raise UserError(f"{where}: block_out_channels={channels} are not whole multiples of the first; not supported")
    if theirs["out_channels"] not in (C, 2 * C):
        raise UserError(
            f"{where}: out_channels={theirs['out_channels']} is neither in_channels={C} nor twice that (with a learned "
            "variance); not supported"
        )
    wanted = {
        "channels": C,
        "learn_sigma": theirs["out_channels"] == 2 * C,
        "num_classes": (theirs["num_class_embeds"] or 1) - 1,
        "width": channels[0],
        "multipliers": tuple(D // channels[0] for D in channels),
        "res_blocks": theirs["layers_per_block"],
        "attention_levels": _attention_levels(where, kind, theirs),
        "groups": theirs["norm_num_groups"],
        "context_dim": theirs["cross_attention_dim"] or 0,
    }
    if theirs["sample_size"] is not None and wanted["context_dim"] == 0:
        wanted["image_size"] = theirs["sample_size"]
    source.check_fields(wanted, cfg)
    source.check_fields(_heads(where, kind, theirs, cfg), cfg)


def _attention_levels(where, kind: str, theirs: dict) -> tuple[int, ...]:
    down, up = theirs["down_block_types"], theirs["up_block_types"][::-1]
    known = (PLAIN, KINDS[kind])
    for name, other in zip(down, up, strict=False):
        if (name, other) not in map(tuple, known):
            raise UserError(f"{where}: a level of {name} and {other} is not supported, but of {known[0]} or {known[1]}")
    return tuple(level for level, name in enumerate(down) if name != PLAIN[0])


def _heads(where, kind: str, theirs: dict, cfg: UNetConfig) -> dict:
    """The fields that say how many heads there are, if those of `cfg` come to other numbers."""
    said, channels = theirs["attention_head_dim"], theirs["block_out_channels"]
    levels = [*_attention_levels(where, kind, theirs), len(channels) - 1]  # the last: the middle
    if kind == PIXELS:
        heads = [channels[level] // (said or channels[level]) for level in levels]
    else:
        said = theirs["num_attention_heads"] or said  # in that class, a number of heads under either name
        heads = [said[level] if isinstance(said, list) else said for level in levels]
    if heads == [cfg.heads_at(level) for level in levels]:
        return {}
    sizes = {channels[level] // H for level, H in zip(levels, heads, strict=True)}
    if len(set(heads)) == 1:
        return {"heads": heads[0], "head_dim": 0}
    if len(sizes) == 1:
        return {"heads": 0, "head_dim": sizes.pop()}
    raise UserError(f"{where}: {heads} heads are neither equally many nor of one size; not supported")


def _config_json(cfg: UNetConfig) -> dict:
    levels = range(len(cfg.multipliers))
    attends = [level in cfg.attention_levels for level in levels]
    kind = TEXT if cfg.context_dim else PIXELS
    down, up = ([pair[way] for pair in (KINDS[kind] if has else PLAIN for has in attends)] for way in (0, 1))
    config = {
        "_class_name": kind,
        "sample_size": cfg.image_size,
        "in_channels": cfg.channels,
        "out_channels": cfg.out_channels,
        "block_out_channels": [cfg.channels_at(level) for level in levels],
        "layers_per_block": cfg.res_blocks,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "norm_num_groups": cfg.groups,
        "norm_eps": 1e-5,
        "dropout": cfg.dropout,
    }
    used = [*cfg.attention_levels, levels[-1]]
    if kind == TEXT:
        heads = [cfg.heads_at(level) if level in used else 1 for level in levels]
        same = {cfg.heads_at(level) for level in used}
        config |= {"cross_attention_dim": cfg.context_dim, "attention_head_dim": heads if len(same) > 1 else same.pop()}
        return config
    sizes = {cfg.channels_at(level) // cfg.heads_at(level) for level in used}
    if len(sizes) > 1:
        raise UserError(
            f"model.heads={cfg.heads} cannot be exported: diffusers' {PIXELS} has heads of one size, not of {sorted(sizes)}"
            "; train with model.head_dim"
        )
    return config | {
        "attention_head_dim": sizes.pop(),
        "num_class_embeds": cfg.num_classes + 1 if cfg.num_classes else None,
    }
