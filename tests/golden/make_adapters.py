"""Makes adapters_tiny.npz: a tiny Llama with peft's LoRA, DoRA and prompts: logits, loss, gradients of what is trained.

  python tests/golden/make_adapters.py     (needs torch, transformers, peft; the tests that read the file do not)

The base is that of make_llama.py; weights come from NumPy's RandomState, so the file holds results alone.
"""

import pathlib

import golden_file
import make_llama
import numpy as np

FILE = pathlib.Path(__file__).with_name("adapters_tiny.npz")
BASE = "gqa"
VARIANTS = {  # name -> peft's class and its arguments
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "o_proj"], "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "prompt": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
}


def adapted(variant: str, folder=None):
    """peft's model with random weights in what it adds; its adapter saved in `folder`."""
    golden_file.quiet_torch()
    import peft
    import torch

    cls, arguments = VARIANTS[variant]
    model = peft.get_peft_model(make_llama.model(BASE), getattr(peft, cls)(**arguments, task_type="CAUSAL_LM"))
    random = np.random.RandomState(7)
    with torch.no_grad():
        for name, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            draw = torch.tensor(random.normal(0, 0.3, tuple(p.shape)).astype(np.float32))
            p.copy_(p * (1 + draw) if "magnitude" in name else draw)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def oracle(variant: str, folder=None) -> dict[str, np.ndarray]:
    """ "logits", "loss", "weight/NAME" and "grad/NAME" of every trained parameter, by peft's names in a saved adapter."""
    model = adapted(variant, folder)
    found = golden_file.logits_and_loss(model, make_llama.batch())
    for name, p in model.named_parameters():
        if p.requires_grad:
            saved = name.replace(".default.weight", ".weight" if "magnitude" not in name else "").replace(".default", "")
            found |= {f"weight/{saved}": p.detach().numpy(), f"grad/{saved}": p.grad.numpy()}
    return found


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
