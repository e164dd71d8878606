"""DiT's weights from and to a folder of diffusers' DiTTransformer2DModel.

Ours are stacked along a leading layer axis; q, k and v, side by side here, are three there; a Linear of theirs is
[out, in]; the patches' matrix (p p C, D) is a convolution's (D, C, p, p). Each block of theirs has its own copy of the
embedders of t and y: an export writes the copies, an import takes block 0's and refuses copies that differ.

diffusers runs the model with other timesteps: it spaces their frequencies by 1/127 of the range where the authors have
1/128 (`downscale_freq_shift=1`); and unless told otherwise its second norm adds 1e-5 where theirs adds 1e-6. Weights
are the same on both sides: the authors trained theirs with their own numbers, and with those our model runs them. An
export says 1e-6; the frequencies config.json cannot say, so `save` prints the line that sets them.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvram.convert.huggingface import DIFFUSERS, HuggingFaceFolder, write_folder
from jaxvram.errors import UserError
from jaxvram.layers.patches import sincos_positions
from jaxvram.models.dit import DiT, DiTConfig

CLASS = "DiTTransformer2DModel"
CLASSES = (CLASS, "Transformer2DModel")  # the second: what it was a part of in older versions
DEFAULTS = {  # what diffusers takes for a key that config.json leaves out
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,  # as many as in_channels
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
FIXED = {  # what our DiT is, and config.json may change
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6, 1e-5),  # the second is the default of diffusers
}
COPIES = 1e-6  # of the largest element: copies that differ by more differ by more than rounding
FREQUENCIES = """\
diffusers' timestep frequencies are not quite the paper's; after from_pretrained, for the outputs of this model:
  for block in model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"""

_LEAVES = (("kernel", "weight"), ("bias", "bias"))
_BLOCKS = {  # our parameter -> theirs with {} for the block, side by side in ours where there are several
    f"blocks/{ours}/{leaf}": [f"transformer_blocks.{{}}.{module}.{name}" for module in theirs]
    for leaf, name in _LEAVES
    for ours, theirs in (
        ("ada", ["norm1.linear"]),
        ("attn/c_attn", ["attn1.to_q", "attn1.to_k", "attn1.to_v"]),
        ("attn/c_proj", ["attn1.to_out.0"]),
        ("mlp/c_fc", ["ff.net.0.proj"]),
        ("mlp/c_proj", ["ff.net.2"]),
    )
}
_TABLE = "y_embed/table/embedding"  # no matrix: not transposed
_EMBEDDERS = {  # the same, with a copy in each block
    f"t_embed/{ours}/{leaf}": f"transformer_blocks.{{}}.norm1.emb.timestep_embedder.{theirs}.{name}"
    for leaf, name in _LEAVES
    for ours, theirs in (("fc1", "linear_1"), ("fc2", "linear_2"))
} | {_TABLE: "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"}
_FINAL = {
    f"final/{ours}/{leaf}": f"{theirs}.{name}"
    for leaf, name in _LEAVES
    for ours, theirs in (("ada", "proj_out_1"), ("linear", "proj_out_2"))
}


def load_params(folder, cfg: DiTConfig) -> dict:
    """Parameters of `DiT(cfg)` as NumPy arrays in cfg.param_dtype (the tree inside of "params").

    `folder` is the model's, or that of a whole DiTPipeline.

    Raises:
      UserError: the folder is incomplete, damaged, or holds another model than `cfg`; the message names the overrides.
    """
    folder = pathlib.Path(folder).expanduser()
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    source = HuggingFaceFolder(folder, *CLASSES, layout=DIFFUSERS)
    _check_config(source, cfg)
    _check_positions(source, cfg)
    params = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _shapes(cfg).items()}
    for ours, theirs in _BLOCKS.items():
        for name, part in zip(theirs, np.split(params[ours], len(theirs), axis=-1), strict=True):  # views
            source.read_layers(name, part, transposed=True)
    for ours, theirs in _EMBEDDERS.items():
        mine = params[ours] if ours == _TABLE else params[ours].T
        mine[...] = _the_one_copy(source, cfg.n_layer, theirs, mine.shape)
    for ours, theirs in _FINAL.items():
        params[ours].T[...] = source.tensor(theirs, params[ours].T.shape)
    D, C, p = cfg.n_embd, cfg.channels, cfg.patch_size
    conv_DxCxpxp = source.tensor("pos_embed.proj.weight", (D, C, p, p))
    params["patch_embed/kernel"][...] = conv_DxCxpxp.transpose(2, 3, 1, 0).reshape(p * p * C, D)
    params["patch_embed/bias"][...] = source.tensor("pos_embed.proj.bias", (D,))
    return unflatten_dict(params, sep="/")


def save(params, cfg: DiTConfig, folder) -> None:
    """A folder that `diffusers.DiTTransformer2DModel.from_pretrained` loads; complete or not there.

    Raises:
      UserError: diffusers has no such model, `folder` holds anything but an earlier export, or the disk is full.
    """
    _check_expressible(cfg)
    params = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    D, C, p = cfg.n_embd, cfg.channels, cfg.patch_size
    conv_DxCxpxp = params["patch_embed/kernel"].reshape(p, p, C, D).transpose(3, 2, 0, 1)
    tensors = {"pos_embed.proj.weight": conv_DxCxpxp, "pos_embed.proj.bias": params["patch_embed/bias"]}
    for ours, theirs in _BLOCKS.items():
        for name, part in zip(theirs, np.split(params[ours], len(theirs), axis=-1), strict=True):
            tensors |= {name.format(i): layer.T for i, layer in enumerate(part)}
    for ours, theirs in _EMBEDDERS.items():
        copy = np.ascontiguousarray(params[ours] if ours == _TABLE else params[ours].T)
        tensors |= {theirs.format(i): copy for i in range(cfg.n_layer)}
    tensors |= {theirs: params[ours].T for ours, theirs in _FINAL.items()}
    write_folder(folder, _config_json(cfg), tensors, DIFFUSERS)
    print(FREQUENCIES)


def _shapes(cfg: DiTConfig) -> dict:
    """Our path -> shape and dtype; kernels and remat, which only say how to compute, may not suit this machine."""
    cfg = dataclasses.replace(cfg, kernels="xla", remat="none")
    image = jnp.zeros((1, cfg.image_size, cfg.image_size, cfg.channels))
    number = jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(lambda: DiT(cfg).init(jax.random.key(0), image, number, number)["params"])
    return flatten_dict(shapes, sep="/")


def _the_one_copy(source: HuggingFaceFolder, n_layer: int, name: str, shape) -> np.ndarray:
    """What block 0 has under `name`, and all others too."""
    read = lambda i: source.tensor(name.format(i), shape)
    first = read(0)
    limit = COPIES * np.abs(first).max()
    for i in range(1, n_layer):
        apart = np.abs(read(i) - first).max()
        if not apart <= limit:  # NaN too
            raise UserError(
                f"{source.path}: {name.format(i)} is not block 0's (up to {float(apart):.1e} apart): these blocks were "
                "trained with embedders of their own; DiT has one for all, as models converted from its authors' have"
            )
    return first


def _check_config(source: HuggingFaceFolder, cfg: DiTConfig) -> None:
    theirs = DEFAULTS | source.config
    C = theirs["in_channels"]
    if theirs["out_channels"] is None:
        theirs["out_channels"] = C
    source.check_sizes(theirs, DEFAULTS)
    source.check_fixed(theirs, FIXED, "DiT as its authors made it")
    if theirs["out_channels"] not in (C, 2 * C):
        raise UserError(
            f"{source.path / 'config.json'}: out_channels={theirs['out_channels']} is neither in_channels={C} nor "
            "twice that (with a learned variance); not supported"
        )
    wanted = {
        "image_size": theirs["sample_size"],
        "channels": C,
        "patch_size": theirs["patch_size"],
        "num_classes": theirs["num_embeds_ada_norm"],
        "n_layer": theirs["num_layers"],
        "n_head": theirs["num_attention_heads"],
        "n_embd": theirs["num_attention_heads"] * theirs["attention_head_dim"],
        "mlp_ratio": 4,
        "learn_sigma": theirs["out_channels"] == 2 * C,
    }
    source.check_fields(wanted, cfg)


def _check_positions(source: HuggingFaceFolder, cfg: DiTConfig) -> None:
    """Folders of old versions hold the table; ours is computed."""
    name, side = "pos_embed.pos_embed", cfg.image_size // cfg.patch_size
    if name not in source:
        return
    found_TxD = source.tensor(name, (1, cfg.tokens, cfg.n_embd))[0].astype(np.float32)
    if not np.abs(found_TxD - sincos_positions(cfg.n_embd, side, side)).max() < 0.01:  # half precision is within 0.004
        raise UserError(f"{source.path}: {name} is not DiT's table of fixed sines; not supported")


def _check_expressible(cfg: DiTConfig) -> None:
    """diffusers has one class for DiT, in which some sizes are not free."""
    if not cfg.num_classes:
        raise UserError(f"model.num_classes=0 cannot be exported: diffusers' {CLASS} always asks for a class")
    if cfg.mlp_ratio != 4:
        raise UserError(f"model.mlp_ratio={cfg.mlp_ratio} cannot be exported: diffusers' {CLASS} has MLPs of 4 n_embd")


def _config_json(cfg: DiTConfig) -> dict:
    return config_json(cfg, CLASS, FIXED) | {"num_embeds_ada_norm": cfg.num_classes}


def config_json(cfg: DiTConfig, kind: str, fixed: dict[str, tuple]) -> dict:
    """What diffusers' classes of such transformers have in common (PixArt's too), and what is the same for all of `kind`."""
    return {key: values[0] for key, values in fixed.items()} | {
        "_class_name": kind,
        "num_attention_heads": cfg.n_head,
        "attention_head_dim": cfg.n_embd // cfg.n_head,
        "in_channels": cfg.channels,
        "out_channels": cfg.out_channels,
        "num_layers": cfg.n_layer,
        "sample_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "dropout": 0.0,
    }
