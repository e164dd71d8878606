"""Makes unet_tiny.npz: output and every gradient of diffusers' two U-Nets, tiny, fp32, random weights.

  python tests/golden/make_unet.py     (needs torch and diffusers; the tests that read the file do not)

"pixels" is a UNet2DModel with classes and a second set of channels, "text" a UNet2DConditionModel whose captions are of
different lengths. Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone.
"""

import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("unet_tiny.npz")
B = 3
VARIANTS = {  # name -> what config.json says; every size its own number
    "pixels": {
        "_class_name": "UNet2DModel", "sample_size": 12, "in_channels": 3, "out_channels": 6, "layers_per_block": 1,
        "block_out_channels": [4, 8, 12], "norm_num_groups": 2, "attention_head_dim": 4, "num_class_embeds": 6,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "text": {
        "_class_name": "UNet2DConditionModel", "sample_size": 10, "in_channels": 2, "out_channels": 2,
        "layers_per_block": 1, "block_out_channels": [8, 16], "norm_num_groups": 2, "attention_head_dim": 2,
        "cross_attention_dim": 5, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
}  # fmt: skip
LENGTHS, S = (7, 1, 4), 7  # tokens of each text, and with padding
DEAD = ("to_k.bias",)  # a bias of keys moves all scores of a query alike: its gradient is nought


def config(variant: str) -> dict:
    """What config.json of the variant says."""
    return VARIANTS[variant]


class _Weights:
    """Collects arrays in diffusers' layout; nothing is zero: every path matters."""

    def __init__(self, seed: int):
        self.named, self.draw = {}, golden_file.drawing(seed)

    def linear(self, name, fan_in, fan_out, *pixels, bias=True):
        size = fan_in * int(np.prod(pixels or 1))
        self.named[f"{name}.weight"] = self.draw(size**-0.5, fan_out, fan_in, *pixels)
        if bias:
            self.named[f"{name}.bias"] = self.draw(0.2, fan_out)

    def norm(self, name, channels):
        self.named[f"{name}.weight"], self.named[f"{name}.bias"] = (
            1 + self.draw(0.2, channels),
            self.draw(0.2, channels),
        )

    def res(self, name, fan_in, fan_out, emb):
        self.norm(f"{name}.norm1", fan_in)
        self.linear(f"{name}.conv1", fan_in, fan_out, 3, 3)
        self.linear(f"{name}.time_emb_proj", emb, fan_out)
        self.norm(f"{name}.norm2", fan_out)
        self.linear(f"{name}.conv2", fan_out, fan_out, 3, 3)
        if fan_in != fan_out:
            self.linear(f"{name}.conv_shortcut", fan_in, fan_out, 1, 1)

    def attend(self, name, D, text: int | None):
        if not text:
            self.norm(f"{name}.group_norm", D)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                self.linear(f"{name}.{part}", D, D)
            return
        self.norm(f"{name}.norm", D)
        self.linear(f"{name}.proj_in", D, D, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for i in (1, 2, 3):
            self.norm(f"{block}.norm{i}", D)
        for i, E in ((1, D), (2, text)):
            for part, fan_in in (("to_q", D), ("to_k", E), ("to_v", E)):
                self.linear(f"{block}.attn{i}.{part}", fan_in, D, bias=False)
            self.linear(f"{block}.attn{i}.to_out.0", D, D)
        self.linear(f"{block}.ff.net.0.proj", D, 8 * D)
        self.linear(f"{block}.ff.net.2", 4 * D, D)
        self.linear(f"{name}.proj_out", D, D, 1, 1)


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in diffusers' layout."""
    c, w = VARIANTS[variant], _Weights(list(VARIANTS).index(variant))
    sizes, n, text = c["block_out_channels"], c["layers_per_block"], c.get("cross_attention_dim")
    emb = 4 * sizes[0]
    w.linear("conv_in", c["in_channels"], sizes[0], 3, 3)
    w.linear("time_embedding.linear_1", sizes[0], emb)
    w.linear("time_embedding.linear_2", emb, emb)
    if classes := c.get("num_class_embeds"):
        w.named["class_embedding.weight"] = w.draw(0.7, classes, emb)
    before, skips = sizes[0], [sizes[0]]
    for level, D in enumerate(sizes):
        for i in range(n):
            w.res(f"down_blocks.{level}.resnets.{i}", before, D, emb)
            if "Attn" in c["down_block_types"][level]:
                w.attend(f"down_blocks.{level}.attentions.{i}", D, text)
            before = D
            skips.append(D)
        if level < len(sizes) - 1:
            w.linear(f"down_blocks.{level}.downsamplers.0.conv", D, D, 3, 3)
            skips.append(D)
    for i in (0, 1):
        w.res(f"mid_block.resnets.{i}", before, before, emb)
    w.attend("mid_block.attentions.0", before, text)
    for level, D in enumerate(sizes[::-1]):
        for i in range(n + 1):
            w.res(f"up_blocks.{level}.resnets.{i}", before + skips.pop(), D, emb)
            if "Attn" in c["up_block_types"][level]:
                w.attend(f"up_blocks.{level}.attentions.{i}", D, text)
            before = D
        if level < len(sizes) - 1:
            w.linear(f"up_blocks.{level}.upsamplers.0.conv", D, D, 3, 3)
    w.norm("conv_norm_out", before)
    w.linear("conv_out", before, c["out_channels"], 3, 3)
    return w.named


def batch(variant: str) -> dict[str, np.ndarray]:
    """Images (B, H, W, C), timesteps of which one is not whole, labels or a text, the gradient of the output.

    No late timesteps: an angle of 999 in fp32 is right to 3e-5, in diffusers as in ours: more than is tested for.
    """
    c, random = VARIANTS[variant], np.random.RandomState(99)
    draw = lambda *shape: random.normal(0, 1, shape).astype(np.float32)
    image = lambda C: draw(B, c["sample_size"], c["sample_size"], C)
    given = {"x": image(c["in_channels"]), "t": np.float32([0, 41.75, 130]), "g": image(c["out_channels"])}
    if variant == "pixels":
        return given | {"labels": np.int32([c["num_class_embeds"] - 1, 0, 2])}
    return given | {"context": draw(B, S, c["cross_attention_dim"]), "length": np.int32(LENGTHS)}


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "out" and "grad/x" (and "grad/context"), channels last, and "grad/NAME" of sum(out g) for every parameter."""
    golden_file.quiet_torch()
    import diffusers
    import torch

    given = {name: value for name, value in config(variant).items() if not name.startswith("_")}
    model = getattr(diffusers, config(variant)["_class_name"])(**given).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in weights(variant).items()})
    b = {name: torch.tensor(value) for name, value in batch(variant).items()}
    x_BxCxHxW = b["x"].movedim(-1, 1).requires_grad_()
    if variant == "pixels":
        out = model(x_BxCxHxW, b["t"], b["labels"].long()).sample
    else:
        mask_BxS = torch.arange(S) < b["length"][:, None]
        context = b["context"].requires_grad_()
        out = model(x_BxCxHxW, b["t"], context, encoder_attention_mask=mask_BxS).sample
    out_BxHxWxC = out.movedim(1, -1)
    (out_BxHxWxC * b["g"]).sum().backward()
    results = {"out": out_BxHxWxC.detach().numpy(), "grad/x": x_BxCxHxW.grad.movedim(1, -1).numpy()}
    if variant == "text":
        results["grad/context"] = b["context"].grad.numpy()
    return results | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
