"""AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752; its f8 is Stable Diffusion's): images to latents and back.

  encoder: conv, for each level `res_blocks` residual blocks, then half the side; the middle; norm, silu, conv
  middle:  a residual block, x += attention(norm(x)) over all places with one head, a residual block
  [mean, logvar] = 1x1(encoder(x)), logvar held in [-30, 20];  z = mean + exp(logvar / 2) eps
  decoder: 1x1, conv, the middle, for each level from the last one more residual block, then twice the side by repeating
  x' = conv(silu(norm(decoder(z))))
A block is x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1x1 where the width changes; norms are by groups, eps
1e-6. To halve, a row and a column of zeros are added at the bottom and on the right alone.
Matrices and kernels ~ U(-1 / sqrt(fan in), 1 / sqrt(fan in)), biases 0.
"""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from jaxvram.errors import UserError, nearest
from jaxvram.kernels.attention import LARGEST_HEAD
from jaxvram.kernels.backend import IMPLEMENTATIONS
from jaxvram.layers.attention import SelfAttention
from jaxvram.layers.conv import Conv
from jaxvram.layers.group_norm import GroupNorm
from jaxvram.layers.linear import Linear, fan_in_uniform
from jaxvram.layers.resnet import Downsample, ResBlock, Upsample

EPSILON = 1e-6
LOGVAR = (-30.0, 20.0)
REMAT = ("none", "full")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    REMATS: ClassVar = REMAT
    image_size: int = 256  # H = W of what it learns from; any multiple of `downsample` goes through
    channels: int = 3  # C of images
    latent_channels: int = 4
    width: int = 128  # channels of the first level
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of it, by level; each level has half the side of the one before
    res_blocks: int = 2  # residual blocks, in the decoder one more
    groups: int = 32
    remat: str = "full"  # none | full: what the backward pass computes again, block by block
    dtype: str = "bfloat16"  # of convolutions and matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of parameters
    kernels: str = "auto"  # auto | xla; pallas | interpret where the last level has 256 channels or fewer: attention

    def __post_init__(self):
        for field, valid in (
            ("remat", REMAT), ("kernels", IMPLEMENTATIONS), ("dtype", ("bfloat16", "float32")),
            ("param_dtype", ("bfloat16", "float32")),
        ):  # fmt: skip
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, valid)}")
        if not self.multipliers or not all(type(m) is int and m > 0 for m in self.multipliers):
            raise UserError(f"model.multipliers={self.multipliers} must be whole numbers of at least 1, as (1, 2, 4, 4)")
        sizes = (self.channels, self.latent_channels, self.width, self.res_blocks, self.groups)
        if min(sizes) < 1:
            raise UserError("model: every size must be at least 1")
        if self.image_size < 1 or self.image_size % self.downsample:
            which = f"model.image_size={self.image_size}"
            raise UserError(f"{which} is no multiple of {self.downsample}, the pixels of a latent (model.multipliers)")
        if odd := [width for width in self.widths if width % self.groups]:
            raise UserError(f"model.groups={self.groups} does not divide a level's {odd[0]} channels")
        if self.kernels in ("pallas", "interpret") and self.widths[-1] > LARGEST_HEAD:
            raise UserError(
                f"model.kernels={self.kernels}: the middle's one head is {self.widths[-1]} wide, and kernels take up to "
                f"{LARGEST_HEAD}; leave it auto"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels by level."""
        return tuple(self.width * m for m in self.multipliers)

    @property
    def downsample(self) -> int:
        """Pixels of an image, a side, for one place of its latents: 2^(levels - 1)."""
        return 2 ** (len(self.multipliers) - 1)


def _dtypes(cfg: AutoencoderConfig) -> dict:
    return {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}


def _block(cfg: AutoencoderConfig, module):
    """A module whose backward pass keeps what goes in and makes the rest again, where remat says so."""
    return nn.remat(module) if cfg.remat == "full" else module


def _res(cfg: AutoencoderConfig, features: int, name: str):
    return _block(cfg, ResBlock)(features, cfg.groups, EPSILON, **_dtypes(cfg), name=name)


class PlaceAttention(nn.Module):
    """x += attention(norm(x)): every place sees every place, through one head as wide as there are channels."""

    cfg: AutoencoderConfig

    @nn.compact
    def __call__(self, x_BxHxWxC):
        cfg, (B, H, W, C) = self.cfg, x_BxHxWxC.shape
        dense = functools.partial(Linear, **_dtypes(cfg))
        inits = dict.fromkeys(("kernel_init", "proj_init"), fan_in_uniform())
        kernels = "xla" if C > LARGEST_HEAD else cfg.kernels
        attn = SelfAttention(1, dense, **inits, causal=False, kernels=kernels, name="attn")
        h = GroupNorm(cfg.groups, EPSILON, **_dtypes(cfg), name="norm")(x_BxHxWxC)
        return x_BxHxWxC + attn(h.reshape(B, H * W, C))[0].reshape(x_BxHxWxC.shape)


class Middle(nn.Module):
    """What both halves have at the smallest side."""

    cfg: AutoencoderConfig

    @nn.compact
    def __call__(self, x_BxHxWxC):
        cfg, C = self.cfg, x_BxHxWxC.shape[-1]
        x_BxHxWxC = _res(cfg, C, "resnet_0")(x_BxHxWxC)
        x_BxHxWxC = _block(cfg, PlaceAttention)(cfg, name="attention")(x_BxHxWxC)
        return _res(cfg, C, "resnet_1")(x_BxHxWxC)


class Down(nn.Module):
    """A level of the encoder."""

    cfg: AutoencoderConfig
    features: int
    is_last: bool

    @nn.compact
    def __call__(self, x):
        for i in range(self.cfg.res_blocks):
            x = _res(self.cfg, self.features, f"resnet_{i}")(x)
        if self.is_last:
            return x
        return _block(self.cfg, Downsample)(self.features, (0, 1), **_dtypes(self.cfg), name="downsample")(x)


class Up(nn.Module):
    """A level of the decoder."""

    cfg: AutoencoderConfig
    features: int
    is_last: bool

    @nn.compact
    def __call__(self, x):
        for i in range(self.cfg.res_blocks + 1):
            x = _res(self.cfg, self.features, f"resnet_{i}")(x)
        return x if self.is_last else _block(self.cfg, Upsample)(self.features, **_dtypes(self.cfg), name="upsample")(x)


class Encoder(nn.Module):
    """(B, H, W, C) to (B, h, w, 2 z) in fp32."""

    cfg: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        x = Conv(cfg.widths[0], **_dtypes(cfg), name="conv_in")(x)
        for i, width in enumerate(cfg.widths):
            x = Down(cfg, width, i == len(cfg.widths) - 1, name=f"down_{i}")(x)
        x = Middle(cfg, name="mid")(x)
        of_last = {"dtype": jnp.float32, "param_dtype": cfg.param_dtype}
        x = GroupNorm(cfg.groups, EPSILON, silu=True, **of_last, name="norm_out")(x)
        return Conv(2 * cfg.latent_channels, **of_last, name="conv_out")(x)


class Decoder(nn.Module):
    """(B, h, w, z) to what the last convolution reads, (B, H, W, first level's channels)."""

    cfg: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        x = Conv(cfg.widths[-1], **_dtypes(cfg), name="conv_in")(x)
        x = Middle(cfg, name="mid")(x)
        for i, width in enumerate(reversed(cfg.widths)):
            x = Up(cfg, width, i == len(cfg.widths) - 1, name=f"up_{i}")(x)
        return GroupNorm(cfg.groups, EPSILON, silu=True, **_dtypes(cfg), name="norm_out")(x)


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] to a normal distribution of latents, and latents to images.

    `decode` is `decode_to_last`, then `to_image`, one convolution, by whose kernel a discriminator is weighed.
    """

    cfg: AutoencoderConfig

    def setup(self):
        cfg = self.cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        by_place = functools.partial(
            Linear, dtype=jnp.float32, param_dtype=cfg.param_dtype, kernel_init=fan_in_uniform()
        )
        self.quant, self.post_quant = by_place(2 * cfg.latent_channels), by_place(cfg.latent_channels)
        self.conv_out = Conv(cfg.channels, **_dtypes(cfg))

    def encode(self, x_BxHxWxC):
        """(mean, log of the variance) of the latents, each (B, H / downsample, W / downsample, latent_channels), fp32."""
        cfg, (H, W, C) = self.cfg, x_BxHxWxC.shape[1:]
        if C != cfg.channels or H % cfg.downsample or W % cfg.downsample:
            raise ValueError(f"an image of {(H, W, C)} for {cfg.channels} channels and sides that {cfg.downsample} divides")
        mean, logvar = jnp.split(self.quant(self.encoder(x_BxHxWxC)), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR)

    def decode_to_last(self, z_BxhxwxZ):
        return self.decoder(self.post_quant(z_BxhxwxZ))

    def to_image(self, last_BxHxWxD):
        return self.conv_out(last_BxHxWxD).astype(jnp.float32)

    def decode(self, z_BxhxwxZ):
        """(B, H, W, C) in fp32."""
        return self.to_image(self.decode_to_last(z_BxhxwxZ))

    def __call__(self, x_BxHxWxC):
        """The image again, through the mean of its latents."""
        return self.decode(self.encode(x_BxHxWxC)[0])
