"""Makes retnet_tiny.npz: logits, loss and every gradient of torchscale's RetNet, tiny, fp32, random weights.

  python tests/golden/make_retnet.py     (needs torch and torchscale; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone. At torchscale's usual eps of
1e-6 its forms are different functions: the parallel one divides a row by max(1, |sum of its scores|) before the norm, which
the norm undoes but for eps. "usual_eps" has weights as small as fresh ones, with which no such sum reaches 1 and eps counts
for much; the others an eps that counts for nothing.
"""

import contextlib
import functools
import pathlib
import sys
import types

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("retnet_tiny.npz")
V, T, L, D, B = 53, 21, 2, 24, 2
COMMON = {
    "model_type": "retnet", "vocab_size": V, "decoder_embed_dim": D, "decoder_layers": L, "decoder_retention_heads": 3,
    "decoder_value_embed_dim": 36, "decoder_ffn_embed_dim": 20, "activation_fn": "swish", "no_scale_embedding": False,
    "share_decoder_input_output_embed": False, "layernorm_eps": 1e-14,
}  # fmt: skip
VARIANTS = {  # name -> what config.json says
    "retnet": COMMON,
    "tied_gelu": COMMON | {
        "activation_fn": "gelu", "no_scale_embedding": True, "share_decoder_input_output_embed": True,
    },
    "usual_eps": COMMON | {"layernorm_eps": 1e-6},
}  # fmt: skip
config = VARIANTS.__getitem__
batch = functools.partial(golden_file.batch, V, B, T)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in torchscale's layout; but for "usual_eps" far larger than a fresh model's."""
    c = VARIANTS[variant]
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    E, F = c["decoder_value_embed_dim"], c["decoder_ffn_embed_dim"]
    named = {"embed_tokens.weight": draw(0.7, V, D), "layer_norm.weight": 1 + draw(0.2, D)}
    size = 0.15 if variant == "usual_eps" else 1
    retention = {"q_proj": (D, D), "k_proj": (D, D), "v_proj": (E, D), "g_proj": (E, D), "out_proj": (D, E)}
    for i in range(L):
        layer = {f"retention.{name}.weight": draw(size * s[1] ** -0.5, *s) for name, s in retention.items()}
        ffn = {"fc1": (F, D), "gate": (F, D), "fc2": (D, F)}
        layer |= {f"ffn.{name}.weight": draw(s[1] ** -0.5, *s) for name, s in ffn.items()}
        layer |= {f"{name}_layer_norm.weight": 1 + draw(0.2, D) for name in ("retention", "final")}
        named |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    if not c["share_decoder_input_output_embed"]:
        named["output_projection.weight"] = draw(0.7, V, D)
    return named


@contextlib.contextmanager
def without_what_it_does_not_need():
    """torchscale imports timm and fairscale for layers that RetNet has not; they are gone again afterwards."""
    names = ("timm", "timm.models", "timm.models.layers", "fairscale", "fairscale.nn")
    modules = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    modules["timm.models.layers"].drop_path = None
    modules["fairscale.nn"].checkpoint_wrapper = modules["fairscale.nn"].wrap = None
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def decoder(c: dict, **more):
    """torchscale's own model of a configuration, with fresh weights."""
    golden_file.quiet_torch()
    import torch

    with without_what_it_does_not_need():
        from torchscale.architecture.config import RetNetConfig
        from torchscale.architecture.retnet import RetNetDecoder
    table = torch.nn.Embedding(c["vocab_size"], c["decoder_embed_dim"])
    return RetNetDecoder(RetNetConfig(**{k: v for k, v in c.items() if k != "model_type"}, **more), embed_tokens=table)


def with_weights(variant: str):
    import torch

    model = decoder(VARIANTS[variant])
    named = {name: torch.tensor(x) for name, x in weights(variant).items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected and set(missing) <= {"output_projection.weight", "retnet_rel_pos.angle", "retnet_rel_pos.decay"}
    return model


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "logits", "loss" (mean over the targets) and "grad/NAME" for every parameter, as PyTorch has them."""
    model = with_weights(variant)
    results = golden_file.logits_and_loss(lambda input_ids, use_cache: _output(model(input_ids)[0]), batch())
    return results | golden_file.gradients(model)


def _output(logits):
    return types.SimpleNamespace(logits=logits)


def recurrent_logits(variant: str) -> np.ndarray:
    """Of torchscale's recurrent form, a token at a time."""
    import torch

    model, tokens, state, rows = with_weights(variant), torch.tensor(batch()["tokens"]).long(), {}, []
    with torch.no_grad():
        for t in range(T):
            rows.append(model(tokens[:, : t + 1], incremental_state=state)[0][:, -1])
    return torch.stack(rows, 1).numpy()


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
