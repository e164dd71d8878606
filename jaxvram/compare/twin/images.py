"""diffusers' DiT, PixArt and U-Nets with the papers' loss: the error of the noise, and the bound of the learned variance."""

import torch
import torch.nn.functional as F
from models import Twin, made_in
from problems import Refused

STEPS = 1000  # of the noise


def dit(f: dict, variant, device: str) -> Twin:
    from diffusers import DiTTransformer2DModel

    if f["mlp_ratio"] != 4 or not f["num_classes"]:
        raise Refused("diffusers' DiT has an MLP of 4 D and at least one class")
    D, C, p, L = f["n_embd"], f["channels"], f["patch_size"], f["n_layer"]
    with made_in(f["param_dtype"], device):
        model = DiTTransformer2DModel(
            num_attention_heads=f["n_head"], attention_head_dim=D // f["n_head"], in_channels=C, num_layers=L,
            out_channels=C * (2 if f["learn_sigma"] else 1), sample_size=f["image_size"], patch_size=p,
            num_embeds_ada_norm=f["num_classes"], norm_eps=1e-6,
        )  # fmt: skip
    _without_flash(model, variant)
    embedders = (256 * D + D) + (D * D + D) + (f["num_classes"] + 1) * D
    difference = f"each of diffusers' {L} blocks embeds time and class anew, ours once for all" if L > 1 else ""
    betas = torch.linspace(1e-4, 0.02, STEPS, device=device)

    def batch(rows: int) -> dict:
        return _noisy(f, rows, device) | {"labels": torch.randint(0, f["num_classes"], (rows,), device=device)}

    def loss(b):
        predict = lambda noisy: model(noisy, timestep=b["steps"], class_labels=b["labels"]).sample
        return hybrid_loss(predict, betas, b, f["learn_sigma"])

    return Twin(model, loss, batch, difference=difference, extra=(L - 1) * embedders, held=[betas])


def pixart(f: dict, variant, device: str) -> Twin:
    """All tokens of a text count in its mask, which is read all the same."""
    from diffusers import PixArtTransformer2DModel

    if f["mlp_ratio"] != 4:
        raise Refused("diffusers' PixArt has an MLP of 4 D")
    D, C = f["n_embd"], f["channels"]
    with made_in(f["param_dtype"], device):
        model = PixArtTransformer2DModel(
            num_attention_heads=f["n_head"], attention_head_dim=D // f["n_head"], in_channels=C, num_layers=f["n_layer"],
            out_channels=C * (2 if f["learn_sigma"] else 1), sample_size=f["image_size"], patch_size=f["patch_size"],
            cross_attention_dim=D, caption_channels=f["context_dim"], use_additional_conditions=f["micro_conditions"],
            interpolation_scale=f["interpolation_scale"],
        )  # fmt: skip
    _without_flash(model, variant)
    betas = torch.linspace(1e-4, 0.02, STEPS, device=device)

    def batch(rows: int) -> dict:
        S, E = f["context_length"], f["context_dim"]
        text = {"context": torch.randn((rows, S, E), dtype=torch.float16, device=device)}
        text["mask"] = torch.ones((rows, S), device=device)
        if f["micro_conditions"]:
            text |= {"size": torch.ones((rows, 2), device=device), "aspect": torch.ones((rows, 1), device=device)}
        return _noisy(f, rows, device) | text

    def loss(b):
        told = {"resolution": b.get("size"), "aspect_ratio": b.get("aspect")}
        context = b["context"].to(getattr(torch, f["dtype"]))
        predict = lambda noisy: model(noisy, context, b["steps"], told, encoder_attention_mask=b["mask"]).sample
        return hybrid_loss(predict, betas, b, f["learn_sigma"])

    return Twin(model, loss, batch, held=[betas])


def unet(f: dict, variant, device: str) -> Twin:
    """UNet2DConditionModel where there is a text, all of whose tokens count; else UNet2DModel."""
    import diffusers

    if f["text_layers"]:
        raise Refused("diffusers' U-Nets have no text encoder that trains with them")
    text = f["context_dim"]
    sizes = [f["width"] * m for m in f["multipliers"]]
    heads = [f["heads"] or D // (f["head_dim"] or D) for D in sizes]
    attends = [level in f["attention_levels"] for level in range(len(sizes))]
    mark = "CrossAttn" if text else "Attn"
    blocks = lambda way, levels: tuple(f"{mark if has else ''}{way}Block2D" for has in levels)
    with made_in(f["param_dtype"], device):
        model = (diffusers.UNet2DConditionModel if text else diffusers.UNet2DModel)(
            sample_size=f["image_size"], in_channels=f["channels"],
            out_channels=f["channels"] * (2 if f["learn_sigma"] else 1), block_out_channels=tuple(sizes),
            layers_per_block=f["res_blocks"], down_block_types=blocks("Down", attends),
            up_block_types=blocks("Up", attends[::-1]), norm_num_groups=f["groups"], dropout=f["dropout"],
            # the number of heads of the one, in spite of its name, and their size of the other
            attention_head_dim=tuple(heads) if text else sizes[-1] // heads[-1],
            num_class_embeds=f["num_classes"] + 1 if f["num_classes"] else None,
            **({"cross_attention_dim": text} if text else {}),
        )  # fmt: skip
    _without_flash(model, variant)
    betas = torch.linspace(1e-4, 0.02, STEPS, device=device)

    def batch(rows: int) -> dict:
        told = {}
        if text:
            told["context"] = torch.randn((rows, f["context_length"], text), dtype=torch.float16, device=device)
            told["mask"] = torch.ones((rows, f["context_length"]), device=device)
        elif f["num_classes"]:
            told["labels"] = torch.randint(0, f["num_classes"], (rows,), device=device)
        return _noisy(f, rows, device) | told

    def loss(b):
        given = [b["context"].to(getattr(torch, f["dtype"]))] if text else [b.get("labels")]
        mask = {"encoder_attention_mask": b["mask"]} if text else {}
        return hybrid_loss(lambda noisy: model(noisy, b["steps"], *given, **mask).sample, betas, b, f["learn_sigma"])

    return Twin(model, loss, batch, held=[betas])


def _without_flash(model, variant) -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for module in model.modules():
        if isinstance(module, Attention) and not variant.flash:
            module.set_processor(AttnProcessor())


def _noisy(f: dict, rows: int, device: str) -> dict:
    """What of a batch every denoiser has."""
    shape = (rows, f["channels"], f["image_size"], f["image_size"])
    return {
        "images": torch.randn(shape, device=device),
        "noise": torch.randn(shape, device=device),
        "steps": torch.randint(0, STEPS, (rows,), device=device),
    }


def hybrid_loss(predict, betas, batch: dict, learn_sigma: bool):
    """L_simple + L_vlb of Nichol & Dhariwal 2021, equations 14 to 16; the bound teaches the variance alone."""
    images, noise, steps = batch["images"], batch["noise"], batch["steps"]
    of_steps = lambda x: x[steps][:, None, None, None]
    kept = torch.cumprod(1 - betas, 0)
    kept_before = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    noisy = of_steps(kept.sqrt()) * images + of_steps((1 - kept).sqrt()) * noise
    out = predict(noisy).float()
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
