"""Makes mamba_tiny.npz: logits, loss and every gradient of transformers' Mamba and Mamba-2, tiny, fp32, random weights.

  python tests/golden/make_mamba.py     (needs torch and transformers; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import functools
import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("mamba_tiny.npz")
V, T, L, D, B = 53, 21, 2, 16, 2
COMMON = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "expand": 2, "conv_kernel": 4}
VARIANTS = {  # name -> what config.json says
    "mamba": COMMON | {"model_type": "mamba", "state_size": 5, "time_step_rank": 3, "tie_word_embeddings": True},
    "mamba_untied": COMMON | {"model_type": "mamba", "state_size": 8, "time_step_rank": 1, "tie_word_embeddings": False},
    "mamba2": COMMON | {
        "model_type": "mamba2", "state_size": 12, "head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 8,
        "tie_word_embeddings": True,
    },
    "mamba2_groups": COMMON | {
        "model_type": "mamba2", "state_size": 6, "head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 8,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
config = VARIANTS.__getitem__
batch = functools.partial(golden_file.batch, V, B, T)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in Hugging Face's layout; far larger than a fresh model's, so that every path matters."""
    c = VARIANTS[variant]
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    E, N = 2 * D, c["state_size"]
    named = {"backbone.embeddings.weight": draw(0.7, V, D), "backbone.norm_f.weight": 1 + draw(0.2, D)}
    matrices = {"in_proj": (2 * E, D), "out_proj": (D, E)}
    if c["model_type"] == "mamba":
        R, channels, heads, A = c["time_step_rank"], E, E, (E, N)
        matrices |= {"x_proj": (R + 2 * N, E), "dt_proj": (E, R)}
        step_bias = "dt_proj.bias"
    else:
        heads, channels = c["num_heads"], E + 2 * c["n_groups"] * N
        A, step_bias, matrices["in_proj"] = (heads,), "dt_bias", (E + channels + heads, D)
    for i in range(L):
        layer = {f"{name}.weight": draw(shape[1] ** -0.5, *shape) for name, shape in matrices.items()}
        layer |= {"conv1d.weight": draw(0.5, channels, 1, 4), "conv1d.bias": draw(0.2, channels)}
        layer |= {"A_log": draw(0.7, *A), "D": 1 + draw(0.3, heads), step_bias: draw(1, heads) - 1}
        if c["model_type"] == "mamba2":
            layer["norm.weight"] = 1 + draw(0.2, E)
        named |= {f"backbone.layers.{i}.mixer.{name}": value for name, value in layer.items()}
        named[f"backbone.layers.{i}.norm.weight"] = 1 + draw(0.2, D)
    if not c["tie_word_embeddings"]:
        named["lm_head.weight"] = draw(0.7, V, D)
    return named


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets) and "grad/NAME" for every parameter, as PyTorch has them."""
    golden_file.quiet_torch()
    import transformers

    c = VARIANTS[variant]
    name = {"mamba": "Mamba", "mamba2": "Mamba2"}[c["model_type"]]
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = getattr(transformers, f"{name}Config")(**special, **{k: v for k, v in c.items() if k != "model_type"})
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    model = golden_file.with_weights(model, weights(variant))
    return golden_file.logits_and_loss(model, batch()) | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
