"""Makes text_encoder_tiny.npz: output and every gradient of transformers' CLIPTextModel and T5EncoderModel, tiny, fp32.

  python tests/golden/make_text_encoder.py     (needs torch and transformers; the tests that read the file do not)

Captions are padded. transformers hides the padding from every token; what it computes at the padding itself means nothing
and takes no part in the loss. Stable Diffusion gives CLIP no mask: variant "clip_unmasked".
Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("text_encoder_tiny.npz")
B, S, V = 3, 9, 31
_CLIP = {
    "model_type": "clip_text_model", "vocab_size": V, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 11, "hidden_act": "quick_gelu",
    "bos_token_id": 29, "eos_token_id": 30, "pad_token_id": 30,
}  # fmt: skip
VARIANTS = {  # name -> what config.json says; every size its own number
    "clip": _CLIP,
    "clip_unmasked": _CLIP | {"hidden_act": "gelu", "num_hidden_layers": 1},  # Stable Diffusion 2's activation
    "t5": {  # few buckets and short distances: captions of 9 tokens meet both ends of the table
        "model_type": "t5", "vocab_size": V, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3,
        "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def config(variant: str) -> dict:
    return VARIANTS[variant]


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in transformers' layout; norms and biases are not what they begin with either."""
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    return (_t5 if variant == "t5" else _clip)(VARIANTS[variant], draw)


def _clip(c: dict, draw) -> dict[str, np.ndarray]:
    E, F = c["hidden_size"], c["intermediate_size"]
    named = {"embeddings.token_embedding.weight": draw(1, V, E)}
    named["embeddings.position_embedding.weight"] = draw(0.5, c["max_position_embeddings"], E)
    norm = lambda name: {f"{name}.weight": 1 + draw(0.2, E), f"{name}.bias": draw(0.2, E)}
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            named[f"{layer}self_attn.{name}.weight"] = draw(1.5 * E**-0.5, E, E)
            named[f"{layer}self_attn.{name}.bias"] = draw(0.2, E)
        for name, fan_in, fan_out in (("fc1", E, F), ("fc2", F, E)):
            named[f"{layer}mlp.{name}.weight"] = draw(fan_in**-0.5, fan_out, fan_in)
            named[f"{layer}mlp.{name}.bias"] = draw(0.2, fan_out)
        named |= norm(f"{layer}layer_norm1") | norm(f"{layer}layer_norm2")
    return named | norm("final_layer_norm")


def _t5(c: dict, draw) -> dict[str, np.ndarray]:
    E, F, HK = c["d_model"], c["d_ff"], c["num_heads"] * c["d_kv"]
    named = {"shared.weight": draw(1, V, E), "encoder.final_layer_norm.weight": 1 + draw(0.2, E)}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    named[bias] = draw(1, c["relative_attention_num_buckets"], c["num_heads"])
    for i in range(c["num_layers"]):
        attention, mlp = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        for name in "qkv":  # no 1 / sqrt(K): it is in the weights
            named[f"{attention}SelfAttention.{name}.weight"] = draw((0.5 if name == "q" else 1) * E**-0.5, HK, E)
        named[f"{attention}SelfAttention.o.weight"] = draw(HK**-0.5, E, HK)
        for name, fan_in, fan_out in (("wi_0", E, F), ("wi_1", E, F), ("wo", F, E)):
            named[f"{mlp}DenseReluDense.{name}.weight"] = draw(fan_in**-0.5, fan_out, fan_in)
        named |= {f"{attention}layer_norm.weight": 1 + draw(0.2, E), f"{mlp}layer_norm.weight": 1 + draw(0.2, E)}
    return named


def batch(variant: str) -> dict[str, np.ndarray]:
    """Tokens, how many of each caption count, and the gradient of the output, nought at padding."""
    random = np.random.RandomState(99)
    tokens_BxS, g_BxSxE = random.randint(0, V - 1, (B, S)).astype(np.int32), random.normal(0, 1, (B, S, 12))
    length_B = np.int32([S, 4, 1]) if variant != "clip_unmasked" else np.int32([S, S, S])
    g_BxSxE *= (np.arange(S) < length_B[:, None])[..., None]
    return {"tokens": tokens_BxS, "length": length_B, "g": g_BxSxE.astype(np.float32)}


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "out" (B, S, E), nought at padding, and "grad/NAME" of sum(out g) for every parameter, as in PyTorch."""
    golden_file.quiet_torch()
    import torch
    import transformers

    c = {name: value for name, value in config(variant).items() if name != "model_type"}
    if variant == "t5":
        model = transformers.T5EncoderModel(transformers.T5Config(**c)).eval()
    else:
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**c)).eval()
    own = {name: torch.tensor(value) for name, value in weights(variant).items()}
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}, (missing, unexpected)
    b = {name: torch.tensor(value) for name, value in batch(variant).items()}
    seen_BxS = torch.arange(S) < b["length"][:, None]
    mask = None if variant == "clip_unmasked" else seen_BxS.long()
    out_BxSxE = model(input_ids=b["tokens"].long(), attention_mask=mask).last_hidden_state
    (out_BxSxE * b["g"]).sum().backward()
    return {"out": (out_BxSxE * seen_BxS[..., None]).detach().numpy()} | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
