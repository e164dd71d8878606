"""Makes llama_tiny.npz: logits, loss and every gradient of transformers.LlamaForCausalLM, tiny, fp32, random weights.

  python tests/golden/make_llama.py     (needs torch and transformers; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import functools
import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("llama_tiny.npz")
V, T, L, D, F, B = 53, 21, 2, 16, 24, 2
COMMON = {
    "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {  # one frequency of four stays, one lies between, two are divided
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS = {  # name -> what config.json says
    "mha": COMMON,
    "gqa": COMMON | {"num_key_value_heads": 2, "rms_norm_eps": 1e-2},  # an epsilon that matters
    "biases": COMMON | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "tied": COMMON | {"head_dim": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama3": COMMON | {"head_dim": 8, "num_key_value_heads": 2, "rope_theta": 50.0, "rope_scaling": LLAMA3},
}
config = VARIANTS.__getitem__
batch = functools.partial(golden_file.batch, V, B, T)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in Hugging Face's layout; far larger than a fresh model's, so that every path matters."""
    c = VARIANTS[variant]
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    H, G, K = c["num_attention_heads"], c["num_key_value_heads"], c.get("head_dim", D // c["num_attention_heads"])
    named = {"model.embed_tokens.weight": draw(0.7, V, D), "model.norm.weight": 1 + draw(0.2, D)}
    for i in range(L):
        for name, out, fan_in, biased in (
            ("self_attn.q_proj", H * K, D, "attention_bias"), ("self_attn.k_proj", G * K, D, "attention_bias"),
            ("self_attn.v_proj", G * K, D, "attention_bias"), ("self_attn.o_proj", D, H * K, "attention_bias"),
            ("mlp.gate_proj", F, D, "mlp_bias"), ("mlp.up_proj", F, D, "mlp_bias"), ("mlp.down_proj", D, F, "mlp_bias"),
        ):  # fmt: skip
            # queries and keys larger: attention that is far from uniform, and turns with the position
            std = fan_in**-0.5 * (2 if name.endswith(("q_proj", "k_proj")) else 1)
            named[f"model.layers.{i}.{name}.weight"] = draw(std, out, fan_in)
            if c.get(biased):
                named[f"model.layers.{i}.{name}.bias"] = draw(0.2, out)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named[f"model.layers.{i}.{norm}.weight"] = 1 + draw(0.2, D)
    if not c["tie_word_embeddings"]:
        named["lm_head.weight"] = draw(0.7, V, D)
    return named


def model(variant: str):
    """transformers' model with these weights."""
    golden_file.quiet_torch()
    import transformers

    said = {k: v for k, v in VARIANTS[variant].items() if k not in ("model_type", "rope_theta", "rope_scaling")}
    scaling = VARIANTS[variant].get("rope_scaling", {"rope_type": "default"})
    said["rope_parameters"] = scaling | {"rope_theta": VARIANTS[variant]["rope_theta"]}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**special, **said, attn_implementation="eager"))
    return golden_file.with_weights(llama, weights(variant))


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets) and "grad/NAME" for every parameter, as PyTorch has them."""
    llama = model(variant)
    return golden_file.logits_and_loss(llama, batch()) | golden_file.gradients(llama)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
