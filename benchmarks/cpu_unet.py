"""A training step of a small pixel U-Net on this CPU, beside diffusers' UNet2DModel in PyTorch, in alternating turns.

  python benchmarks/cpu_unet.py                              (needs torch and diffusers)
  taskset -c 0 python benchmarks/cpu_unet.py --threads 1     one core each, in CPU time: on a busy machine

Both: the sizes of configs/unet.py:tiny, fp32, the noise to be found, AdamW, as many threads. Prints the median turn,
and the median ratio of turns that follow one another: above 1, ours is faster.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import UNet2DModel

from jaxvram import recipe
from jaxvram.models.unet import UNet, UNetConfig

STEPS, TURNS = 3, 9  # steps a turn, turns of each


def tiny() -> tuple[UNetConfig, int]:
    """(the model, the batch size) of configs/unet.py:tiny."""
    config, name, variant = recipe.load("configs/unet.py:tiny")
    built = recipe.build(config, name, variant)
    return built.model, built.train.batch_size


def batch(cfg: UNetConfig, B: int) -> dict:
    random = np.random.RandomState(0)
    shape = (B, cfg.image_size, cfg.image_size, cfg.channels)
    x, noise = random.normal(0, 1, (2, *shape)).astype(np.float32)
    t = random.randint(0, 1000, B)
    return {"x": x, "noise": noise, "t": t, "labels": random.randint(0, max(cfg.num_classes, 1), B)}


def ours(cfg: UNetConfig, b: dict):
    """A function that takes a step and waits for it."""
    model, optimizer = UNet(cfg), optax.adamw(1e-3)
    labels = b["labels"] if cfg.num_classes else None
    params = model.init(jax.random.key(0), b["x"], b["t"], labels)

    def step(params, state, b):
        labels = b["labels"] if cfg.num_classes else None
        loss = lambda p: jnp.square(model.apply(p, b["x"], b["t"], labels) - b["noise"]).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    held = [params, optimizer.init(params)]
    count = sum(p.size for p in jax.tree.leaves(params))

    def run():
        *held[:], value = step(*held, b)
        return float(value)

    return run, count


def theirs(cfg: UNetConfig, b: dict):
    attends = [level in cfg.attention_levels for level in range(len(cfg.multipliers))]
    model = UNet2DModel(
        sample_size=cfg.image_size, in_channels=cfg.channels, out_channels=cfg.out_channels,
        block_out_channels=tuple(map(cfg.channels_at, range(len(attends)))), layers_per_block=cfg.res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=cfg.channels_at(-1) // cfg.heads_at(-1), norm_num_groups=cfg.groups,
        num_class_embeds=cfg.num_classes + 1 if cfg.num_classes else None,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    given = {name: torch.tensor(a) for name, a in b.items()}
    x, noise = (given[name].movedim(-1, 1).contiguous() for name in ("x", "noise"))
    labels = given["labels"] if cfg.num_classes else None

    def run():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x, given["t"], labels).sample, noise)
        loss.backward()
        optimizer.step()
        return float(loss)

    return run, sum(p.numel() for p in model.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg, B = tiny()
    given = batch(cfg, B)
    (run_ours, count), (run_theirs, their_count) = ours(cfg, given), theirs(cfg, given)
    assert count == their_count, (count, their_count)
    for run in (run_ours, run_theirs):
        run(), run()
    clock = time.process_time if args.threads == 1 else time.perf_counter
    times = {"ours": [], "theirs": []}
    for _ in range(args.turns):
        for name, run in (("ours", run_ours), ("theirs", run_theirs)):
            start = clock()
            for _ in range(STEPS):
                run()
            times[name].append((clock() - start) / STEPS)
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
    of = {name: f"{1e3 * statistics.median(t):.1f} ms (best {1e3 * min(t):.1f})" for name, t in times.items()}
    versions = f"JAX {jax.__version__}, torch {torch.__version__}"
    print(f"{count:,} parameters, batch {B}, {cfg.image_size} px, {args.threads} threads, {versions}")
    print(f"jaxvram   {of['ours']}\ndiffusers {of['theirs']}\nspeed of ours over theirs: {ratio:.2f}")


if __name__ == "__main__":
    main()
