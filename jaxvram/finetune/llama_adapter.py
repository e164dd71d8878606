"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199), and what its second version adds (Gao et al. 2023, 2304.15010).

    v1  o += gate * attention(q, keys and values of P learnt prompts)     from layer `first_layer` on
    v2  and y = scale * (x W + bias) for every matrix of a layer, and the norms are trained

The prompts go through the frozen W_k and W_v, are not turned by positions, and are seen by all tokens; the gates are zero
at first: one a head as in LitGPT, or one a layer as in peft (neither applies the paper's tanh).
"""

import flax.linen as nn
import jax.numpy as jnp

from jaxvram.finetune.config import FinetuneConfig


def attend(cfg: FinetuneConfig, module, q_BxTxHxK, o_BxTxHxK):
    """o with what the queries find in the prompts; `module` has k_proj and v_proj."""
    (B, _, H, K), D, P = q_BxTxHxK.shape, module.cfg.n_embd, cfg.prompt_length
    prompt_PxD = parameter(module, "adapter_prompt", nn.initializers.normal(1.0), (P, D))
    gate = parameter(module, "adapter_gate", nn.initializers.zeros, (H, 1) if cfg.gate == "head" else (1, 1))
    active = parameter(module, "adapter_active", nn.initializers.ones, ())  # 0 in layers before the first; see adapted.py
    k_PxGxK, v_PxGxK = (project(prompt_PxD).reshape(P, -1, K) for project in (module.k_proj, module.v_proj))
    G = k_PxGxK.shape[1]
    q_BxTxGxRxK = q_BxTxHxK.reshape(B, -1, G, H // G, K)
    scores = jnp.einsum("btgrk,pgk->btgrp", q_BxTxGxRxK, k_PxGxK, preferred_element_type=jnp.float32) * K**-0.5
    shares = nn.softmax(scores).astype(v_PxGxK.dtype)
    found_BxTxHxK = jnp.einsum("btgrp,pgk->btgrk", shares, v_PxGxK).reshape(o_BxTxHxK.shape)
    return o_BxTxHxK + (active * gate).astype(o_BxTxHxK.dtype) * found_BxTxHxK


def rescale(module, y_xF):
    """scale * (y + bias) of a Linear's result."""
    F = y_xF.shape[-1]
    scale_F = module.param("adapter_scale", nn.initializers.ones, (F,)).astype(y_xF.dtype)
    return scale_F * (y_xF + module.param("adapter_bias", nn.initializers.zeros, (F,)).astype(y_xF.dtype))


def parameter(module, name: str, init, shape):
    """module.param for a method that is not nn.compact, where Flax refuses it."""
    if module.is_initializing() and not module.has_variable("params", name):
        module.put_variable("params", name, init(module.make_rng("params"), shape, jnp.float32))
    return module.get_variable("params", name)
