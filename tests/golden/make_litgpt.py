"""Makes litgpt_tiny.npz: a tiny Llama with LitGPT's adapters v1 and v2, a gate for each head: logits, loss, gradients.

  pip install --no-deps litgpt==0.5.13 lightning==2.6.6 lightning-utilities torchmetrics    (beside torch)
  python tests/golden/make_litgpt.py     (the tests that read the file need none of it)

The base is make_llama.py's `biases`, which has one group of keys: with more, LitGPT 0.5.13 splits what it projects of the
prompts by an order of rows that its matrices no longer have (q, k and v of a group side by side), and is no oracle. Its
second version also scales the head; ours leaves that out, as the paper's own code does, so the head's keeps 1 and 0.
"""

import pathlib

import golden_file
import make_llama
import numpy as np

FILE = pathlib.Path(__file__).with_name("litgpt_tiny.npz")
BASE = "biases"
P, FIRST = 3, 1  # prompts a layer, the first layer that has some
VARIANTS = {  # name -> module, and what in it says which parameters are trained
    "adapter": ("litgpt.adapter", "mark_only_adapter_as_trainable"),
    "adapter_v2": ("litgpt.adapter_v2", "mark_only_adapter_v2_as_trainable"),
}
NAMES = {  # theirs -> Hugging Face's
    "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj", "transformer.h": "model.layers",
}  # fmt: skip


def base_weights() -> dict[str, np.ndarray]:
    """make_llama's by LitGPT's names: q, k and v are one matrix."""
    weights, named = make_llama.weights(BASE), {}
    for i in range(make_llama.L):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"model.layers.{i}.self_attn.{name}_proj.{kind}") for name in "qkv"]
            named[f"transformer.h.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
    for name, x in weights.items():
        for theirs, hf in NAMES.items():
            name = name.replace(hf, theirs)
        named[name] = x
    return named


def adapted(variant: str):
    """LitGPT's model with random weights in what it trains, but for the head's."""
    import importlib

    import torch

    (module, mark), said = VARIANTS[variant], make_llama.VARIANTS[BASE]
    module = importlib.import_module(module)
    config = module.Config(
        block_size=said["max_position_embeddings"], vocab_size=make_llama.V, padded_vocab_size=make_llama.V,
        n_layer=make_llama.L, n_embd=make_llama.D, intermediate_size=make_llama.F, n_head=said["num_attention_heads"],
        n_query_groups=said["num_key_value_heads"], rotary_percentage=1.0, parallel_residual=False, bias=True,
        lm_head_bias=False, norm_class_name="RMSNorm", norm_eps=said["rms_norm_eps"], mlp_class_name="LLaMAMLP",
        rope_base=int(said["rope_theta"]), adapter_prompt_length=P, adapter_start_layer=FIRST,
    )  # fmt: skip
    model = module.GPT(config)
    _, unexpected = model.load_state_dict({k: torch.tensor(v) for k, v in base_weights().items()}, strict=False)
    assert not unexpected, unexpected
    getattr(module, mark)(model)
    random = np.random.RandomState(11)
    with torch.no_grad():
        for name, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            if "adapter_wte" in name:
                p.zero_()  # PyTorch's random numbers, which nobody froze
            p += torch.tensor(random.normal(0, 0.7 if "wte" in name else 0.15, tuple(p.shape)).astype(np.float32))
        if variant == "adapter_v2":
            model.lm_head.reset_parameters()
    return model


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss", "weight/NAME" and "grad/NAME" of every trained parameter of a layer and of the last norm."""
    import torch

    model = adapted(variant).double()  # its own rounding in fp32 would be half of the difference to ours
    tokens, targets = (torch.tensor(x).long() for x in make_llama.batch().values())
    logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach()}
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith("lm_head"):
            found |= {f"weight/{name}": p.detach(), f"grad/{name}": p.grad}
    return {name: x.float().numpy() for name, x in found.items()}


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
