"""nanoGPT's CPU recipe, jaxvram beside eager PyTorch: training tokens per second on the cores of this machine.

  JAXVRAM_DATA=FOLDER_OF_TINYSHAKESPEARE python benchmarks/cpu_gpt2.py      # two minutes; needs torch

jaxvram runs its real train step with configs/nanogpt_shakespeare.py:cpu, as the loop does: a step's metrics are read
after the next one is dispatched. PyTorch runs the same model written from nanoGPT's maths (scaled_dot_product_attention,
F.gelu, tied head), once with the AdamW that nanoGPT takes on a CPU (PyTorch's default) and once with its fused one, and
with glibc's own memory settings, as people run it (with those of jaxvram/host.py it gains between nothing and a tenth).
Making batches is timed on neither side.

Each side is a process of its own; all start from the same weights and see the same batches, and nothing is timed unless
their first losses agree. Then short rounds alternate in random order, and ratios are taken within a round, so that what
slows a round down slows all sides. `others` is the processor time that went to anyone else meanwhile: with more than a
few per cent the figures are not worth much, as PyTorch's threads spin where XLA's sleep, and either may lose by it.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "nanogpt_shakespeare.py"
COMPARED_STEPS = 10  # whose losses must agree before anything is timed
WEIGHTS_SCALE = 2  # of all sides' weights: at the recipe's own, 0.02, the loss would not tell one GELU from another
TOLERANCE = 1e-6  # relative, of each loss: the tanh GELU fails it, or 0.1 % more in one matrix
WARM_UP_STEPS = 20
SIDES = ("jaxvram", "torch", "torch fused")


def load_recipe():
    """The `cpu` recipe, and its task with the data."""
    from jaxvram import modes, recipe
    from jaxvram.vram.compile import settle_platform

    settle_platform()
    built = recipe.build(*recipe.load(f"{RECIPE}:cpu"))
    return built, modes.make_task(built)


def jaxvram_side(recipe, task, params):
    """`run(batches) -> losses`, with the train step that launch.py compiles."""
    from jaxvram.train.program import make_program
    from jaxvram.train.sharding import make_mesh, to_devices

    mesh = make_mesh(recipe.mesh)
    program = make_program(recipe, task, mesh)
    state = program.init(params)

    def run(batches):
        nonlocal state
        losses, pending = [], None
        for batch in batches:
            state, metrics = program.step(state, to_devices(batch, recipe.train.batch_size, mesh))
            if pending is not None:
                losses.append(float(pending["loss"]))
            pending = metrics
        return [*losses, float(pending["loss"])]

    return run


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


def serve(pipe, side: str):
    """One side in its own process: answers `(first batch, batches)` with seconds, processor seconds and losses."""
    from jaxvram.host import keep_freed_memory

    if side == "jaxvram":
        keep_freed_memory()  # as launch.py does
    recipe, task = load_recipe()
    if side == "jaxvram":
        import jax

        params = task.init(jax.random.key(recipe.train.seed))
        params = jax.tree.map(lambda p: p * WEIGHTS_SCALE, params)
        pipe.send(jax.device_get(params))
        run = jaxvram_side(recipe, task, params)
    else:
        run = torch_side(recipe, pipe.recv(), fused=side == "torch fused")
    while (asked := pipe.recv()) is not None:
        first, count = asked
        batches = [task.source.batch("train", n, recipe.train.batch_size) for n in range(first, first + count)]
        wall, own = time.perf_counter(), time.process_time()
        losses = run(batches)
        pipe.send((time.perf_counter() - wall, time.process_time() - own, losses))


def start():
    """A pipe to each side, all with the same weights."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, side), daemon=True).start()
    params = pipes["jaxvram"].recv()
    for side in SIDES[1:]:
        pipes[side].send(params)
    return pipes


def ask(pipe, first: int, count: int):
    """(seconds, processor seconds of the side, of anyone else, losses) of `count` steps."""
    before = busy_seconds()
    pipe.send((first, count))
    wall, own, losses = pipe.recv()
    return wall, own, max(0.0, busy_seconds() - before - own), losses


def busy_seconds() -> float:
    """Processor seconds that all processes of the machine have taken together; 0 where /proc does not tell."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def compare_losses(pipes) -> dict[str, list[float]]:
    """The first losses of each side; stops the program unless they agree: weights, model, step and batches are the same."""
    losses = {side: ask(pipe, 0, COMPARED_STEPS)[-1] for side, pipe in pipes.items()}
    for side in SIDES[1:]:
        for step, (ours, theirs) in enumerate(zip(losses["jaxvram"], losses[side], strict=True)):
            if abs(ours - theirs) > TOLERANCE * theirs:
                sys.exit(f"error: loss of step {step} is {ours:.7f} in jaxvram, {theirs:.7f} in {side}")
    return losses


def measure(pipes, rounds: int, steps: int, pause: float):
    """Seconds a step of each side, own and others' processor seconds a step; one list entry a round."""
    names = ("wall", "own", "others")
    figures = {side: {name: [] for name in names} for side in SIDES}
    at = dict.fromkeys(SIDES, COMPARED_STEPS)
    for n in range(-1, rounds):
        count = WARM_UP_STEPS if n < 0 else steps
        for side in random.sample(SIDES, len(SIDES)):
            time.sleep(pause)
            *seconds, _ = ask(pipes[side], at[side], count)
            at[side] += count
            if n >= 0:
                for name, value in zip(names, seconds, strict=True):
                    figures[side][name].append(value / count)
    return figures


def summary(figures, tokens: int) -> dict:
    """Medians, and the spread of jaxvram's speed over each PyTorch's, round by round."""
    table = {}
    for side, of in figures.items():
        ms = {name: round(1e3 * statistics.median(values), 2) for name, values in of.items()}
        share = statistics.median(o / (w * os.cpu_count()) for o, w in zip(of["others"], of["wall"], strict=True))
        table[side] = {
            "ms_a_step": ms["wall"],
            "ms_a_step_best": round(1e3 * min(of["wall"]), 2),
            "tokens_per_second": round(tokens / statistics.median(of["wall"])),
            "own_cpu_ms_a_step": ms["own"],
            "others_share_of_cores": round(share, 3),
        }
        if side != "jaxvram":
            pairs = zip(of["wall"], figures["jaxvram"]["wall"], strict=True)
            ratios = sorted(theirs / ours for theirs, ours in pairs)
            low, median, high = statistics.quantiles(ratios, n=4)
            best = min(of["wall"]) / min(figures["jaxvram"]["wall"])
            table[side]["jaxvram_over_this"] = {
                "median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)], "best_round": round(best, 3),
            }  # fmt: skip
    return table


def machine() -> dict:
    """What the figures belong to."""
    from importlib.metadata import version

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch", "numpy")}
    return {
        "cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()], **versions,
    }  # fmt: skip


def print_table(table) -> None:
    print(
        f"\n{'side':12s} {'ms/step':>8} {'best':>7} {'tokens/s':>9} {'own cpu ms':>11} {'others':>7}   jaxvram over it"
    )
    for side, row in table.items():
        ratio = row.get("jaxvram_over_this")
        words = ""
        if ratio:
            low, high = ratio["quartiles"]
            words = f"{ratio['median']:.2f} ({low:.2f} to {high:.2f}), best rounds {ratio['best_round']:.2f}"
        print(
            f"{side:12s} {row['ms_a_step']:8.2f} {row['ms_a_step_best']:7.2f} {row['tokens_per_second']:9,d} "
            f"{row['own_cpu_ms_a_step']:11.2f} {row['others_share_of_cores']:7.1%}   {words}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=15, help="of each side in a round")
    parser.add_argument(
        "--pause", type=float, default=0.2, help="seconds between turns, for spinning threads to settle"
    )
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "cpu_gpt2.json")
    args = parser.parse_args()
    recipe, _ = load_recipe()  # here first: what is wrong with the data is told once
    pipes = start()
    losses = compare_losses(pipes)
    print(
        f"losses of {COMPARED_STEPS} steps agree: {losses['jaxvram'][0]:.6f} ... {losses['jaxvram'][-1]:.6f}",
        flush=True,
    )
    about = machine()
    figures = measure(pipes, args.rounds, args.steps, args.pause)
    for pipe in pipes.values():
        pipe.send(None)
    tokens = recipe.train.batch_size * recipe.model.block_size
    table = summary(figures, tokens)
    print_table(table)
    rounds_ms = {side: [round(1e3 * wall, 2) for wall in of["wall"]] for side, of in figures.items()}
    result = {
        "recipe": "configs/nanogpt_shakespeare.py:cpu", "tokens_a_step": tokens, "steps_a_round": args.steps,
        "machine": about, "first_losses": losses, "sides": table, "rounds_ms_a_step": rounds_ms,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{args.out}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    main()
