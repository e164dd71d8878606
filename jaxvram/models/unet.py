"""U-Nets that denoise: of pixels (Ho et al. 2020, arXiv:2006.11239), and Stable Diffusion's, of latents beside a text.

h_0 = conv(x);  e = W silu(W sines(t)) [+ class];  down, level by level:  h = res(h, e) [, attend(h)], twice;  then half
the size, by a convolution of stride 2, but for the last;  res, attend, res in the middle;  up the same way, once more a
level:  h = res([h, skip], e) [, attend(h)], where `skip` is what the way down left last;  then twice the size.
In the end  conv(silu(norm(h))).  `attend` is attention among places, or, with a text, a transformer block with
cross-attention (Rombach et al. 2022, arXiv:2112.10752).

Matrices and convolutions start as PyTorch's do, U(-b, b) with b = 1 / sqrt(fan in), biases at 0, and at 0 too what ends a
branch and the model, as in Ho et al. and latent diffusion. Written from the papers; diffusers 0.42's UNet2DModel and
UNet2DConditionModel were read for numbers.
"""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError, nearest
from jaxvram.kernels.backend import IMPLEMENTATIONS
from jaxvram.layers.conditioning import LabelEmbed, timestep_features
from jaxvram.layers.conv import Conv
from jaxvram.layers.group_norm import GroupNorm
from jaxvram.layers.image_attention import ImageAttention, ImageTransformer
from jaxvram.layers.linear import Linear, fan_in_uniform
from jaxvram.layers.resnet import Downsample, ResBlock, Upsample
from jaxvram.models.text_encoder import SmallTextConfig, SmallTextEncoder

REMAT = ("none", "full")
DTYPES = ("bfloat16", "float32")
ZEROS = nn.initializers.zeros

_SD = {"channels": 4, "multipliers": (1, 2, 4, 4), "attention_levels": (0, 1, 2)}
_SMALL = _SD | {"image_size": 32, "context_dim": 256, "context_length": 64, "head_dim": 32}
SIZES = {
    "pixel64": {},  # the defaults: 113.7 M, what diffusers' example of unconditional training has
    "sd1": _SD | {"width": 320, "heads": 8, "head_dim": 0, "context_dim": 768, "context_length": 77},  # 859.5 M
    **{f"sd{width}": _SMALL | {"width": width} for width in (32, 64, 96, 128, 192)},  # 9 to 307 M
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    REMATS: ClassVar = REMAT
    image_size: int = 64  # H = W of what is denoised: pixels, or latents
    channels: int = 3  # C
    num_classes: int = 0  # 0: unconditional, or told by a text
    learn_sigma: bool = False  # a second C channels: the variance, between its bounds (Nichol & Dhariwal 2021)
    width: int = 128  # D, channels at the first level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)  # channels of each level, in D; each has half the last one's size
    res_blocks: int = 2  # a level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (4,)  # with attention, the first is 0; the middle always has it
    heads: int = 0  # H, the same at each level; 0: by head_dim
    head_dim: int = 8  # K; 0: by heads
    groups: int = 32  # of group norms
    context_dim: int = 0  # E, width of a text's features; 0: no text
    context_length: int = 77  # S, tokens of a text
    text_layers: int = 0  # of a text encoder of its own, trained with it, width E (models/text_encoder.py); 0: none
    text_heads: int = 4
    text_ngrams: tuple[int, ...] = ()  # runs of so many bytes have embeddings of their own in it
    dropout: float = 0.0  # within residual blocks
    remat: str = "full"  # none | full: the backward pass computes each residual and attention block again
    dtype: str = "bfloat16"  # of products: bfloat16 | float32
    param_dtype: str = "float32"  # of parameters
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: attention

    def __post_init__(self):
        for field, valid in (
            ("remat", REMAT), ("kernels", IMPLEMENTATIONS), ("dtype", DTYPES), ("param_dtype", DTYPES),
        ):  # fmt: skip
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, valid)}")
        sizes = (self.image_size, self.channels, self.width, self.res_blocks, self.groups, self.context_length)
        if min(sizes) < 1 or min(self.num_classes, self.context_dim, self.text_layers) < 0 or not 0 <= self.dropout < 1:
            raise UserError("model: every size must be at least 1, dropout in [0, 1)")
        self._check_levels()
        self._check_widths()
        if self.num_classes and self.context_dim:
            raise UserError(
                "model: it is told of a class (num_classes) or by a text (context_dim); set one of them to 0"
            )
        if self.text_layers and (not self.context_dim or self.context_dim % self.text_heads):
            raise UserError("model.text_layers: its encoder's width, context_dim, must be a multiple of text_heads")
        if self.text_ngrams and not self.text_layers:
            raise UserError("model.text_ngrams belongs to a text encoder of its own: set model.text_layers too")
        _ = self.text  # which checks itself

    def _check_levels(self):
        levels = len(self.multipliers)
        if not levels or self.multipliers[0] != 1 or not all(type(m) is int and m > 0 for m in self.multipliers):
            raise UserError(f"model.multipliers={self.multipliers} must be whole numbers, the first of them 1")
        if wrong := [level for level in self.attention_levels if level not in range(levels)]:
            raise UserError(f"model.attention_levels: there is no level {wrong[0]}; the {levels} levels begin at 0")
        if self.image_size % 2 ** (levels - 1):
            which = f"model.image_size={self.image_size} is halved {levels - 1} times"
            raise UserError(f"{which}: it must be a multiple of {2 ** (levels - 1)}, or model.multipliers shorter")

    def _check_widths(self):
        if self.width % self.groups:
            raise UserError(f"model.width={self.width} is not a multiple of model.groups={self.groups}")
        if self.width % 2:
            raise UserError(f"model.width={self.width} must be even")
        if (self.heads > 0) == (self.head_dim > 0):
            raise UserError("model.heads or model.head_dim says how many heads there are; set the other to 0")
        per_level = self.heads or self.head_dim
        for m in {self.multipliers[level] for level in (*self.attention_levels, -1)}:
            if m * self.width % per_level:
                field = "heads" if self.heads else "head_dim"
                raise UserError(f"model.{field}={per_level} does not divide a level's {m * self.width} channels")

    @classmethod
    def of_size(cls, name: str, **fields) -> "UNetConfig":
        """'pixel64', 'sd1' (Stable Diffusion 1), or 'sd128' and so on: its shape with fewer channels."""
        if name not in SIZES:
            raise UserError(f"{name!r} is no size of U-Net{nearest(name, SIZES)}")
        return cls(**(SIZES[name] | fields))

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    def channels_at(self, level: int) -> int:
        return self.width * self.multipliers[level]

    def heads_at(self, level: int) -> int:
        return self.heads or self.channels_at(level) // self.head_dim

    @property
    def text(self) -> SmallTextConfig | None:
        """Of the encoder trained with it."""
        if not self.text_layers:
            return None
        return SmallTextConfig(
            length=self.context_length, n_layer=self.text_layers, n_head=self.text_heads, n_embd=self.context_dim,
            ngrams=self.text_ngrams, remat=self.remat, unroll_layers=self.remat == "none", dtype=self.dtype,
            param_dtype=self.param_dtype, kernels=self.kernels,
        )  # fmt: skip


class UNet(nn.Module):
    """A noisy image, its timestep, and its class or text to what the task predicts: a denoiser (tasks/diffusion.py)."""

    cfg: UNetConfig

    @nn.compact
    def __call__(self, x_BxHxWxC, t_B, condition=None, deterministic: bool = True):
        """(B, H, W, C) in fp32, or 2 C with learn_sigma: the prediction, then the variance's place between its bounds.

        Args:
          x_BxHxWxC: H = W = image_size.
          t_B: timesteps on the scale of 0 to 1000, whole or not.
          condition: None; with num_classes, int32 labels_B in [0, num_classes], the last for "no class"; with context_dim a
            dict of "context_BxSxE" (features), or, with text_layers, "tokens_BxS" (int32), and of "length_B", how many
            tokens of each text count.
        """
        cfg = self.cfg
        H = W = cfg.image_size
        if x_BxHxWxC.shape[1:] != (H, W, cfg.channels):
            raise ValueError(f"an image of {x_BxHxWxC.shape[1:]} for a model of {(H, W, cfg.channels)}")
        if (condition is None) != (cfg.num_classes == cfg.context_dim == 0):
            has = f"num_classes={cfg.num_classes}, context_dim={cfg.context_dim}"
            raise ValueError(f"a condition belongs to a model with classes or text, and this one has {has}")
        t_BxE = self._embed_time(t_B, condition)
        text = self._read(condition, deterministic) if cfg.context_dim else ()
        res = lambda name, level: _remat(cfg, ResBlock, 3)(
            cfg.channels_at(level), cfg.groups, dropout=cfg.dropout, **_dtypes(cfg), out_init=ZEROS, name=name
        )
        attend = functools.partial(_attend, cfg, text)
        last = len(cfg.multipliers) - 1
        h = Conv(cfg.width, **_dtypes(cfg), name="conv_in")(x_BxHxWxC)
        skips = [h]
        for level in range(last + 1):
            for i in range(cfg.res_blocks):
                h = res(f"down_{level}_res_{i}", level)(h, t_BxE, deterministic)
                h = attend(f"down_{level}_spatial_{i}", level, h)
                skips.append(h)
            if level < last:
                h = Downsample(cfg.channels_at(level), **_dtypes(cfg), name=f"down_{level}_sample")(h)
                skips.append(h)
        h = res("mid_res_0", last)(h, t_BxE, deterministic)
        h = attend("mid_spatial", last, h, always=True)
        h = res("mid_res_1", last)(h, t_BxE, deterministic)
        for level in reversed(range(last + 1)):
            for i in range(cfg.res_blocks + 1):
                h = res(f"up_{level}_res_{i}", level)((h, skips.pop()), t_BxE, deterministic)
                h = attend(f"up_{level}_spatial_{i}", level, h)
            if level:
                h = _remat(cfg, Upsample)(cfg.channels_at(level), **_dtypes(cfg), name=f"up_{level}_sample")(h)
        h = GroupNorm(cfg.groups, silu=True, **_dtypes(cfg), name="norm_out")(h)
        return Conv(cfg.out_channels, kernel_init=ZEROS, **_dtypes(cfg), name="conv_out")(h).astype(jnp.float32)

    def _embed_time(self, t_B, condition):
        """4 D numbers a sample: of its timestep, and of its class where there are classes."""
        cfg = self.cfg
        dense = lambda name: Linear(4 * cfg.width, kernel_init=fan_in_uniform(), **_dtypes(cfg), name=name)
        features = timestep_features(t_B, cfg.width).astype(cfg.dtype)
        t_BxE = dense("time_fc2")(jax.nn.silu(dense("time_fc1")(features)))
        if cfg.num_classes:
            t_BxE += LabelEmbed(cfg.num_classes, 4 * cfg.width, **_dtypes(cfg), name="y_embed")(condition)
        return t_BxE

    def _read(self, condition: dict, deterministic: bool):
        """(features of the text (B, S, E), tokens that count)."""
        length_B = condition["length_B"]
        if not self.cfg.text_layers:
            return condition["context_BxSxE"].astype(self.cfg.dtype), length_B
        encoder = SmallTextEncoder(self.cfg.text, name="text")
        return encoder(condition["tokens_BxS"], length_B, deterministic), length_B


def _dtypes(cfg: UNetConfig) -> dict:
    return {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}


def _remat(cfg: UNetConfig, block: type[nn.Module], *static: int) -> type[nn.Module]:
    """The block, of which with remat only what goes in is kept."""
    return block if cfg.remat == "none" else nn.remat(block, static_argnums=static)


def _attend(cfg: UNetConfig, text: tuple, name: str, level: int, h, always: bool = False):
    """h after attention among its places, and to the text; h itself at levels that have none."""
    if level not in cfg.attention_levels and not always:
        return h
    block = _remat(cfg, ImageTransformer if text else ImageAttention)
    options = _dtypes(cfg) | {"out_init": ZEROS, "kernels": cfg.kernels, "name": name}
    return block(cfg.heads_at(level), cfg.groups, **options)(h, *text)
