"""A training step of a tiny Mamba, jaxvram beside transformers' PyTorch; then the time of a sampled token by context.

  python benchmarks/cpu_mamba.py                  # needs torch and transformers; PyTorch's side is slow
  python benchmarks/cpu_mamba.py --model=mamba2
  python benchmarks/cpu_mamba.py --model=retnet   # beside torchscale: pip install --no-deps torchscale==0.3.0
  python benchmarks/cpu_mamba.py --model=rwkv4
  python benchmarks/cpu_mamba.py --model=rwkv6    # beside rwkv-simple: pip install --no-deps rwkv-simple==0.1.1 einops

4 layers of 128, a vocabulary of 256, 8 x 64 tokens a step, fp32, AdamW. jaxvram runs its real train step; the other side is
transformers' own model without the authors' CUDA packages, as everyone has it who has no such GPU, or torchscale's in its
parallel form, or rwkv-simple's, with torch's default AdamW and with its fused one. How sides are compared and what the
columns mean: side_by_side.py. Sampling times are those of a step of the decoding loop after 1k, 8k and 64k tokens, and
beside them GPT-2's of the same width with its cache.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import side_by_side  # noqa: E402

B, T, V = 8, 64, 256  # longer ones flatter us: Mamba's slow path takes T^2 backward, 40 s a step at T = 256
TOLERANCE = 2e-5  # relative, of each loss
CONTEXTS = (1024, 8192, 65536)


def load_recipe(model: str):
    from jaxvram import recipe
    from jaxvram.vram.compile import settle_platform

    settle_platform()
    built = recipe.build(*recipe.load(f"{ROOT / 'configs' / model}.py:tiny"))
    more = {"retnet": {"n_head": 4, "d_value": 256, "n_inner": 256}, "rwkv6": {"d_mix": 32, "d_decay": 64}}.get(model, {})
    cfg = dataclasses.replace(built.model, vocab_size=V, block_size=T, n_layer=4, n_embd=128, reset_token=-1, **more)
    train = dataclasses.replace(built.train, batch_size=B, microbatch_size=0, steps=1000)
    optimizer = dataclasses.replace(built.optimizer, learning_rate=1e-3, schedule="constant", warmup_steps=0)
    return dataclasses.replace(built, model=cfg, train=train, optimizer=optimizer)


def batch_of(n: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(n).integers(V, size=(B, T + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}


def of_transformers(kind: str, folder):
    """(its model, a function of tokens to logits)."""
    import transformers

    cls = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM", "rwkv4": "RwkvForCausalLM"}[kind]
    model = getattr(transformers, cls).from_pretrained(folder)
    return model, lambda tokens: model(input_ids=tokens, use_cache=False).logits


def of_torchscale(folder):
    import safetensors.torch

    sys.path.append(str(ROOT / "tests" / "golden"))
    import make_retnet

    config = json.loads((folder / "config.json").read_text())
    config.pop("exported_by")
    model = make_retnet.decoder(config)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model, lambda tokens: model(tokens)[0]


def of_rwkv_simple(cfg, file):
    """Its PyTorch form of the recurrence, by chunks in fp64, as it comes."""
    import rwkv_simple
    import torch

    model = rwkv_simple.RWKV(cfg.n_embd, cfg.head_dim, expand=cfg.hidden / cfg.n_embd, n_layer=cfg.n_layer, vocab_size=V)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model, lambda tokens: model(tokens, need_state=False)


DECAYED = (
    "proj.weight", "conv1d.weight", "embeddings.weight", "fc1.weight", "fc2.weight", "gate.weight", "embed_tokens.weight",
    "emb.weight", "head.weight", "key.weight", "value.weight", "receptance.weight", "output.weight",
)  # fmt: skip
OWN_RATE = ("time_decay", "time_first")  # ends of names there, and the recipe's groups


def torch_groups(cfg, model) -> list[dict]:
    """The recipe's groups of parameters, as torch's optimizers take them."""
    found = {}
    for name, p in model.named_parameters():
        group = next((end for end in OWN_RATE if name.endswith(end)), "decayed" if name.endswith(DECAYED) else "plain")
        found.setdefault(group if group in cfg.groups else "plain", []).append(p)
    of = lambda g: {"weight_decay": cfg.groups[g].weight_decay, "lr": cfg.learning_rate * cfg.groups[g].lr_multiplier}
    return [{"params": params, **of(group)} for group, params in found.items()]


def torch_side(recipe, params, fused: bool):
    """Their model, from a folder that we export."""
    import torch

    from jaxvram import convert, models

    torch.set_num_threads(os.cpu_count())
    kind = models.name_of(recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        folder, source = pathlib.Path(folder) / "model", convert.converter(recipe.model)
        if kind == "rwkv6":
            source.save_official(params, recipe.model, folder.with_suffix(".pth"))
            model, logits_of = of_rwkv_simple(recipe.model, folder.with_suffix(".pth"))
        else:
            source.save(params, recipe.model, folder)
            model, logits_of = of_torchscale(folder) if kind == "retnet" else of_transformers(kind, folder)
    model.train()
    cfg = recipe.optimizer
    groups = torch_groups(cfg, model)
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.b1, cfg.b2), eps=cfg.eps, fused=fused or None)

    def run(batches):
        losses = []
        for batch in batches:
            tokens, targets = (torch.from_numpy(batch[name]).long() for name in ("tokens", "targets"))
            logits = logits_of(tokens)
            loss = torch.nn.functional.cross_entropy(logits.view(-1, V), targets.view(-1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    return run


def make(side: str, weights, model: str):
    """See side_by_side.serve."""
    recipe = load_recipe(model)
    if side != "jaxvram":
        return torch_side(recipe, weights, fused=side == "torch fused"), batch_of, None
    import jax

    from jaxvram import models
    from jaxvram.tasks.language import LanguageTask

    task = LanguageTask(models.build(recipe.model), None, recipe.task, recipe.sample)
    params = jax.device_get(task.init(jax.random.key(0)))
    return side_by_side.jaxvram_side(recipe, task, params), batch_of, params


def sampling_times(model: str, new_tokens: int = 64, rounds: int = 5) -> dict[str, dict[int, float]]:
    """Milliseconds a token and sequence of the decoding loop after so many tokens; the state is filled with zeros."""
    import jax
    import jax.numpy as jnp

    from jaxvram import models
    from jaxvram.models.gpt2 import GPT2Config

    ours = load_recipe(model).model
    found = {}
    for context in CONTEXTS:
        gpt2 = GPT2Config(vocab_size=V, block_size=context + new_tokens, n_layer=4, n_head=4, n_embd=128, dtype="float32")
        for name, cfg in ((model, ours), ("gpt2", gpt2)):
            net = models.build(cfg)
            params = net.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
            state = net.apply({"params": params}, 1, method="initial_state")
            if name == "gpt2":
                state = dataclasses.replace(state, length=jnp.full_like(state.length, context))

            @functools.partial(jax.jit, static_argnums=0)
            def decode(net, params, state):
                def step(carry, _):
                    token, state = carry
                    hidden, state = net.apply({"params": params}, token, state)
                    head = net.apply({"params": params}, method="head_VxD")
                    return ((hidden @ head.T).argmax(-1).astype(jnp.int32), state), None

                return jax.lax.scan(step, (jnp.zeros((1, 1), jnp.int32), state), None, length=new_tokens)[0]

            jax.block_until_ready(decode(net, params, state))
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                jax.block_until_ready(decode(net, params, state))
                seconds.append((time.perf_counter() - start) / new_tokens)
            found.setdefault(name, {})[context] = round(1e3 * statistics.median(seconds), 3)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("mamba", "mamba2", "retnet", "rwkv4", "rwkv6"), default="mamba")
    model = parser.parse_known_args()[0].model
    args = side_by_side.arguments(parser, 2, ROOT / "benchmarks" / "results" / f"cpu_{model}.json")
    about = {"model": f"{model}, 4 layers of 128, fp32", "recipe": f"configs/{model}.py:tiny, changed as load_recipe says"}
    side_by_side.benchmark(functools.partial(make, model=model), args, about, B * T, "tokens", TOLERANCE)
    times = sampling_times(model)
    print("\nms a sampled token after" + "".join(f"{n:>10,}" for n in CONTEXTS))
    for name, row in times.items():
        print(f"{name:24s}" + "".join(f"{row[n]:10.3f}" for n in CONTEXTS))
    result = json.loads(args.out.read_text()) | {"sampling_ms_a_token": times}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    main()
