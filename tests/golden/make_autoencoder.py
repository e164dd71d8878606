"""Makes autoencoder_tiny.npz: moments, a decoded latent and every gradient of diffusers' AutoencoderKL, tiny, fp32.

  python tests/golden/make_autoencoder.py     (needs torch and diffusers; the tests that read the file do not)

Weights come from NumPy's RandomState, whose stream is frozen, so the file holds results alone. The latent that is
decoded is mean + std * noise with given noise, so that one backward pass goes through all of both halves.
"""

import pathlib

import golden_file
import numpy as np

FILE = pathlib.Path(__file__).with_name("autoencoder_tiny.npz")
B = 2
VARIANTS = {  # name -> what config.json says; every size its own number
    "three_levels": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": [4, 8, 12], "layers_per_block": 2,
        "latent_channels": 4, "norm_num_groups": 2, "sample_size": 12,
    },
    "grey": {
        "in_channels": 1, "out_channels": 1, "block_out_channels": [4, 12], "layers_per_block": 1,
        "latent_channels": 3, "norm_num_groups": 2, "sample_size": 6,
    },
}  # fmt: skip


def config(variant: str) -> dict:
    """What config.json of the variant says."""
    c = VARIANTS[variant]
    levels = len(c["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"_class_name": "AutoencoderKL", **c, **blocks}


def weights(variant: str) -> dict[str, np.ndarray]:
    """Name -> fp32 array, in diffusers' layout; nothing is zero, and no norm's weight is one."""
    draw = golden_file.drawing(list(VARIANTS).index(variant))
    named = {}
    for name, shape in shapes(variant).items():
        if name.endswith("bias"):
            named[name] = draw(0.2, *shape)
        elif len(shape) == 1:
            named[name] = 1 + draw(0.2, *shape)
        else:
            named[name] = draw(np.prod(shape[1:]) ** -0.5, *shape)
    return named


def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter."""
    c = VARIANTS[variant]
    widths, layers, z = c["block_out_channels"], c["layers_per_block"], c["latent_channels"]
    found = {}

    def module(name, *weight):
        found[f"{name}.weight"], found[f"{name}.bias"] = weight, weight[:1]

    def resnet(name, n_in, n_out):
        module(f"{name}.norm1", n_in)
        module(f"{name}.conv1", n_out, n_in, 3, 3)
        module(f"{name}.norm2", n_out)
        module(f"{name}.conv2", n_out, n_out, 3, 3)
        if n_in != n_out:
            module(f"{name}.conv_shortcut", n_out, n_in, 1, 1)

    def middle(half):
        D = widths[-1]
        resnet(f"{half}.mid_block.resnets.0", D, D)
        module(f"{half}.mid_block.attentions.0.group_norm", D)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            module(f"{half}.mid_block.attentions.0.{name}", D, D)
        resnet(f"{half}.mid_block.resnets.1", D, D)

    module("encoder.conv_in", widths[0], c["in_channels"], 3, 3)
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            resnet(f"encoder.down_blocks.{i}.resnets.{j}", before, width)
            before = width
        if i < len(widths) - 1:
            module(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width, 3, 3)
    middle("encoder")
    module("encoder.conv_norm_out", before)
    module("encoder.conv_out", 2 * z, before, 3, 3)
    module("quant_conv", 2 * z, 2 * z, 1, 1)
    module("post_quant_conv", z, z, 1, 1)
    module("decoder.conv_in", before, z, 3, 3)
    middle("decoder")
    for i, width in enumerate(reversed(widths)):
        for j in range(layers + 1):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", before, width)
            before = width
        if i < len(widths) - 1:
            module(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3)
    module("decoder.conv_norm_out", before)
    module("decoder.conv_out", c["out_channels"], before, 3, 3)
    return found


def batch(variant: str) -> dict[str, np.ndarray]:
    """Images (B, H, W, C), noise of the latent, and what the moments and the decoded image are multiplied by."""
    c, random = VARIANTS[variant], np.random.RandomState(99)
    side, C, z = c["sample_size"], c["in_channels"], c["latent_channels"]
    small = side >> (len(c["block_out_channels"]) - 1)
    draw = lambda *shape: random.normal(0, 1, shape).astype(np.float32)
    latent = (B, small, small, z)
    return {"x": draw(B, side, side, C), "noise": draw(*latent), "g_mean": draw(*latent), "g_logvar": draw(*latent),
            "g": draw(B, side, side, C)}  # fmt: skip


def oracle(variant: str) -> dict[str, np.ndarray]:
    """ "mean", "logvar", "out" and "grad/x", channels last, and "grad/NAME" for every parameter, as in PyTorch."""
    golden_file.quiet_torch()
    import diffusers
    import torch

    given = {name: value for name, value in config(variant).items() if not name.startswith("_")}
    model = diffusers.AutoencoderKL(**given)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights(variant).items()})
    b = {name: torch.tensor(value).movedim(-1, 1) for name, value in batch(variant).items()}
    x = b["x"].contiguous().requires_grad_()
    posterior = model.encode(x).latent_dist
    out = model.decode(posterior.mean + posterior.std * b["noise"]).sample
    sums = (posterior.mean * b["g_mean"]).sum() + (posterior.logvar * b["g_logvar"]).sum() + (out * b["g"]).sum()
    sums.backward()
    found = {"mean": posterior.mean, "logvar": posterior.logvar, "out": out, "grad/x": x.grad}
    results = {name: value.detach().movedim(1, -1).numpy() for name, value in found.items()}
    return results | golden_file.gradients(model)


if __name__ == "__main__":
    golden_file.write_variants(FILE, VARIANTS, oracle)
