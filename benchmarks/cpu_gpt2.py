"""nanoGPT's CPU recipe, jaxvram beside eager PyTorch: training tokens per second on the cores of this machine.

  JAXVRAM_DATA=FOLDER_OF_TINYSHAKESPEARE python benchmarks/cpu_gpt2.py      # two minutes; needs torch

jaxvram runs its real train step with configs/nanogpt_shakespeare.py:cpu. PyTorch runs the same model written from nanoGPT's
maths (scaled_dot_product_attention, F.gelu, tied head), once with the AdamW that nanoGPT takes on a CPU (PyTorch's default)
and once with its fused one, and with glibc's own memory settings, as people run it (with those of jaxvram/host.py it gains
between nothing and a tenth). Making batches is timed on neither side.
How the sides are compared, and what the columns mean: side_by_side.py.
"""

import argparse
import math
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import side_by_side  # noqa: E402

RECIPE = ROOT / "configs" / "nanogpt_shakespeare.py"
WEIGHTS_SCALE = 2  # of all sides' weights: at the recipe's own, 0.02, the loss would not tell one GELU from another
TOLERANCE = 1e-6  # relative, of each loss: the tanh GELU fails it, or 0.1 % more in one matrix


def load_recipe():
    """The `cpu` recipe, and its task with the data."""
    from jaxvram import modes, recipe
    from jaxvram.vram.compile import settle_platform

    settle_platform()
    built = recipe.build(*recipe.load(f"{RECIPE}:cpu"))
    return built, modes.make_task(built)


def torch_side(recipe, params, fused: bool):
    """The same in PyTorch: nanoGPT's model and loop, with its default AdamW or the fused one."""
    import torch

    torch.set_num_threads(os.cpu_count())
    model = torch_model(recipe.model, params)
    cfg = recipe.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decay = cfg.groups["decayed"].weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.b1, cfg.b2), eps=cfg.eps, fused=fused or None)
    step = 0

    def run(batches):
        nonlocal step
        losses = []
        for batch in batches:
            for group in adamw.param_groups:
                group["lr"] = learning_rate(cfg, recipe.train.steps, step)
            loss = model(*(torch.from_numpy(batch[name]).long() for name in ("tokens", "targets")))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step += 1
        return losses

    return run


def learning_rate(cfg, total_steps: int, step: int) -> float:
    """nanoGPT's get_lr: linear warm-up, then a cosine down to the final fraction of the peak."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_steps + 1)
    progress = min(1, (step - cfg.warmup_steps) / (total_steps - cfg.warmup_steps))
    final = cfg.final_lr_fraction
    return cfg.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def torch_model(cfg, params):
    """GPT-2 without biases, mean cross-entropy from tokens and targets; weights copied from jaxvram's tree."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            D = cfg.n_embd
            self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
            self.c_attn, self.attn_proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.c_fc, self.mlp_proj = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

        def forward(self, x):
            B, T, D = x.shape
            heads = (a.view(B, T, cfg.n_head, -1).transpose(1, 2) for a in self.c_attn(self.ln_1(x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.attn_proj(y.transpose(1, 2).contiguous().view(B, T, D))
            return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(*params["wte"]["embedding"].shape)
            self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
            self.h = nn.Sequential(*(Block() for _ in range(cfg.n_layer)))
            self.ln_f = nn.LayerNorm(cfg.n_embd, bias=False)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
            logits = F.linear(self.ln_f(self.h(x)), self.wte.weight)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)

    model, h = GPT(), params["h"]
    weights = {getattr(model, table): params[table]["embedding"] for table in ("wte", "wpe")}
    weights |= {model.ln_f: params["ln_f"]["scale"]}
    for i, block in enumerate(model.h):
        weights |= {block.ln_1: h["ln_1"]["scale"][i], block.ln_2: h["ln_2"]["scale"][i]}
        weights |= {
            block.c_attn: h["attn"]["c_attn"]["kernel"][i].T,
            block.attn_proj: h["attn"]["c_proj"]["kernel"][i].T,
        }
        weights |= {block.c_fc: h["mlp"]["c_fc"]["kernel"][i].T, block.mlp_proj: h["mlp"]["c_proj"]["kernel"][i].T}
    with torch.no_grad():
        for module, value in weights.items():
            module.weight.copy_(torch.tensor(value))
    return model


def make(side: str, weights):
    """See side_by_side.serve."""
    recipe, task = load_recipe()
    batch_of = lambda n: task.source.batch("train", n, recipe.train.batch_size)
    if side == "jaxvram":
        import jax

        params = jax.tree.map(lambda p: p * WEIGHTS_SCALE, task.init(jax.random.key(recipe.train.seed)))
        return side_by_side.jaxvram_side(recipe, task, params), batch_of, jax.device_get(params)
    return torch_side(recipe, weights, fused=side == "torch fused"), batch_of, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = side_by_side.arguments(parser, 15, ROOT / "benchmarks" / "results" / "cpu_gpt2.json")
    recipe, _ = load_recipe()  # here first: what is wrong with the data is told once
    tokens = recipe.train.batch_size * recipe.model.block_size
    about = {"recipe": "configs/nanogpt_shakespeare.py:cpu"}
    side_by_side.benchmark(make, args, about, tokens, "tokens", TOLERANCE)


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    main()
