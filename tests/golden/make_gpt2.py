"""Makes gpt2_tiny.npz: logits, loss and every gradient of transformers.GPT2LMHeadModel, tiny, fp32, random weights.

  python tests/golden/make_gpt2.py     (needs torch and transformers; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import os
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name("gpt2_tiny.npz")
V, T, L, H, D, B = 53, 20, 4, 2, 12, 2
VARIANTS = {  # name -> what config.json says, and whether there are biases
    "openai": ({"activation_function": "gelu_new", "tie_word_embeddings": True}, True),
    "nanogpt": ({"activation_function": "gelu", "tie_word_embeddings": True}, True),
    "nanogpt_no_bias": ({"activation_function": "gelu", "tie_word_embeddings": True}, False),
    "mingpt": ({"activation_function": "gelu_new", "tie_word_embeddings": False}, True),
}


def config(variant: str) -> dict:
    """What config.json of the variant says."""
    sizes = {"vocab_size": V, "n_positions": T, "n_layer": L, "n_head": H, "n_embd": D}
    return {"model_type": "gpt2", **sizes, "bos_token_id": None, "eos_token_id": None, **VARIANTS[variant][0]}


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in Hugging Face's layout; far larger than a fresh model's, so that every path matters."""
    random = np.random.RandomState(list(VARIANTS).index(variant))
    draw = lambda std, *shape: random.normal(0, std, shape).astype(np.float32)
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


def batch() -> dict[str, np.ndarray]:
    """Tokens and targets; a few targets are -1, which is not learnt."""
    random = np.random.RandomState(99)
    tokens_BxT, targets_BxT = random.randint(0, V, (2, B, T)).astype(np.int32)
    return {"tokens": tokens_BxT, "targets": np.where(random.rand(B, T) < 0.2, -1, targets_BxT).astype(np.int32)}


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets) and "grad/NAME" for every parameter, as PyTorch has them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config(variant), **off, attn_implementation="eager"))
    state = {name: torch.tensor(value) for name, value in weights(variant).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    tokens_BxT, targets_BxT = (torch.tensor(x, dtype=torch.long) for x in batch().values())
    logits_BxTxV = model(tokens_BxT).logits
    loss = torch.nn.functional.cross_entropy(logits_BxTxV.flatten(0, 1), targets_BxT.flatten(), ignore_index=-1)
    loss.backward()
    results = {"logits": logits_BxTxV.detach().numpy(), "loss": loss.detach().numpy()}
    return results | {f"grad/{name}": p.grad.numpy() for name, p in model.named_parameters()}


if __name__ == "__main__":
    everything = {f"{variant}/{name}": x for variant in VARIANTS for name, x in oracle(variant).items()}
    np.savez_compressed(FILE, **everything)
    print(f"{FILE}: {len(everything)} arrays, {FILE.stat().st_size:,} bytes")
