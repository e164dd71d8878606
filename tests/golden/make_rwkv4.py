"""Makes rwkv4_tiny.npz: logits, loss and every gradient of transformers' RwkvForCausalLM, tiny, fp32, random weights.

  python tests/golden/make_rwkv4.py     (needs torch and transformers; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import functools
import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("rwkv4_tiny.npz")
V, T, L, D, B, F = 53, 21, 3, 24, 2, 40
VARIANTS = {
    "rwkv4": {
        "model_type": "rwkv", "vocab_size": V, "hidden_size": D, "attention_hidden_size": D, "num_hidden_layers": L,
        "intermediate_size": F, "context_length": T, "rescale_every": 0,
    },
}  # fmt: skip
config = VARIANTS.__getitem__
batch = functools.partial(golden_file.batch, V, B, T)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in transformers' layout; far larger than a fresh model's, so that every path matters."""
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    named = {"rwkv.embeddings.weight": draw(0.7, V, D), "head.weight": draw(0.7 * D**-0.5, V, D)}

    def norm(name):
        named[f"{name}.weight"], named[f"{name}.bias"] = 1 + draw(0.2, D), draw(0.2, D)

    norm("rwkv.ln_out")
    for i in range(L):
        layer = f"rwkv.blocks.{i}"
        for name in ("ln1", "ln2", *(["pre_ln"] if i == 0 else [])):
            norm(f"{layer}.{name}")
        named |= {f"{layer}.attention.time_decay": draw(1, D) - 1, f"{layer}.attention.time_first": draw(1, D)}
        for part, names in (("attention", ("key", "value", "receptance")), ("feed_forward", ("key", "receptance"))):
            for name in names:
                named[f"{layer}.{part}.time_mix_{name}"] = 0.5 + draw(0.3, 1, 1, D)
        for name in ("key", "value", "receptance", "output"):
            named[f"{layer}.attention.{name}.weight"] = draw(D**-0.5, D, D)
        named[f"{layer}.feed_forward.receptance.weight"] = draw(D**-0.5, D, D)
        named |= {f"{layer}.feed_forward.key.weight": draw(D**-0.5, F, D)}
        named |= {f"{layer}.feed_forward.value.weight": draw(F**-0.5, D, F)}
    return named


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets) and "grad/NAME" for every parameter, as PyTorch has them."""
    golden_file.quiet_torch()
    import transformers

    theirs = transformers.RwkvConfig(**{k: x for k, x in VARIANTS[variant].items() if k != "model_type"})
    model = golden_file.with_weights(transformers.RwkvForCausalLM(theirs).train(), weights(variant))
    return golden_file.logits_and_loss(model, batch()) | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
