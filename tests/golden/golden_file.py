"""What the scripts that make golden files have in common, and how tests read what they wrote."""

import functools
import os

import numpy as np


def batch(V: int, B: int, T: int) -> dict[str, np.ndarray]:
    """Tokens and targets; a few targets are -1, which is not learnt."""
    random = np.random.RandomState(99)
    tokens_BxT, targets_BxT = random.randint(0, V, (2, B, T)).astype(np.int32)
    return {"tokens": tokens_BxT, "targets": np.where(random.rand(B, T) < 0.2, -1, targets_BxT).astype(np.int32)}


def drawing(seed: int):
    """draw(std, *shape): normal numbers in fp32, one array after the other from NumPy's frozen stream."""
    random = np.random.RandomState(seed)
    return lambda std, *shape: random.normal(0, std, shape).astype(np.float32)


def quiet_torch():
    """Before PyTorch is imported: no model is looked for in the network, and none is compiled."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def rwkv_package():
    """Its class, for plain PyTorch and the models before RWKV-7: it settles that when it is imported."""
    quiet_torch()
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    import rwkv.model

    return rwkv.model.RWKV


def rwkv_forward(file, tokens_T):
    """(logits, state behind the last token) of an official checkpoint before RWKV-7, as the `rwkv` package has them."""
    model = rwkv_package()(model=str(file).removesuffix(".pth"), strategy="cpu fp32", verbose=False)
    return model.forward(tokens_T.tolist(), None, full_output=True)


def with_weights(model, weights: dict[str, np.ndarray]):
    """transformers' language model with these weights: all that it has, but for a head that is tied."""
    import torch

    missing, unexpected = model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def logits_and_loss(model, batch: dict[str, np.ndarray], use_cache=False) -> dict[str, np.ndarray]:
    """ "logits" and "loss" (mean over the targets) of transformers' language model; its parameters have their gradients."""
    import torch

    tokens, targets = (torch.tensor(x).long() for x in batch.values())
    logits = model(input_ids=tokens, use_cache=use_cache).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}


def gradients(model) -> dict[str, np.ndarray]:
    """ "grad/NAME" for every parameter, as PyTorch has them."""
    return {f"grad/{name}": p.grad.numpy() for name, p in model.named_parameters()}


def write(file, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(file, **arrays)
    print(f"{file}: {len(arrays)} arrays, {file.stat().st_size / 1024:.0f} KiB")


def write_variants(file, variants, oracle) -> None:
    """VARIANT/NAME for every array of `oracle(variant)`."""
    write(file, {f"{variant}/{name}": x for variant in variants for name, x in oracle(variant).items()})


@functools.cache
def read(file) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def part(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """What stands under NAME/, without it: a variant of a file, the gradients of a variant."""
    return {path.removeprefix(f"{name}/"): x for path, x in arrays.items() if path.startswith(f"{name}/")}
