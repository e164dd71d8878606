"""DiT (Peebles & Xie 2023, arXiv:2212.09748): a transformer over patches, conditioned by adaptive layer norms.

x_0 = patches W + positions;  c = t_embed(t) + y_embed(y);  in each block, six vectors a sample from c,
  shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = W_ada silu(c) + b_ada          (zero at the start: adaLN-Zero)
  x += gate_1 attn(norm(x) (1 + scale_1) + shift_1);  x += gate_2 mlp(norm(x) (1 + scale_2) + shift_2);
at the end  norm(x) (1 + scale) + shift, and a matrix, zero at the start, back to patches.
Matrices ~ Xavier uniform, biases 0; the MLPs of t and the table of y ~ N(0, 0.02). Positions are fixed sines.
Written from the paper and the maths; the authors' code, ed81ce2, was read for its numbers and not copied.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError, nearest
from jaxvram.kernels.backend import IMPLEMENTATIONS
from jaxvram.layers.attention import SelfAttention
from jaxvram.layers.conditioning import LabelEmbed, TimestepEmbed
from jaxvram.layers.linear import Linear
from jaxvram.layers.mlp import MLP
from jaxvram.layers.norms import ModulatedLayerNorm
from jaxvram.layers.patches import patchify, sincos_positions, unpatchify
from jaxvram.layers.stack import REMAT, Stack

SIZES = {  # n_layer, n_head, n_embd
    "S": (12, 6, 384),
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (28, 16, 1152),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    image_size: int = 32  # H = W of what is denoised: latents, or pixels
    channels: int = 4  # C
    patch_size: int = 2  # p
    num_classes: int = 1000  # 0: unconditional
    n_layer: int = 12  # L
    n_head: int = 12  # H
    n_embd: int = 768  # D
    mlp_ratio: int = 4
    learn_sigma: bool = True  # a second C channels: the variance, between its bounds (Nichol & Dhariwal 2021)
    remat: str = "full"  # none | dots | nested | full: what the backward pass computes again (layers/stack.py)
    unroll_layers: bool = False  # straight-line layers: slower to compile; faster on a CPU, leaner without remat
    dtype: str = "bfloat16"  # of matrix products: bfloat16 | float32
    param_dtype: str = "float32"  # of parameters
    kernels: str = "auto"  # auto (Pallas on an NVIDIA GPU, else XLA) | pallas | xla | interpret: attention

    def __post_init__(self):
        for field, valid in (("remat", REMAT), ("kernels", IMPLEMENTATIONS)):
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, valid)}")
        for field in ("dtype", "param_dtype"):
            if (value := getattr(self, field)) not in ("bfloat16", "float32"):
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, ('bfloat16', 'float32'))}")
        sizes = (self.image_size, self.channels, self.patch_size, self.n_layer, self.n_head, self.n_embd, self.mlp_ratio)
        if min(sizes) < 1 or self.num_classes < 0:
            raise UserError("model: every size must be at least 1, num_classes at least 0")
        if self.image_size % self.patch_size:
            raise UserError(f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}")
        if self.n_embd % self.n_head or self.n_embd % 4:
            raise UserError(f"model.n_embd={self.n_embd} must be a multiple of 4 and of model.n_head={self.n_head}")

    @classmethod
    def of_size(cls, name: str, **fields) -> "DiTConfig":
        """'B/2' and so on, as the paper's table has them."""
        size, _, patch = name.partition("/")
        if size not in SIZES or not patch.isdecimal():
            raise UserError(f"{name!r} is no size of DiT: S, B, L or XL, a slash, and the patch's side")
        n_layer, n_head, n_embd = SIZES[size]
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd, patch_size=int(patch), **fields)

    @property
    def tokens(self) -> int:
        """T, patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


def _dense(cfg: DiTConfig):
    return functools.partial(Linear, dtype=cfg.dtype, param_dtype=cfg.param_dtype)


def _modulation(cfg: DiTConfig, vectors: int, c_BxD):
    """`vectors` of (B, D) each, zero at the start."""
    zeros = nn.initializers.zeros
    ada = _dense(cfg)(vectors * cfg.n_embd, kernel_init=zeros, name="ada")(jax.nn.silu(c_BxD))
    return jnp.split(ada, vectors, axis=-1)


class Block(nn.Module):
    """x += gate attn(modulate(x)); x += gate mlp(modulate(x)); whole images, so there is no state."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x_BxTxD, state, c_BxD, deterministic: bool = True):
        cfg = self.cfg
        inits = dict.fromkeys(("kernel_init", "proj_init"), nn.initializers.xavier_uniform())
        attn = SelfAttention(cfg.n_head, _dense(cfg), **inits, causal=False, kernels=cfg.kernels, name="attn")
        mlp = MLP(cfg.mlp_ratio * cfg.n_embd, "gelu_tanh", _dense(cfg), **inits, name="mlp")
        norm = ModulatedLayerNorm(dtype=cfg.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulation(cfg, 6, c_BxD)
        x_BxTxD += gate_1[:, None] * attn(norm(x_BxTxD, shift_1, scale_1))[0]
        x_BxTxD += gate_2[:, None] * mlp(norm(x_BxTxD, shift_2, scale_2))
        return x_BxTxD, state


class Final(nn.Module):
    """The last norm, and back to p p C' numbers a patch, fp32."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x_BxTxD, c_BxD):
        cfg, zeros = self.cfg, nn.initializers.zeros
        shift_BxD, scale_BxD = _modulation(cfg, 2, c_BxD)
        x_BxTxD = ModulatedLayerNorm(dtype=cfg.dtype)(x_BxTxD, shift_BxD, scale_BxD)
        out = _dense(cfg)(cfg.patch_size**2 * cfg.out_channels, kernel_init=zeros, name="linear")(x_BxTxD)
        return out.astype(jnp.float32)


class DiT(nn.Module):
    """A noisy image, its timestep and its class to what the task predicts: a denoiser (tasks/diffusion.py)."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x_BxHxWxC, t_B, labels_B=None, deterministic: bool = True):
        """(B, H, W, C) in fp32, or 2 C with learn_sigma: the prediction, then the variance's place between its bounds.

        Args:
          x_BxHxWxC: H = W = image_size.
          t_B: timesteps on the scale of 0 to 1000, whole or not.
          labels_B: int32 in [0, num_classes], the last for "no class"; None where num_classes is 0.
        """
        cfg = self.cfg
        H = W = cfg.image_size
        if x_BxHxWxC.shape[1:] != (H, W, cfg.channels):
            raise ValueError(f"an image of {x_BxHxWxC.shape[1:]} for a model of {(H, W, cfg.channels)}")
        if (labels_B is None) != (cfg.num_classes == 0):
            raise ValueError(f"labels_B belong to a model with classes, and this one has {cfg.num_classes}")
        dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        patches_BxTxF = patchify(x_BxHxWxC, cfg.patch_size).astype(cfg.dtype)
        init = nn.initializers.xavier_uniform()
        x_BxTxD = _dense(cfg)(cfg.n_embd, kernel_init=init, name="patch_embed")(patches_BxTxF)
        side = H // cfg.patch_size
        x_BxTxD += jnp.asarray(sincos_positions(cfg.n_embd, side, side), cfg.dtype)
        c_BxD = TimestepEmbed(cfg.n_embd, **dtypes, name="t_embed")(t_B)
        if cfg.num_classes:
            c_BxD += LabelEmbed(cfg.num_classes, cfg.n_embd, **dtypes, name="y_embed")(labels_B)
        stack = Stack(Block, cfg, cfg.n_layer, cfg.remat, cfg.unroll_layers, name="blocks")
        x_BxTxD, _ = stack(x_BxTxD, None, c_BxD, deterministic=deterministic)
        return unpatchify(Final(cfg, name="final")(x_BxTxD, c_BxD), cfg.patch_size, H, W)
