"""Makes dit_tiny.npz: output and every gradient of diffusers' DiTTransformer2DModel, tiny, fp32, random weights.

  python tests/golden/make_dit.py     (needs torch and diffusers; the tests that read the file do not)

diffusers' model is the authors' after two corrections: norm_eps=1e-6, and downscale_freq_shift=0 in the timestep's
sines. Its blocks have embedders of their own with equal weights; here they share block 0's, whose gradient is the sum.
Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("dit_tiny.npz")
B = 3
VARIANTS = {  # name -> what config.json says; every size its own number
    "learnt_variance": {
        "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6,
        "sample_size": 10, "patch_size": 2, "num_embeds_ada_norm": 5,
    },
    "fixed_variance": {
        "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 4, "in_channels": 1, "out_channels": 1,
        "sample_size": 9, "patch_size": 3, "num_embeds_ada_norm": 7,
    },
}  # fmt: skip
EMBEDDERS = "transformer_blocks.{}.norm1.emb."  # then timestep_embedder or class_embedder


def config(variant: str) -> dict:
    """What config.json of the variant says."""
    return {"_class_name": "DiTTransformer2DModel", "norm_eps": 1e-6, **VARIANTS[variant]}


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in diffusers' layout; nothing is zero, as in a fresh model much is: every path matters."""
    c = VARIANTS[variant]
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    D, L, C, p = c["num_attention_heads"] * c["attention_head_dim"], c["num_layers"], c["in_channels"], c["patch_size"]

    def linear(name, fan_in, fan_out):
        return {f"{name}.weight": draw(fan_in**-0.5, fan_out, fan_in), f"{name}.bias": draw(0.2, fan_out)}

    emb = EMBEDDERS.format(0)
    named = linear(emb + "timestep_embedder.linear_1", 256, D) | linear(emb + "timestep_embedder.linear_2", D, D)
    named[emb + "class_embedder.embedding_table.weight"] = draw(0.7, c["num_embeds_ada_norm"] + 1, D)
    named |= linear("proj_out_1", D, 2 * D) | linear("proj_out_2", D, p * p * c["out_channels"])
    named["pos_embed.proj.weight"], named["pos_embed.proj.bias"] = draw((C * p * p) ** -0.5, D, C, p, p), draw(0.2, D)
    for i in range(L):
        for name, fan_in, fan_out in (
            ("norm1.linear", D, 6 * D), ("attn1.to_q", D, D), ("attn1.to_k", D, D), ("attn1.to_v", D, D),
            ("attn1.to_out.0", D, D), ("ff.net.0.proj", D, 4 * D), ("ff.net.2", 4 * D, D),
        ):  # fmt: skip
            named |= linear(f"transformer_blocks.{i}.{name}", fan_in, fan_out)
    return with_copies(named, L)


def with_copies(named: dict[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """Block 0's embedders in every block."""
    first = EMBEDDERS.format(0)
    of_first = {name.removeprefix(first): x for name, x in named.items() if name.startswith(first)}
    return named | {EMBEDDERS.format(i) + name: x for i in range(n_layers) for name, x in of_first.items()}


def batch(variant: str) -> dict[str, np.ndarray]:
    """Images (B, H, W, C), timesteps of which one is not whole, labels with "no class", the gradient of the output.

    No late timesteps: an angle of 999 in fp32 is right to 3e-5, in diffusers as in ours: more than is tested for.
    """
    c, random = VARIANTS[variant], np.random.RandomState(99)
    draw = lambda C: random.normal(0, 1, (B, c["sample_size"], c["sample_size"], C)).astype(np.float32)
    classes = c["num_embeds_ada_norm"]
    t_B, labels_B = np.float32([0, 41.75, 130]), np.int32([classes - 1, classes, 0])
    return {"x": draw(c["in_channels"]), "t": t_B, "labels": labels_B, "g": draw(c["out_channels"])}


def correct(model):
    """The second correction; the first is in `config`."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval()  # in training it drops labels


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "out" and "grad/x", both (B, H, W, C), and "grad/NAME" of sum(out g) for every parameter, as in PyTorch."""
    golden_file.quiet_torch()
    import diffusers
    import torch

    given = {name: value for name, value in config(variant).items() if not name.startswith("_")}
    model = correct(diffusers.DiTTransformer2DModel(**given))
    model.load_state_dict({name: torch.tensor(value) for name, value in weights(variant).items()})
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    b = {name: torch.tensor(value) for name, value in batch(variant).items()}
    x_BxCxHxW = b["x"].movedim(-1, 1).requires_grad_()
    out_BxHxWxC = model(x_BxCxHxW, b["t"], b["labels"].long()).sample.movedim(1, -1)
    (out_BxHxWxC * b["g"]).sum().backward()
    results = {"out": out_BxHxWxC.detach().numpy(), "grad/x": x_BxCxHxW.grad.movedim(1, -1).numpy()}
    return results | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
