"""A base in NF4: read as it is quantised, within the memory that it takes; a model that computes with those very values."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quick
import safetensors.numpy
from flax import traverse_util
from quick import relative_error as error

from jaxvram.convert import llama
from jaxvram.finetune.adapted import Adapted
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.finetune.weights import base_parameters, merged, one_by_one
from jaxvram.kernels import nf4
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.train.partition import divide

CFG = LlamaConfig(
    vocab_size=29, block_size=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_inner=24, dtype="float32",
    attention_bias=True,
)  # fmt: skip
QLORA = FinetuneConfig("lora", base="nf4", rank=2)
TOKENS = np.random.RandomState(0).randint(0, 29, (2, 16))


def plain_parameters():
    """Random, biases too."""
    shapes = jax.eval_shape(lambda: Llama(CFG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    random = np.random.RandomState(1)
    return jax.tree.map(lambda s: random.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def parameters(finetune, plain):
    """Of the adapted model, what is added drawn at random."""
    model = Adapted(Llama(CFG), finetune)
    fresh = traverse_util.flatten_dict(model.init(jax.random.key(2), jnp.zeros((1, 1), jnp.int32))["params"])
    random = np.random.RandomState(3)
    noisy = {p: x + random.normal(0, 0.1, x.shape).astype(np.float32) for p, x in fresh.items() if "lora" in p[-1]}
    base = traverse_util.flatten_dict(base_parameters(model, one_by_one(plain)))
    return model, traverse_util.unflatten_dict(fresh | noisy | base)


def hidden(model, params):
    return quick.jit(lambda params: model.apply({"params": params}, TOKENS)[0])(params)


def rounded(plain):
    """The plain parameters with their matrices put into NF4 and back."""

    def of_leaf(path, x):
        if path[-1].key != "kernel" or x.ndim != 3:
            return x
        there_and_back = lambda w: np.asarray(nf4.dequantize(nf4.quantize(w.T, np), w.T.shape, jnp.float32)).T
        return np.stack([there_and_back(w) for w in x])

    return jax.tree_util.tree_map_with_path(of_leaf, plain)


@pytest.mark.parametrize("dora", [False, True])
def test_it_computes_with_the_quantised_values(dora):
    """Equal to the same adapters round a plain base whose matrices were put into NF4 and back."""
    plain = plain_parameters()
    quantised, params = parameters(dataclasses.replace(QLORA, dora=dora), plain)
    reference, same = parameters(FinetuneConfig("lora", rank=2, dora=dora), rounded(plain))
    if dora:  # magnitudes are those of what was read, in both
        magnitudes = {p: x for p, x in traverse_util.flatten_dict(params).items() if p[-1] == "lora_magnitude"}
        same = traverse_util.unflatten_dict(traverse_util.flatten_dict(same) | magnitudes)
    assert error(hidden(quantised, params), hidden(reference, same)) < 1e-5
    assert error(hidden(quantised, params), hidden(Llama(CFG), plain)) > 1e-3


def test_gradients_are_of_what_is_added_alone():
    plain = plain_parameters()
    quantised, params = parameters(QLORA, plain)
    reference, same = parameters(FinetuneConfig("lora", rank=2), rounded(plain))

    def gradients(model, params):
        trained, frozen = divide(params, QLORA.trains)
        loss = lambda trained: (model.apply({"params": _joined(trained, frozen)}, TOKENS)[0] ** 2).sum()
        return quick.jit(jax.grad(loss))(trained)

    found, expected = gradients(quantised, params), gradients(reference, same)
    assert set(traverse_util.flatten_dict(found)) == set(traverse_util.flatten_dict(expected))
    assert max(jax.tree.leaves(jax.tree.map(error, found, expected))) < 1e-4


def _joined(trained, frozen):
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen))


def test_merged_equals_unmerged():
    quantised, params = parameters(QLORA, plain_parameters())
    plain = merged(quantised, params)
    assert jax.tree.structure(plain) == jax.tree.structure(plain_parameters())
    assert error(hidden(Llama(CFG), plain), hidden(quantised, params)) < 1e-5


def test_reading_takes_the_quantised_model_and_two_tensors(tmp_path):
    """In bf16 files; what NumPy has allocated at most, by tracemalloc."""
    cfg = dataclasses.replace(CFG, n_layer=2, n_embd=1024, n_inner=8192, n_head=8, n_kv_head=8, attention_bias=False)
    shapes = jax.eval_shape(lambda: Llama(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    random = np.random.default_rng(0)
    llama.save(jax.tree.map(lambda s: random.standard_normal(s.shape, np.float32), shapes), cfg, tmp_path / "fp32")
    tensors = safetensors.numpy.load_file(tmp_path / "fp32" / "model.safetensors")
    (tmp_path / "bf16").mkdir()
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "bf16" / "model.safetensors")
    (tmp_path / "bf16" / "config.json").write_text((tmp_path / "fp32" / "config.json").read_text())
    largest = max(x.nbytes for x in tensors.values())
    del tensors
    model = Adapted(Llama(cfg), QLORA)
    tracemalloc.start()
    try:
        params = base_parameters(model, llama.tensors(tmp_path / "bf16", cfg))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    weights = 2 * (4 * 1024 * 1024 + 3 * 1024 * 8192)
    assert 0.51 * weights < size < 0.53 * weights + 500_000
    assert peak < size + 2 * largest, f"{peak / 2**20:.0f} MiB for {size / 2**20:.0f} and twice {largest / 2**20:.0f}"
