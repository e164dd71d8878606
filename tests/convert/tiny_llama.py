"""The Llama that is converted in tests: small, every size its own number."""

import functools

import checkpoints

from jaxvram.models.llama import LlamaConfig

CFG = LlamaConfig(
    vocab_size=37, vocab_multiple=16, block_size=12, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=64, remat="none",
    dtype="float32",
)  # fmt: skip
LLAMA3 = {"rope_theta": 50.0, "rope_factor": 4.0, "rope_original_context": 32}
# so small that rounding is not magnified
random_params = functools.partial(checkpoints.random_params, std=0.4)
