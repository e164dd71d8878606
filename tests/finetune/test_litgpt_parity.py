"""LLaMA-Adapter, both versions, with a gate for each head equals LitGPT's: logits, loss and gradients, by golden file."""

import jax
import make_litgpt
import make_llama
import numpy as np
import parity
import pytest
from flax import traverse_util
from golden_file import part
from quick import relative_error as error

from jaxvram.finetune.adapted import Adapted
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.train.partition import divide

C = make_llama.VARIANTS[make_litgpt.BASE]
CFG = LlamaConfig(
    vocab_size=make_llama.V, block_size=make_llama.T, n_layer=make_llama.L, n_embd=make_llama.D, n_inner=make_llama.F,
    n_head=C["num_attention_heads"], n_kv_head=C["num_key_value_heads"], norm_eps=C["rms_norm_eps"], remat="full",
    attention_bias=True, mlp_bias=True, dtype="float32",
)  # fmt: skip
OURS = {
    name: FinetuneConfig(name, prompt_length=make_litgpt.P, first_layer=make_litgpt.FIRST) for name in make_litgpt.VARIANTS
}
MATRICES = {"attn.proj": "attn/o_proj", "mlp.fc_1": "mlp/gate_proj", "mlp.fc_2": "mlp/up_proj", "mlp.proj": "mlp/down_proj"}
NORMS = {"norm_1": "input_norm", "norm_2": "post_norm"}
PROMPTS = {"attn.adapter_wte.weight": "adapter_prompt", "attn.gating_factor": "adapter_gate"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    weights = make_llama.weights(make_litgpt.BASE)
    return parity.in_our_layout(tmp_path_factory.mktemp("base"), make_llama, make_litgpt.BASE, CFG, weights)


def of_layer(named, i):
    """Our path in a layer -> LitGPT's tensor."""
    begin, found = f"transformer.h.{i}.", {}
    heads = [n * CFG.key_size for n in (CFG.n_head, CFG.n_kv_head)]
    for name, x in named.items():
        part, _, kind = name.removeprefix(begin).rpartition(".")
        if not name.startswith(begin):
            continue
        if part == "attn.qkv":
            for letter, piece in zip("qkv", np.split(x, np.cumsum(heads)), strict=True):
                found[f"attn/{letter}_proj/{kind}"] = piece
        elif f"{part}.{kind}" in PROMPTS:
            found[f"attn/{PROMPTS[f'{part}.{kind}']}"] = x.reshape(x.shape if x.ndim == 2 else (-1, 1))
        else:
            found[f"{NORMS[part]}/scale" if part in NORMS else f"{MATRICES[part]}/{kind}"] = x
    return found


def as_ours(named):
    """A tree of the trained parameters; zeros where a layer has none."""
    layers = [of_layer(named, i) for i in range(CFG.n_layer)]
    flat = {
        tuple(f"layers/{path}".split("/")): np.stack([layer.get(path, np.zeros_like(x)) for layer in layers])
        for path, x in layers[-1].items()
    }
    if "transformer.ln_f.weight" in named:
        flat["norm", "scale"] = named["transformer.ln_f.weight"]
    return traverse_util.unflatten_dict(flat)


def run(variant, base, added):
    """(logits, loss, gradients by what is trained)."""
    model, finetune = Adapted(Llama(CFG), OURS[variant]), OURS[variant]
    fresh = model.init(jax.random.key(0), make_llama.batch()["tokens"][:1, :1])["params"]
    flat = [traverse_util.flatten_dict(tree) for tree in (fresh, base, added)]
    trained, frozen = divide(traverse_util.unflatten_dict(flat[0] | flat[1] | flat[2]), finetune.trains)
    return parity.language_model(model, trained, **parity.of_batch(make_llama), frozen=frozen)


@pytest.mark.parametrize("variant", make_litgpt.VARIANTS)
def test_the_golden_file(base, variant):
    reference = parity.golden(make_litgpt, variant)
    found = run(variant, base, as_ours(part(reference, "weight")))
    parity.assert_small(parity.errors(found, reference, as_ours(part(reference, "grad"))))


def test_the_gates_are_of_heads(base):
    """Another gate for each head: with the gates of two heads exchanged nothing agrees."""
    reference = parity.golden(make_litgpt, "adapter")
    weights, gate = part(reference, "weight"), "transformer.h.1.attn.gating_factor"
    weights[gate] = weights[gate][:, :, [1, 0, 2, 3]]
    logits, _, _ = run("adapter", base, as_ours(weights))
    assert error(logits, reference["logits"]) > 100 * parity.TOLERANCE
