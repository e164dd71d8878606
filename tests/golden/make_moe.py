"""Makes moe_tiny.npz: logits, loss and every gradient of transformers.MixtralForCausalLM, tiny, fp32, random weights.

  python tests/golden/make_moe.py     (needs torch and transformers; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import functools
import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("moe_tiny.npz")
V, T, L, D, F, B = 53, 21, 2, 16, 24, 2
COMMON = {
    "model_type": "mixtral", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
VARIANTS = {  # name -> what config.json says
    "2 of 4": COMMON,
    "3 of 5": COMMON | {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 6, "tie_word_embeddings": True},
}
config = VARIANTS.__getitem__
batch = functools.partial(golden_file.batch, V, B, T)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, as transformers 5 holds them; far larger than a fresh model's, so that every path matters."""
    c = VARIANTS[variant]
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    H, G, E = c["num_attention_heads"], c["num_key_value_heads"], c["num_local_experts"]
    K = c.get("head_dim", D // H)
    named = {"model.embed_tokens.weight": draw(0.7, V, D), "model.norm.weight": 1 + draw(0.2, D)}
    for i in range(L):
        for name, out, fan_in in (("q", H * K, D), ("k", G * K, D), ("v", G * K, D), ("o", D, H * K)):
            std = fan_in**-0.5 * (2 if name in "qk" else 1)  # attention that is far from uniform
            named[f"model.layers.{i}.self_attn.{name}_proj.weight"] = draw(std, out, fan_in)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named[f"model.layers.{i}.{norm}.weight"] = 1 + draw(0.2, D)
        named[f"model.layers.{i}.mlp.gate.weight"] = draw(D**-0.5, E, D)
        named[f"model.layers.{i}.mlp.experts.gate_up_proj"] = draw(D**-0.5, E, 2 * F, D)
        named[f"model.layers.{i}.mlp.experts.down_proj"] = draw(F**-0.5, E, D, F)
    if not c["tie_word_embeddings"]:
        named["lm_head.weight"] = draw(0.7, V, D)
    return named


def model(variant: str):
    """transformers' model with these weights."""
    golden_file.quiet_torch()
    import transformers

    said = {k: v for k, v in VARIANTS[variant].items() if k not in ("model_type", "rope_theta")}
    said["rope_parameters"] = {"rope_type": "default", "rope_theta": VARIANTS[variant]["rope_theta"]}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    cfg = transformers.MixtralConfig(**special, **said, attn_implementation="eager", output_router_logits=True)
    return golden_file.with_weights(transformers.MixtralForCausalLM(cfg), weights(variant))


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets), "balance" of each layer, and "grad/NAME" of the loss by every parameter."""
    mixtral = model(variant)
    found = golden_file.logits_and_loss(mixtral, batch()) | golden_file.gradients(mixtral)
    return found | {"balance": balance(mixtral, variant)}


def balance(mixtral, variant: str) -> np.ndarray:
    """transformers' load balancing loss, of one layer at a time."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    c = VARIANTS[variant]
    logits_L = mixtral(input_ids=torch.tensor(batch()["tokens"]).long()).router_logits
    of_layer = lambda logits: load_balancing_loss_func((logits,), c["num_local_experts"], c["num_experts_per_tok"])
    return np.array([of_layer(logits).item() for logits in logits_L], np.float32)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
