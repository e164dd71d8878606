"""PixArt-alpha (Chen et al. 2023, arXiv:2310.00426): a diffusion transformer that a text tells what to draw.

x_0 = patches W + positions;  e = t_embed(t) [+ (size_embed(h), size_embed(w), aspect_embed(h / w)), side by side];
text = W_2 gelu(W_1 features);  once for all blocks, six vectors a sample,  m = W_t silu(e) + b_t  (adaLN-single);
  shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table + m        each block adds a table (6, D) of its own
  x += gate_1 attn(norm(x) (1 + scale_1) + shift_1);  x += cross_attn(x, text);        no norm there, and no gate
  x += gate_2 mlp(norm(x) (1 + scale_2) + shift_2);
at the end  norm(x) (1 + scale) + shift  by  shift, scale = table + e,  and a matrix, zero at the start, back to patches.
DiT's adaLN has a matrix W_ada (D, 6 D) in each block instead: a quarter of its parameters.
Matrices ~ Xavier uniform (of attn q, k, v as if one, of cross_attn k and v), what embeds and W_t ~ N(0, 0.02),
tables ~ N(0, 1 / D), W_out of cross_attn zero. Positions are fixed sines, stretched to the shape of each image.
Written from the paper and the maths; the authors' code was read for its numbers and not copied.
"""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.layers.conditioning import CaptionEmbed, TimestepEmbed
from jaxvram.layers.image_attention import Attention
from jaxvram.layers.linear import Linear
from jaxvram.layers.mlp import MLP
from jaxvram.layers.norms import ModulatedLayerNorm
from jaxvram.layers.patches import patchify, sincos_positions, unpatchify
from jaxvram.layers.stack import Stack
from jaxvram.models.dit import DiTConfig

XAVIER, ZEROS = nn.initializers.xavier_uniform(), nn.initializers.zeros
XAVIER_OF_2, XAVIER_OF_3 = (  # of one that is a half, a third, of a matrix (D, 2 D), (D, 3 D)
    nn.initializers.variance_scaling(2 / (1 + parts), "fan_avg", "uniform") for parts in (2, 3)
)


@dataclasses.dataclass(frozen=True)
class PixArtConfig(DiTConfig):
    """DiT's fields, without classes; XL/2 unless said otherwise. image_size: H = W that positions are counted by."""

    num_classes: ClassVar[int] = 0
    any_aspect: ClassVar[bool] = True  # images need not be square
    n_layer: int = 28  # L
    n_head: int = 16  # H
    n_embd: int = 1152  # D
    context_dim: int = 4096  # E, width of a text's features: T5-XXL's
    context_length: int = 120  # S, tokens of a text
    micro_conditions: bool = False  # told the picture's size and aspect (the authors' 1024 px model is)
    interpolation_scale: float = 1.0  # positions are divided by it: 2 at 1024 px, as the authors have it

    def __post_init__(self):
        super().__post_init__()
        if min(self.context_dim, self.context_length) < 1:
            raise UserError("model.context_dim and model.context_length must be at least 1: PixArt reads text")
        if self.micro_conditions and self.n_embd % 3:
            raise UserError(f"model.n_embd={self.n_embd} must be a multiple of 3 with model.micro_conditions=True")
        if self.interpolation_scale <= 0:
            raise UserError(f"model.interpolation_scale={self.interpolation_scale} must be positive")


def _table(module, vectors: int, cfg: PixArtConfig):
    """(vectors, D), the module's own."""
    return module.param("table", nn.initializers.normal(cfg.n_embd**-0.5), (vectors, cfg.n_embd), cfg.param_dtype)


def _modulation(table_NxD, m_BxNxD):
    """N of (B, D) each, in fp32: what all share and the table."""
    return jnp.moveaxis(table_NxD.astype(jnp.float32) + m_BxNxD, 1, 0)


class Block(nn.Module):
    """Attention to the image, to the text, and the MLP; whole images, so there is no state."""

    cfg: PixArtConfig

    @nn.compact
    def __call__(self, x_BxTxD, state, m_Bx6xD, text_BxSxD, length_B, deterministic: bool = True):
        cfg, dtypes = self.cfg, {"dtype": self.cfg.dtype, "param_dtype": self.cfg.param_dtype}
        attend = functools.partial(Attention, cfg.n_head, True, kernels=cfg.kernels, **dtypes)
        attn = attend(q_init=XAVIER_OF_3, kv_init=XAVIER_OF_3, out_init=XAVIER, name="attn")
        cross_attn = attend(q_init=XAVIER, kv_init=XAVIER_OF_2, out_init=ZEROS, name="cross_attn")
        dense = functools.partial(Linear, **dtypes)
        mlp = MLP(cfg.mlp_ratio * cfg.n_embd, "gelu_tanh", dense, kernel_init=XAVIER, proj_init=XAVIER, name="mlp")
        norm = ModulatedLayerNorm(dtype=cfg.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulation(_table(self, 6, cfg), m_Bx6xD)
        gated = lambda gate_BxD, y_BxTxD: gate_BxD.astype(cfg.dtype)[:, None] * y_BxTxD
        x_BxTxD += gated(gate_1, attn(norm(x_BxTxD, shift_1, scale_1)))
        x_BxTxD += cross_attn(x_BxTxD, text_BxSxD, length_B)
        x_BxTxD += gated(gate_2, mlp(norm(x_BxTxD, shift_2, scale_2)))
        return x_BxTxD, state


class Final(nn.Module):
    """The last norm, and back to p p C' numbers a patch, fp32."""

    cfg: PixArtConfig

    @nn.compact
    def __call__(self, x_BxTxD, e_BxD):
        cfg = self.cfg
        shift_BxD, scale_BxD = _modulation(_table(self, 2, cfg), e_BxD[:, None])
        x_BxTxD = ModulatedLayerNorm(dtype=cfg.dtype)(x_BxTxD, shift_BxD, scale_BxD)
        features = cfg.patch_size**2 * cfg.out_channels
        out = Linear(features, dtype=cfg.dtype, param_dtype=cfg.param_dtype, kernel_init=ZEROS, name="linear")(x_BxTxD)
        return out.astype(jnp.float32)


class PixArt(nn.Module):
    """A noisy image, its timestep and a text to what the task predicts: a denoiser (tasks/diffusion.py)."""

    cfg: PixArtConfig

    @nn.compact
    def __call__(self, x_BxHxWxC, t_B, condition=None, deterministic: bool = True):
        """(B, H, W, C) in fp32, or 2 C with learn_sigma: the prediction, then the variance's place between its bounds.

        Args:
          x_BxHxWxC: H and W any multiples of patch_size.
          t_B: timesteps on the scale of 0 to 1000, whole or not.
          condition: context_BxSxE, a text's features, of which the first length_B (int32) of each sample count; with
            micro_conditions also size_Bx2, the picture's height and width in pixels, and aspect_B, height / width.
        """
        cfg = self.cfg
        H, W, C = x_BxHxWxC.shape[1:]
        if H % cfg.patch_size or W % cfg.patch_size or C != cfg.channels:
            which = f"sides that are multiples of {cfg.patch_size}, and {cfg.channels} channels"
            raise ValueError(f"an image of {(H, W, C)} for a model of {which}")
        dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        patches_BxTxF = patchify(x_BxHxWxC, cfg.patch_size).astype(cfg.dtype)
        x_BxTxD = Linear(cfg.n_embd, **dtypes, kernel_init=XAVIER, name="patch_embed")(patches_BxTxF)
        x_BxTxD += jnp.asarray(positions(cfg, H, W), cfg.dtype)
        e_BxD = TimestepEmbed(cfg.n_embd, **dtypes, name="t_embed")(t_B)
        if cfg.micro_conditions:
            e_BxD += self._of_the_picture(condition["size_Bx2"], condition["aspect_B"])
        init = nn.initializers.normal(0.02)
        m_Bx6D = Linear(6 * cfg.n_embd, **dtypes, kernel_init=init, name="t_block")(jax.nn.silu(e_BxD))
        text_BxSxD = CaptionEmbed(cfg.n_embd, **dtypes, name="y_embed")(condition["context_BxSxE"])
        stack = Stack(Block, cfg, cfg.n_layer, cfg.remat, cfg.unroll_layers, name="blocks")
        of_all = m_Bx6D.reshape(-1, 6, cfg.n_embd), text_BxSxD, condition["length_B"]
        x_BxTxD, _ = stack(x_BxTxD, None, *of_all, deterministic=deterministic)
        return unpatchify(Final(cfg, name="final")(x_BxTxD, e_BxD), cfg.patch_size, H, W)

    def _of_the_picture(self, size_Bx2, aspect_B):
        """(B, D): a third each for height, width and aspect."""
        cfg = self.cfg
        embed = lambda name: TimestepEmbed(cfg.n_embd // 3, cfg.dtype, cfg.param_dtype, name=name)
        of_size_BxF = embed("size_embed")(size_Bx2.reshape(-1)).reshape(size_Bx2.shape[0], -1)
        return jnp.concatenate([of_size_BxF, embed("aspect_embed")(aspect_B)], axis=-1)


def positions(cfg: PixArtConfig, H: int, W: int):
    """(T, D): rows and columns both from 0 to what a square image of image_size has, over interpolation_scale."""
    span = cfg.image_size // cfg.patch_size / cfg.interpolation_scale
    return sincos_positions(cfg.n_embd, H // cfg.patch_size, W // cfg.patch_size, span)
