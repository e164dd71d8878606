"""A training step of DiT at the size of S/2, jaxvram beside eager PyTorch: images per second on the cores of this machine.

  python benchmarks/cpu_dit.py      # six minutes; needs torch

12 layers of 384, 6 heads, 32 x 32 x 4 latents in patches of 2 (256 tokens), 1000 classes, fp32, AdamW, averaged weights,
epsilon and its mean squared error. jaxvram runs its real train step; PyTorch the same model written from the paper's maths
(scaled_dot_product_attention, F.gelu), once with its default AdamW and once with its fused one, the average by one
torch._foreach_lerp_. Images, timesteps and noise come ready made on all sides. How the sides are compared, and what the
columns mean: side_by_side.py.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import side_by_side  # noqa: E402

BATCH = 4
TOLERANCE = 1e-5  # relative, of each loss
ZERO_INIT_SCALE = 0.02  # of what DiT starts at zero: at zero no side's blocks would do anything


def load_recipe():
    from jaxvram import recipe
    from jaxvram.vram.compile import settle_platform

    settle_platform()
    built = recipe.build(*recipe.load(f"{ROOT / 'configs' / 'dit.py'}:s2"))
    model = dataclasses.replace(built.model, dtype="float32", remat="none", unroll_layers=True, learn_sigma=False)
    train = dataclasses.replace(built.train, batch_size=BATCH, microbatch_size=0)
    sample = dataclasses.replace(built.sample, guidance=1.0)
    return dataclasses.replace(built, model=model, train=train, sample=sample)


def make_task(recipe):
    """The recipe's task, with timesteps and noise as the batch has them."""
    from jaxvram import models
    from jaxvram.tasks.diffusion import DiffusionTask

    class Given(DiffusionTask):
        def loss(self, params, batch, key):
            parts = self.losses(params, batch["images"], self.conditions.of_batch(batch), batch["t"], batch["noise"])
            return parts["mse"].sum(), np.float32(BATCH), {}

    return Given(models.build(recipe.model), None, recipe.task, recipe.sample)


def batch_of(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    images, noise = rng.standard_normal((2, BATCH, 32, 32, 4), np.float32)
    labels, t = rng.integers(1000, size=(2, BATCH), dtype=np.int32)
    return {"images": images, "noise": noise, "labels": labels, "t": t}


def torch_side(recipe, params, fused: bool):
    """The same in PyTorch, with its default AdamW or the fused one."""
    import torch

    torch.set_num_threads(os.cpu_count())
    model, cfg = torch_model(recipe.model, params), recipe.optimizer
    weights = list(model.parameters())
    betas = (cfg.b1, cfg.b2)
    adamw = torch.optim.AdamW(weights, lr=cfg.learning_rate, betas=betas, eps=cfg.eps, weight_decay=0, fused=fused or None)
    average, decay, step = [p.detach().clone() for p in weights], recipe.train.ema_decay, 0
    alpha_bar_T = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def run(batches):
        nonlocal step
        losses = []
        for batch in batches:
            images, noise, labels, t = (torch.from_numpy(batch[name]) for name in ("images", "noise", "labels", "t"))
            alpha_bar = alpha_bar_T[t.long()].view(-1, 1, 1, 1)
            x_t = alpha_bar.sqrt().float() * images + (1 - alpha_bar).sqrt().float() * noise
            loss = (model(x_t, t, labels.long()) - noise).square().mean()
            loss.backward()
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - min(decay, (1 + step) / (10 + step)))
            losses.append(loss.item())
            step += 1
        return losses

    return run


def torch_model(cfg, params):
    """DiT from the paper's maths, on (B, H, W, C) as it comes; weights copied from jaxvram's tree."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from jaxvram.layers.patches import sincos_positions

    D, p, side = cfg.n_embd, cfg.patch_size, cfg.image_size // cfg.patch_size

    def dense(of, i=None):
        kernel, bias = (of[name] if i is None else of[name][i] for name in ("kernel", "bias"))
        layer = nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(kernel.T))
            layer.bias.copy_(torch.tensor(bias))
        return layer

    modulate = lambda x, shift, scale: F.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    class Block(nn.Module):
        def __init__(self, of, i):
            super().__init__()
            self.ada, self.c_attn, self.attn_proj = (dense(of[a], i) if a == "ada" else dense(of["attn"][a], i)
                                                     for a in ("ada", "c_attn", "c_proj"))  # fmt: skip
            self.c_fc, self.mlp_proj = dense(of["mlp"]["c_fc"], i), dense(of["mlp"]["c_proj"], i)

        def forward(self, x, c):
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.ada(F.silu(c)).chunk(6, dim=1)
            B, T, _ = x.shape
            qkv = self.c_attn(modulate(x, shift_1, scale_1)).view(B, T, 3, cfg.n_head, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(B, T, D)
            x = x + gate_1[:, None] * self.attn_proj(y)
            u = self.c_fc(modulate(x, shift_2, scale_2))
            return x + gate_2[:, None] * self.mlp_proj(F.gelu(u, approximate="tanh"))

    class DiT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.fc1, self.fc2 = dense(params["patch_embed"]), *map(dense, params["t_embed"].values())
            self.table = nn.Embedding.from_pretrained(torch.tensor(params["y_embed"]["table"]["embedding"]), freeze=False)
            self.blocks = nn.ModuleList(Block(params["blocks"], i) for i in range(cfg.n_layer))
            self.ada, self.final = dense(params["final"]["ada"]), dense(params["final"]["linear"])
            self.register_buffer("positions", torch.tensor(sincos_positions(D, side, side)))
            self.register_buffer("omega", 10000.0 ** (-torch.arange(128) / 128))

        def forward(self, image, t, labels):
            B, H, W, C = image.shape
            patches = image.view(B, side, p, side, p, C).transpose(2, 3).reshape(B, side**2, -1)
            x = self.patch(patches) + self.positions
            angle = t[:, None].float() * self.omega
            features = torch.cat([angle.cos(), angle.sin()], dim=1)
            c = self.fc2(F.silu(self.fc1(features))) + self.table(labels)
            for block in self.blocks:
                x = block(x, c)
            out = self.final(modulate(x, *self.ada(F.silu(c)).chunk(2, dim=1)))
            return out.view(B, side, side, p, p, C).transpose(2, 3).reshape(B, H, W, C)

    return DiT()


def make(side: str, weights):
    """See side_by_side.serve."""
    recipe = load_recipe()
    if side != "jaxvram":
        return torch_side(recipe, weights, fused=side == "torch fused"), batch_of, None
    import jax

    task, rng = make_task(recipe), np.random.default_rng(0)
    params = jax.device_get(task.init(jax.random.key(0)))
    params = jax.tree.map(lambda a: a if a.any() else rng.normal(0, ZERO_INIT_SCALE, a.shape).astype(np.float32), params)
    return side_by_side.jaxvram_side(recipe, task, params), batch_of, params


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = side_by_side.arguments(parser, 4, ROOT / "benchmarks" / "results" / "cpu_dit.json")
    about = {"model": "DiT-S/2, 32 x 32 x 4, fp32, epsilon", "recipe": "configs/dit.py:s2, changed as load_recipe says"}
    side_by_side.benchmark(make, args, about, BATCH, "images", TOLERANCE)


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    main()
