"""PixArt's weights from and to a folder of diffusers' PixArtTransformer2DModel; a start from a folder of DiT's.

Ours are stacked along a leading layer axis; a Linear of theirs is [out, in]; the patches' matrix (p p C, D) is a
convolution's (D, C, p, p). Nothing depends on the image's size, so a folder of another size is the stage before. One
without micro-conditions starts a model that has them as if it had none: what embeds them ends in zero.

From a DiT (section 2.3 of the paper, "re-parameterization"): block i of a DiT without a class, here one told "no class",
  modulates by S_i(t) = W_i silu(c(t)) + b_i,  c(t) = t_embed(t) + y_none.
Ours keeps c(t) as e, takes for t_block the means of all W_i and b_i, which no other shared matrix comes nearer to, and the
tables S_i(500) - mean S(500), for the last norm S_final(500) - c(500). The cross-attention adds nothing at first, so at
t = 500, whatever the text, the model is the DiT; elsewhere nearly so.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvram.convert import dit
from jaxvram.convert.diffusers_lora import Module
from jaxvram.convert.huggingface import DIFFUSERS, HuggingFaceFolder, write_folder
from jaxvram.errors import UserError
from jaxvram.layers.conditioning import timestep_features
from jaxvram.models.dit import DiTConfig
from jaxvram.models.pixart import PixArt, PixArtConfig

CLASS = "PixArtTransformer2DModel"
OLD_CLASS = "Transformer2DModel"  # what both it and DiT were a part of in older versions
TRANSFORMER = LORA_PREFIX = "transformer"  # folder of a pipeline
SAME_AT = 500.0  # the timestep at which a model that starts from a DiT equals it
DEFAULTS = {  # what diffusers takes for a key that config.json leaves out
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "caption_channels": None,
}
FIXED = {  # what our PixArt is, and config.json may change
    "activation_fn": ("gelu-approximate",), "attention_bias": (True,), "norm_type": ("ada_norm_single",),
    "norm_elementwise_affine": (False,), "norm_eps": (1e-6,), "attention_type": ("default", None),
}  # fmt: skip

_LEAVES = (("kernel", "weight"), ("bias", "bias"))
_QKV = {"c_q": "to_q", "c_k": "to_k", "c_v": "to_v", "c_proj": "to_out.0"}
_MATRICES = {  # of a block: ours -> theirs
    **{f"attn/{ours}": f"attn1.{theirs}" for ours, theirs in _QKV.items()},
    **{f"cross_attn/{ours}": f"attn2.{theirs}" for ours, theirs in _QKV.items()},
    "mlp/c_fc": "ff.net.0.proj",
    "mlp/c_proj": "ff.net.2",
}
_BLOCKS = {
    f"blocks/{ours}/{leaf}": f"transformer_blocks.{{}}.{theirs}.{name}"
    for leaf, name in _LEAVES
    for ours, theirs in _MATRICES.items()
}
_BLOCK_TABLE, _FINAL_TABLE = "blocks/table", "final/table"  # no matrices: not transposed
_IN_BLOCK, _IN_FINAL = "transformer_blocks.{}.scale_shift_table", "scale_shift_table"
_PICTURE = {  # of micro-conditions
    f"{ours}/{fc}/{leaf}": f"adaln_single.emb.{theirs}.{linear}.{name}"
    for leaf, name in _LEAVES
    for ours, theirs in (("size_embed", "resolution_embedder"), ("aspect_embed", "aspect_ratio_embedder"))
    for fc, linear in (("fc1", "linear_1"), ("fc2", "linear_2"))
}
_REST = {
    f"{ours}/{leaf}": f"{theirs}.{name}"
    for leaf, name in _LEAVES
    for ours, theirs in (
        ("t_embed/fc1", "adaln_single.emb.timestep_embedder.linear_1"),
        ("t_embed/fc2", "adaln_single.emb.timestep_embedder.linear_2"),
        ("t_block", "adaln_single.linear"),
        ("y_embed/fc1", "caption_projection.linear_1"),
        ("y_embed/fc2", "caption_projection.linear_2"),
        ("final/linear", "proj_out"),
    )
} | _PICTURE


def load_params(folder, cfg: PixArtConfig) -> dict:
    """Parameters of `PixArt(cfg)` as NumPy arrays in cfg.param_dtype (the tree inside of "params").

    Those that a stage before has not, or a DiT, are left out where they are to come from the seed: they change nothing
    at first. `folder` is the model's, or that of a whole pipeline.

    Raises:
      UserError: the folder is incomplete, damaged, or holds another model than `cfg`; the message names the overrides.
    """
    folder = pathlib.Path(folder).expanduser()
    if (folder / "model_index.json").is_file():
        folder = folder / TRANSFORMER
    source = HuggingFaceFolder(folder, CLASS, OLD_CLASS, *dit.CLASSES, layout=DIFFUSERS)
    if _is_dit(source.config):
        return from_dit(source, cfg)
    has_picture = _check_config(source, cfg)
    params = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _shapes(cfg).items()}
    for ours, theirs in _BLOCKS.items():
        source.read_layers(theirs, params[ours], transposed=True)
    source.read_layers(_IN_BLOCK, params[_BLOCK_TABLE])
    params[_FINAL_TABLE][...] = source.tensor(_IN_FINAL, params[_FINAL_TABLE].shape)
    for ours, theirs in _REST.items():
        if ours in params and (has_picture or ours not in _PICTURE):
            params[ours].T[...] = source.tensor(theirs, params[ours].T.shape)
    D, C, p = cfg.n_embd, cfg.channels, cfg.patch_size
    conv_DxCxpxp = source.tensor("pos_embed.proj.weight", (D, C, p, p))
    params["patch_embed/kernel"][...] = conv_DxCxpxp.transpose(2, 3, 1, 0).reshape(p * p * C, D)
    params["patch_embed/bias"][...] = source.tensor("pos_embed.proj.bias", (D,))
    if not has_picture:
        _without_picture(params)
    return unflatten_dict(params, sep="/")


def save(params, cfg: PixArtConfig, folder) -> None:
    """A folder that `diffusers.PixArtTransformer2DModel.from_pretrained` loads; complete or not there.

    Raises:
      UserError: diffusers has no such model, `folder` holds anything but an earlier export, or the disk is full.
    """
    if cfg.mlp_ratio != 4:
        raise UserError(f"model.mlp_ratio={cfg.mlp_ratio} cannot be exported: diffusers' {CLASS} has MLPs of 4 n_embd")
    params = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    D, C, p = cfg.n_embd, cfg.channels, cfg.patch_size
    conv_DxCxpxp = params["patch_embed/kernel"].reshape(p, p, C, D).transpose(3, 2, 0, 1)
    tensors = {"pos_embed.proj.weight": conv_DxCxpxp, "pos_embed.proj.bias": params["patch_embed/bias"]}
    for ours, theirs in _BLOCKS.items():
        tensors |= {theirs.format(i): layer.T for i, layer in enumerate(params[ours])}
    tensors |= {_IN_BLOCK.format(i): table for i, table in enumerate(params[_BLOCK_TABLE])}
    tensors[_IN_FINAL] = params[_FINAL_TABLE]
    tensors |= {theirs: params[ours].T for ours, theirs in _REST.items() if ours in params}
    write_folder(folder, _config_json(cfg), tensors, DIFFUSERS)


def lora_module(cfg: PixArtConfig, path: tuple[str, ...], layer: int | None) -> Module:
    """Where the LoRA of a matrix of ours belongs there (convert/diffusers_lora.py).

    Raises:
      UserError: diffusers has no such matrix.
    """
    name = "/".join((*path, "kernel"))
    if name not in _BLOCKS | _REST:
        raise UserError(f"diffusers has no place for a LoRA of {'/'.join(path)}: export it merged")
    return Module((_BLOCKS | _REST)[name].format(layer).removesuffix(".weight"))


def _without_picture(params: dict) -> None:
    """What embeds size and aspect, if the model has it, ends in zero; what is before it comes from the seed."""
    for name in _PICTURE:
        if name in params and "/fc2/" in name:
            params[name][...] = 0
        elif name in params:
            del params[name]


def _shapes(cfg: PixArtConfig) -> dict:
    """Our path -> shape and dtype; kernels and remat, which only say how to compute, may not suit this machine."""
    cfg = dataclasses.replace(cfg, kernels="xla", remat="none")
    image = jnp.zeros((1, cfg.patch_size, cfg.patch_size, cfg.channels))
    text = {"context_BxSxE": jnp.zeros((1, 1, cfg.context_dim)), "length_B": jnp.ones(1, jnp.int32)}
    condition = text | {"size_Bx2": jnp.zeros((1, 2)), "aspect_B": jnp.zeros(1)}
    shapes = jax.eval_shape(lambda: PixArt(cfg).init(jax.random.key(0), image, jnp.zeros(1), condition)["params"])
    return flatten_dict(shapes, sep="/")


def _check_config(source: HuggingFaceFolder, cfg: PixArtConfig) -> bool:
    """True if the folder's model has micro-conditions."""
    theirs = DEFAULTS | source.config
    C, D = theirs["in_channels"], theirs["num_attention_heads"] * theirs["attention_head_dim"]
    if theirs["out_channels"] is None:
        theirs["out_channels"] = C
    source.check_sizes(theirs, DEFAULTS)
    source.check_fixed(theirs, FIXED, "PixArt as its authors made it")
    if theirs["out_channels"] not in (C, 2 * C) or theirs["cross_attention_dim"] != D:
        raise UserError(
            f"{source.path / 'config.json'}: out_channels={theirs['out_channels']} must be in_channels={C} or twice that, "
            f"and cross_attention_dim={theirs['cross_attention_dim']} the model's width, {D}; not supported"
        )
    side = theirs["sample_size"]
    has_picture = theirs.get("use_additional_conditions")
    has_picture = side == 128 if has_picture is None else has_picture
    wanted = {
        "channels": C,
        "patch_size": theirs["patch_size"],
        "n_layer": theirs["num_layers"],
        "n_head": theirs["num_attention_heads"],
        "n_embd": D,
        "mlp_ratio": 4,
        "learn_sigma": theirs["out_channels"] == 2 * C,
        "context_dim": theirs["caption_channels"],
    }
    if side == cfg.image_size:
        scale = theirs.get("interpolation_scale")
        wanted["interpolation_scale"] = float(max(side // 64, 1) if scale is None else scale)
    if has_picture:
        wanted["micro_conditions"] = True
    source.check_fields(wanted, cfg)
    return has_picture


def _config_json(cfg: PixArtConfig) -> dict:
    return dit.config_json(cfg, CLASS, FIXED) | {
        "cross_attention_dim": cfg.n_embd,
        "caption_channels": cfg.context_dim,
        "use_additional_conditions": cfg.micro_conditions,
        "interpolation_scale": cfg.interpolation_scale,
    }


def _is_dit(config: dict) -> bool:
    return config["_class_name"] == dit.CLASS or config.get("norm_type") == "ada_norm_zero"


def from_dit(source: HuggingFaceFolder, cfg: PixArtConfig) -> dict:
    """What a DiT in diffusers' layout gives of `PixArt(cfg)`; the text's side is left to the seed."""
    theirs = dit.DEFAULTS | source.config
    source.check_sizes(theirs, ("sample_size", "patch_size", "num_embeds_ada_norm"))
    source.check_fields({"patch_size": theirs["patch_size"]}, cfg)
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(DiTConfig) if f.name != "num_classes"}
    fields |= {
        "image_size": theirs["sample_size"],
        "num_classes": theirs["num_embeds_ada_norm"],
    }  # of no weight of ours
    of_dit = flatten_dict(dit.load_params(source.path, DiTConfig(**fields)), sep="/")
    params = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in _shapes(cfg).items()}
    drawn = [name for name in params if name.startswith(("y_embed/", "blocks/cross_attn/"))]
    of_dit |= _reparameterised(of_dit)
    for leaf, _ in _LEAVES:
        parts = np.split(of_dit[f"blocks/attn/c_attn/{leaf}"], 3, axis=-1)
        of_dit |= {f"blocks/attn/c_{part}/{leaf}": x for part, x in zip("qkv", parts, strict=True)}
    for name in params.keys() - drawn - _PICTURE.keys():
        params[name][...] = of_dit[name]
    _without_picture(params)
    return unflatten_dict({name: x for name, x in params.items() if name not in drawn}, sep="/")


def _reparameterised(of_dit: dict) -> dict:
    """t_embed's last bias, t_block and the tables, in fp32."""
    f32 = {
        name: np.asarray(x, np.float32) for name, x in of_dit.items() if "/attn/" not in name and "/mlp/" not in name
    }
    silu = lambda x: x / (1 + np.exp(-x))
    bias_D = f32["t_embed/fc2/bias"] + f32["y_embed/table/embedding"][-1]  # of t and of "no class"
    features_F = np.asarray(timestep_features(jnp.array([SAME_AT])))[0]
    hidden_D = silu(features_F @ f32["t_embed/fc1/kernel"] + f32["t_embed/fc1/bias"])
    c_D = hidden_D @ f32["t_embed/fc2/kernel"] + bias_D
    kernels_LxDx6D, biases_Lx6D = f32["blocks/ada/kernel"], f32["blocks/ada/bias"]
    modulations_Lx6D = silu(c_D) @ kernels_LxDx6D + biases_Lx6D
    last_2D = silu(c_D) @ f32["final/ada/kernel"] + f32["final/ada/bias"]
    D = len(c_D)
    return {
        "t_embed/fc2/bias": bias_D,
        "t_block/kernel": kernels_LxDx6D.mean(0),
        "t_block/bias": biases_Lx6D.mean(0),
        _BLOCK_TABLE: (modulations_Lx6D - modulations_Lx6D.mean(0)).reshape(-1, 6, D),
        _FINAL_TABLE: last_2D.reshape(2, D) - c_D,
    }
