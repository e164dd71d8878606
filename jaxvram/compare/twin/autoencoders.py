"""diffusers' AutoencoderKL with latent diffusion's loss, and a critic of patches that learns in the same step."""

import torch
import torch.nn.functional as F
from models import Twin, made_in
from torch import nn


class Both(nn.Module):
    """What is trained: the autoencoder, and the critic where there is one."""

    def __init__(self, autoencoder, critic):
        super().__init__()
        self.autoencoder, self.critic = autoencoder, critic

    def enable_gradient_checkpointing(self):
        self.autoencoder.enable_gradient_checkpointing()


def autoencoder(f: dict, variant, device: str) -> Twin:
    """`f`: the fields of our model's config and of its task's. Of variants, those without a flash kernel."""
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import Attention, AttnProcessor

    widths, C = [f["width"] * m for m in f["multipliers"]], f["channels"]
    with made_in(f["param_dtype"], device):
        kl = AutoencoderKL(
            in_channels=C, out_channels=C, block_out_channels=widths, layers_per_block=f["res_blocks"],
            down_block_types=["DownEncoderBlock2D"] * len(widths), up_block_types=["UpDecoderBlock2D"] * len(widths),
            latent_channels=f["latent_channels"], norm_num_groups=f["groups"], sample_size=f["image_size"],
        )  # fmt: skip
        model = Both(kl, patch_critic(C, f["disc_width"], f["disc_layers"]) if f["disc_weight"] else None)
    for module in model.modules():  # one head as wide as there are channels: no flash kernel takes it
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())

    def batch(rows: int) -> dict:
        return {"images": torch.randn((rows, C, f["image_size"], f["image_size"]), device=device)}

    return Twin(model, lambda b: loss(model, b["images"], f), batch)


def patch_critic(channels: int, width: int, layers: int) -> nn.Sequential:
    """PatchGAN with norms by groups."""
    modules = []
    for i in range(layers + 1):
        features = width * min(2**i, 8)
        modules.append(nn.Conv2d(channels, features, 4, stride=2 if i < layers else 1, padding=1))
        modules += [nn.GroupNorm(min(32, max(1, features // 4)), features)] if i else []
        modules.append(nn.LeakyReLU(0.2))
        channels = features
    return nn.Sequential(*modules, nn.Conv2d(channels, 1, 4, padding=1))


def loss(model: Both, images, f: dict):
    """Error and divergence; with a critic, what it says of the image too, and the critic's own hinge loss."""
    numbers = images[0].numel()
    posterior = model.autoencoder.encode(images).latent_dist
    latent = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
    again = model.autoencoder.decode(latent).sample.float()
    error = (F.l1_loss if f["reconstruction"] == "l1" else F.mse_loss)(again, images)
    total = error + f["kl_weight"] / numbers * posterior.kl().mean()
    if model.critic is None:
        return total
    model.critic.requires_grad_(False)
    fooled = -model.critic(again).float().mean()
    model.critic.requires_grad_(True)
    kernel = model.autoencoder.decoder.conv_out.weight
    norm = lambda of: torch.autograd.grad(of, kernel, retain_graph=True)[0].norm()
    weight = (norm(numbers * error) / (norm(fooled) + 1e-4)).clamp(max=1e4).detach()
    real, fake = model.critic(images).float(), model.critic(again.detach()).float()
    hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return total + f["disc_weight"] * weight / numbers * fooled + hinge
