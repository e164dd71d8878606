"""Makes rwkv7_tiny.npz: logits, loss and every gradient of rwkv7_hf's RWKV-7, tiny, fp32, random weights.

  python tests/golden/make_rwkv7.py     (needs torch, transformers and rwkv7-hf; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import functools
import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("rwkv7_tiny.npz")
V, T, L, D, B, F = 53, 21, 2, 128, 2, 32
RANKS = {"w": 8, "a": 6, "v": 4, "g": 10}
VARIANTS = {
    "rwkv7": {
        "model_type": "rwkv7", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "head_dim": 64,
        "num_heads": D // 64, "intermediate_size": F, "decay_low_rank_dim": RANKS["w"], "a_low_rank_dim": RANKS["a"],
        "v_low_rank_dim": RANKS["v"], "gate_low_rank_dim": RANKS["g"],
    },
}  # fmt: skip
config = VARIANTS.__getitem__
batch = functools.partial(golden_file.batch, V, B, T)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in rwkv7_hf's layout; far larger than a fresh model's, so that every path matters."""
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    named = {"model.embeddings.weight": draw(0.7, V, D), "lm_head.weight": draw(0.7 * D**-0.5, V, D)}

    def norm(name):
        named[f"{name}.weight"], named[f"{name}.bias"] = 1 + draw(0.2, D), draw(0.2, D)

    norm("model.norm")
    for i in range(L):
        layer = f"model.layers.{i}"
        for name in ("attn_norm", "ffn_norm", "attn.g_norm", *(["pre_norm"] if i == 0 else [])):
            norm(f"{layer}.{name}")
        for name in "rwkvag":
            named[f"{layer}.attn.x_{name}"] = 0.5 + draw(0.3, 1, 1, D)
        for name in "rkvo":  # what a head reads is normed: where it is small, that is a division by little, and digits go
            named[f"{layer}.attn.{name}_proj.weight"] = draw((3 if name in "kv" else 1) * D**-0.5, D, D)
        for name, rank in RANKS.items():
            if name == "v" and i == 0:
                continue
            named[f"{layer}.attn.{name}_lora.lora.0.weight"] = draw(D**-0.5, rank, D)
            named[f"{layer}.attn.{name}_lora.lora.2.weight"] = draw(0.5 * rank**-0.5, D, rank)
            if name != "g":
                named[f"{layer}.attn.{name}_lora.lora.2.bias"] = draw(1, D)
        named |= {f"{layer}.attn.k_k": 0.7 + draw(0.2, D), f"{layer}.attn.k_a": 1 + draw(0.2, D)}
        named |= {f"{layer}.attn.r_k": draw(0.2, D // 64, 64), f"{layer}.ffn.x_k": 0.5 + draw(0.3, D)}
        named |= {f"{layer}.ffn.key.weight": draw(D**-0.5, F, D), f"{layer}.ffn.value.weight": draw(F**-0.5, D, F)}
    return named


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets) and "grad/NAME" for every parameter, as PyTorch has them."""
    golden_file.quiet_torch()
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM

    fields = {name: value for name, value in VARIANTS[variant].items() if name != "model_type"}
    theirs = RWKV7Config(**fields, pad_token_id=None)  # a padding token would have no gradient
    model = golden_file.with_weights(RWKV7ForCausalLM(theirs).train(), weights(variant))
    return golden_file.logits_and_loss(model, batch()) | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
