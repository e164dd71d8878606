"""diffusers' DiT with the paper's loss: the error of the noise, and the variational bound of the learned variance."""

import torch
import torch.nn.functional as F
from models import Twin, made_in
from problems import Refused

STEPS = 1000  # of the noise


def dit(f: dict, variant, device: str) -> Twin:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.attention_processor import Attention, AttnProcessor

    if f["mlp_ratio"] != 4 or not f["num_classes"]:
        raise Refused("diffusers' DiT has an MLP of 4 D and at least one class")
    D, C, p, L = f["n_embd"], f["channels"], f["patch_size"], f["n_layer"]
    with made_in(f["param_dtype"], device):
        model = DiTTransformer2DModel(
            num_attention_heads=f["n_head"], attention_head_dim=D // f["n_head"], in_channels=C, num_layers=L,
            out_channels=C * (2 if f["learn_sigma"] else 1), sample_size=f["image_size"], patch_size=p,
            num_embeds_ada_norm=f["num_classes"], norm_eps=1e-6,
        )  # fmt: skip
    if not variant.flash:
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
    embedders = (256 * D + D) + (D * D + D) + (f["num_classes"] + 1) * D
    difference = f"each of diffusers' {L} blocks embeds time and class anew, ours once for all" if L > 1 else ""
    betas = torch.linspace(1e-4, 0.02, STEPS, device=device)

    def batch(rows: int) -> dict:
        shape = (rows, C, f["image_size"], f["image_size"])
        return {
            "images": torch.randn(shape, device=device),
            "noise": torch.randn(shape, device=device),
            "steps": torch.randint(0, STEPS, (rows,), device=device),
            "labels": torch.randint(0, f["num_classes"], (rows,), device=device),
        }

    loss = lambda b: hybrid_loss(model, betas, b, f["learn_sigma"])
    return Twin(model, loss, batch, difference=difference, extra=(L - 1) * embedders, held=[betas])


def hybrid_loss(model, betas, batch: dict, learn_sigma: bool):
    """L_simple + L_vlb of Nichol & Dhariwal 2021, equations 14 to 16; the bound teaches the variance alone."""
    images, noise, steps = batch["images"], batch["noise"], batch["steps"]
    of_steps = lambda x: x[steps][:, None, None, None]
    kept = torch.cumprod(1 - betas, 0)
    kept_before = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    noisy = of_steps(kept.sqrt()) * images + of_steps((1 - kept).sqrt()) * noise
    out = model(noisy, timestep=steps, class_labels=batch["labels"]).sample.float()
    if not learn_sigma:
        return F.mse_loss(out, noise)
    predicted, place = out.chunk(2, dim=1)
    posterior = betas * (1 - kept_before) / (1 - kept)
    floor, ceiling = of_steps(posterior.clamp(min=1e-20).log()), of_steps(betas.log())
    log_variance = (place + 1) / 2 * ceiling + (1 - (place + 1) / 2) * floor
    # Between normal distributions whose means differ by what the noise was misjudged, times this:
    scale = of_steps(betas / ((1 - kept) * (1 - betas)).sqrt())
    distance = (scale * (predicted.detach() - noise)) ** 2
    divergence = 0.5 * (log_variance - floor - 1 + floor.exp() / log_variance.exp() + distance / log_variance.exp())
    return F.mse_loss(predicted, noise) + divergence.mean() / 0.6931472  # in bits
