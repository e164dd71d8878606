"""Makes bitnet_tiny.npz: logits, loss and every gradient of transformers' models with AutoBitLinear in them, tiny, fp32.

  python tests/golden/make_bitnet.py     (needs torch and transformers; the tests that read the file do not)

transformers' BitNetForCausalLM by itself has plain linear layers: here each but the head is an AutoBitLinear with online
quantisation, as a checkpoint of latent weights is trained there. b1.58's norms within are its use_rms_norm, in a Llama whose
layers have lost theirs. Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import functools
import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("bitnet_tiny.npz")
V, T, L, D, F, B = 53, 21, 2, 16, 24, 2
COMMON = {
    "model_type": "bitnet", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
VARIANTS = {  # name -> what config.json says
    "subln": COMMON,
    "2b4t": COMMON | {"num_key_value_heads": 2, "hidden_act": "relu2", "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    "inside": COMMON | {"model_type": "jaxvram_bitnet", "num_key_value_heads": 2},
    "llama": COMMON | {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True},
}
config = VARIANTS.__getitem__
batch = functools.partial(golden_file.batch, V, B, T)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in Hugging Face's layout."""
    c = VARIANTS[variant]
    draw = golden_file.drawing(10 + list(VARIANTS).index(variant))
    H, G, K = c["num_attention_heads"], c["num_key_value_heads"], D // c["num_attention_heads"]
    named = {"model.embed_tokens.weight": draw(0.7, V, D), "model.norm.weight": 1 + draw(0.2, D)}
    inside = c["model_type"] == "jaxvram_bitnet"
    for i in range(L):
        layer = f"model.layers.{i}"
        for name, out, fan_in in (
            ("self_attn.q_proj", H * K, D), ("self_attn.k_proj", G * K, D), ("self_attn.v_proj", G * K, D),
            ("self_attn.o_proj", D, H * K), ("mlp.gate_proj", F, D), ("mlp.up_proj", F, D), ("mlp.down_proj", D, F),
        ):  # fmt: skip
            std = fan_in**-0.5 * (2 if name.endswith(("q_proj", "k_proj")) else 1)
            named[f"{layer}.{name}.weight"] = draw(std, out, fan_in)
            if c.get("attention_bias") and "attn" in name:
                named[f"{layer}.{name}.bias"] = draw(0.2, out)
            if inside:
                named[f"{layer}.{name}.rms_norm.weight"] = 1 + draw(0.2, fan_in)
        norms = [] if inside else [("input_layernorm", D), ("post_attention_layernorm", D)]
        if c["model_type"] == "bitnet":
            norms += [("self_attn.attn_sub_norm", H * K), ("mlp.ffn_sub_norm", F)]
        named |= {f"{layer}.{norm}.weight": 1 + draw(0.2, width) for norm, width in norms}
    if not c["tie_word_embeddings"]:
        named["lm_head.weight"] = draw(0.7, V, D)
    return named


def model(variant: str):
    """transformers' model with these weights, its layers' linear ones ternary."""
    golden_file.quiet_torch()
    import torch
    import transformers
    from transformers.integrations.bitnet import AutoBitLinear

    c = VARIANTS[variant]
    said = {k: v for k, v in c.items() if k not in ("model_type", "rope_theta")}
    said["rope_parameters"] = {"rope_type": "default", "rope_theta": c["rope_theta"]}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    kind = "BitNet" if c["model_type"] == "bitnet" else "Llama"
    made = getattr(transformers, f"{kind}Config")(**special, **said, attn_implementation="eager")
    net = getattr(transformers, f"{kind}ForCausalLM")(made)
    inside = c["model_type"] == "jaxvram_bitnet"
    for name, module in list(net.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            sizes, biased = (module.in_features, module.out_features), module.bias is not None
            options = {"online_quant": True, "use_rms_norm": inside, "rms_norm_eps": c["rms_norm_eps"]}
            net.set_submodule(name, AutoBitLinear(*sizes, bias=biased, **options))
        elif inside and name.endswith("layernorm"):
            net.set_submodule(name, torch.nn.Identity())
    return golden_file.with_weights(net, weights(variant))


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets) and "grad/NAME" for every parameter, as PyTorch has them."""
    net = model(variant)
    return golden_file.logits_and_loss(net, batch()) | golden_file.gradients(net)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
