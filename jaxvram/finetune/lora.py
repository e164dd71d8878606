"""LoRA (Hu et al. 2021, arXiv:2106.09685) and DoRA (Liu et al. 2024, arXiv:2402.09353) round one matrix product.

    LoRA   y = x W + s (drop(x) A) B          A ~ U(+-1/sqrt(D)) (D x r), B = 0 (r x F), s = alpha / r or alpha / sqrt(r)
    DoRA   y = m / |W + s A B| * that         |.| of each column (not differentiated), m = |W| at first

A and B are in fp32, their products in the compute dtype. What is kept for the backward pass beside the layer's own input
are x A, r numbers a token.
"""

import math

import jax
import jax.numpy as jnp

from jaxvram.errors import UserError
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.layers.linear import product


def add(cfg: FinetuneConfig, module, x_xD, y_xF, kernel_DxF):
    """What `module`, a Linear called with x, returns with its LoRA.

    Args:
      y_xF: what it returns without.
      kernel_DxF: () -> its matrix; asked for by DoRA alone.
    """
    D, F, r = x_xD.shape[-1], y_xF.shape[-1], cfg.rank
    if r > min(D, F):
        which = f"finetune.rank={r} exceeds the {D} x {F} matrix {'/'.join(module.path)}"
        raise UserError(f"{which}; lower it, or narrow finetune.targets")
    A_Dxr = module.param("lora_A", _uniform, (D, r)).astype(y_xF.dtype)
    B_rxF = module.param("lora_B", lambda _, shape: jnp.zeros(shape, jnp.float32), (r, F)).astype(y_xF.dtype)
    dropped_xD, drops = x_xD.astype(y_xF.dtype), cfg.dropout > 0 and module.has_rng("dropout")
    if drops:
        kept_xD = jax.random.bernoulli(module.make_rng("dropout"), 1 - cfg.dropout, x_xD.shape)
        dropped_xD = jnp.where(kept_xD, dropped_xD / (1 - cfg.dropout), 0)
    low_xF = cfg.scale * product(product(dropped_xD, A_Dxr), B_rxF)
    if not cfg.dora:
        return y_xF + low_xF
    frozen_DxF = jax.lax.stop_gradient(kernel_DxF())
    magnitude_F = module.param("lora_magnitude", lambda _: norm(frozen_DxF))
    ratio_F = (magnitude_F / jax.lax.stop_gradient(norm(merged_kernel(cfg, frozen_DxF, A_Dxr, B_rxF)))).astype(y_xF.dtype)
    bias_F = module.get_variable("params", "bias").astype(y_xF.dtype) if module.use_bias else 0
    of_matrix_xF = product(dropped_xD, frozen_DxF.astype(y_xF.dtype)) if drops else y_xF - bias_F
    return y_xF + (ratio_F - 1) * of_matrix_xF + ratio_F * low_xF


def _uniform(key, shape):
    """torch's kaiming_uniform with a = sqrt 5, as peft and LitGPT have it."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def norm(kernel_DxF):
    """|column|, fp32."""
    return jnp.sqrt(jnp.square(kernel_DxF.astype(jnp.float32)).sum(0))


def merged_kernel(cfg: FinetuneConfig, kernel_DxF, A_Dxr, B_rxF):
    return kernel_DxF.astype(jnp.float32) + cfg.scale * (A_Dxr.astype(jnp.float32) @ B_rxF.astype(jnp.float32))


def merge(cfg: FinetuneConfig, leaves: dict) -> dict:
    """The parameters of a Linear without its LoRA, which is in the kernel now; fp32 inside, the kernel's dtype in the end.

    Args:
      leaves: kernel (D, F), lora_A, lora_B[, lora_magnitude][, bias].
    """
    kernel_DxF = merged_kernel(cfg, leaves["kernel"], leaves["lora_A"], leaves["lora_B"])
    if cfg.dora:
        kernel_DxF *= leaves["lora_magnitude"] / norm(kernel_DxF)
    others = {name: leaf for name, leaf in leaves.items() if not name.startswith("lora_")}
    return others | {"kernel": kernel_DxF.astype(leaves["kernel"].dtype)}
