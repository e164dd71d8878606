"""Makes pixart_tiny.npz: output and every gradient of diffusers' PixArtTransformer2DModel, tiny, fp32, random weights.

  python tests/golden/make_pixart.py     (needs torch and diffusers; the tests that read the file do not)

Captions are padded: a mask says which tokens count, of one caption only the first. Images are not square, and of another
size than the model's, so that positions are stretched. Weights come from NumPy's RandomState, whose stream is frozen.
"""

import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("pixart_tiny.npz")
B, S = 3, 5
VARIANTS = {  # name -> what config.json says; every size its own number
    "plain": {
        "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6,
        "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16, "caption_channels": 7,
        "use_additional_conditions": False,
    },
    "micro_conditions": {
        "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 4, "in_channels": 1, "out_channels": 1,
        "sample_size": 9, "patch_size": 3, "cross_attention_dim": 12, "caption_channels": 10,
        "use_additional_conditions": True, "interpolation_scale": 2,
    },
}  # fmt: skip
SHAPES = {"plain": (6, 10), "micro_conditions": (12, 6)}  # of the images
KEYS = ("x", "context")  # inputs whose gradients are kept


def config(variant: str) -> dict:
    """What config.json of the variant says."""
    return {"_class_name": "PixArtTransformer2DModel", **VARIANTS[variant]}


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in diffusers' layout; nothing is zero, as in a fresh model much is: every path matters."""
    c = VARIANTS[variant]
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    D, C, p, E = c["cross_attention_dim"], c["in_channels"], c["patch_size"], c["caption_channels"]

    def linear(name, fan_in, fan_out):
        return {f"{name}.weight": draw(fan_in**-0.5, fan_out, fan_in), f"{name}.bias": draw(0.2, fan_out)}

    def embedder(name, width):
        return linear(f"{name}.linear_1", 256, width) | linear(f"{name}.linear_2", width, width)

    named = embedder("adaln_single.emb.timestep_embedder", D) | linear("adaln_single.linear", D, 6 * D)
    if c["use_additional_conditions"]:
        named |= embedder("adaln_single.emb.resolution_embedder", D // 3)
        named |= embedder("adaln_single.emb.aspect_ratio_embedder", D // 3)
    named |= linear("caption_projection.linear_1", E, D) | linear("caption_projection.linear_2", D, D)
    named |= linear("proj_out", D, p * p * c["out_channels"]) | {"scale_shift_table": draw(0.4, 2, D)}
    named["pos_embed.proj.weight"], named["pos_embed.proj.bias"] = draw((C * p * p) ** -0.5, D, C, p, p), draw(0.2, D)
    for i in range(c["num_layers"]):
        block = f"transformer_blocks.{i}."
        named[block + "scale_shift_table"] = draw(0.4, 6, D)
        for attn in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                named |= linear(f"{block}{attn}.{name}", D, D)
        named |= linear(block + "ff.net.0.proj", D, 4 * D) | linear(block + "ff.net.2", 4 * D, D)
    return named


def batch(variant: str) -> dict[str, np.ndarray]:
    """Images, timesteps of which one is not whole, texts and their lengths, sizes, aspects, the gradient of the output.

    No late timesteps: an angle of 999 in fp32 is right to 3e-5, in diffusers as in ours: more than is tested for.
    """
    c, random = VARIANTS[variant], np.random.RandomState(99)
    draw = lambda *shape: random.normal(0, 1, shape).astype(np.float32)
    H, W = SHAPES[variant]
    return {
        "x": draw(B, H, W, c["in_channels"]),
        "t": np.float32([0, 41.75, 130]),
        "context": draw(B, S, c["caption_channels"]),
        "length": np.int32([S, 1, 3]),
        "size": np.float32([[64, 100], [96, 48.5], [1, 130]]),
        "aspect": np.float32([0.64, 2, 0.25]),
        "g": draw(B, H, W, c["out_channels"]),
    }


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "out"; of sum(out g) "grad/x", "grad/context" and "grad/NAME" for every parameter; images (B, H, W, C)."""
    golden_file.quiet_torch()
    import diffusers
    import torch

    given = {name: value for name, value in config(variant).items() if not name.startswith("_")}
    model = diffusers.PixArtTransformer2DModel(**given).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in weights(variant).items()})
    b = {name: torch.tensor(value) for name, value in batch(variant).items()}
    x_BxCxHxW, context_BxSxE = b["x"].movedim(-1, 1).requires_grad_(), b["context"].requires_grad_()
    mask_BxS = (torch.arange(S) < b["length"][:, None]).float()
    told = {"resolution": None, "aspect_ratio": None}
    if VARIANTS[variant]["use_additional_conditions"]:
        told = {"resolution": b["size"], "aspect_ratio": b["aspect"][:, None]}
    kwargs = {"encoder_attention_mask": mask_BxS, "added_cond_kwargs": told}
    out_BxHxWxC = model(x_BxCxHxW, context_BxSxE, b["t"], **kwargs).sample.movedim(1, -1)
    (out_BxHxWxC * b["g"]).sum().backward()
    results = {"out": out_BxHxWxC.detach().numpy(), "grad/x": x_BxCxHxW.grad.movedim(1, -1).numpy()}
    return results | {"grad/context": context_BxSxE.grad.numpy()} | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
