"""Makes gpt2_tiny.npz: logits, loss and every gradient of transformers.GPT2LMHeadModel, tiny, fp32, random weights.

  python tests/golden/make_gpt2.py     (needs torch and transformers; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import functools
import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("gpt2_tiny.npz")
V, T, L, H, D, B = 53, 20, 4, 2, 12, 2
VARIANTS = {  # name -> what config.json says, and whether there are biases
    "openai": ({"activation_function": "gelu_new", "tie_word_embeddings": True}, True),
    "nanogpt": ({"activation_function": "gelu", "tie_word_embeddings": True}, True),
    "nanogpt_no_bias": ({"activation_function": "gelu", "tie_word_embeddings": True}, False),
    "mingpt": ({"activation_function": "gelu_new", "tie_word_embeddings": False}, True),
}
batch = functools.partial(golden_file.batch, V, B, T)


def config(variant: str) -> dict:
    """What config.json of the variant says."""
    sizes = {"vocab_size": V, "n_positions": T, "n_layer": L, "n_head": H, "n_embd": D}
    return {"model_type": "gpt2", **sizes, "bos_token_id": None, "eos_token_id": None, **VARIANTS[variant][0]}


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in Hugging Face's layout; far larger than a fresh model's, so that every path matters."""
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    named = {"wte.weight": draw(0.7, V, D), "wpe.weight": draw(0.7, T, D)}
    for i in range(L):
        for name, fan_in, fan_out in (
            ("attn.c_attn", D, 3 * D), ("attn.c_proj", D, D), ("mlp.c_fc", D, 4 * D), ("mlp.c_proj", 4 * D, D),
        ):  # fmt: skip
            named[f"h.{i}.{name}.weight"] = draw(fan_in**-0.5, fan_in, fan_out)
            named[f"h.{i}.{name}.bias"] = draw(0.2, fan_out)
    for name in [f"h.{i}.{norm}" for i in range(L) for norm in ("ln_1", "ln_2")] + ["ln_f"]:
        named[f"{name}.weight"] = 1 + draw(0.2, D)
        named[f"{name}.bias"] = draw(0.2, D)
    if not VARIANTS[variant][1]:  # GPT2LMHeadModel has no other way to be without biases
        named |= {name: np.zeros_like(value) for name, value in named.items() if name.endswith(".bias")}
    named = {f"transformer.{name}": value for name, value in named.items()}
    if not VARIANTS[variant][0]["tie_word_embeddings"]:
        named["lm_head.weight"] = draw(0.7, V, D)
    return named


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets) and "grad/NAME" for every parameter, as PyTorch has them."""
    golden_file.quiet_torch()
    import transformers

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config(variant), **off, attn_implementation="eager"))
    model = golden_file.with_weights(model, weights(variant))
    # through the cache, as the file was made: without it gradients are rounded otherwise
    return golden_file.logits_and_loss(model, batch(), use_cache=True) | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
