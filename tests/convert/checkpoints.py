"""Checkpoints to be read and spoilt: random weights of ours, and edits of a folder in Hugging Face's layout."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import quick
import safetensors.numpy

from jaxvram import convert, models

assert_equal = functools.partial(chex.assert_trees_all_equal, strict=True)  # shapes and dtypes too
WEIGHTS = "model.safetensors"


def random_params(cfg, seed=0, std=1.0):
    """Of a language model: nothing zero and nothing equal, but for the padding."""
    init = lambda: models.build(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    random = np.random.RandomState(seed)
    params = jax.tree.map(lambda s: random.normal(0, std, s.shape).astype(s.dtype), jax.eval_shape(init))
    (table,) = {"wte", "embed_tokens", "embedding"} & set(params)
    params[table]["embedding"][cfg.vocab_size :] = 0
    if not cfg.tie_head:
        params["lm_head"]["kernel"][:, cfg.vocab_size :] = 0
    return params


def logits_of(cfg, params, tokens_BxT):
    def logits(params):
        hidden_BxTxD, _ = models.build(cfg).apply({"params": params}, tokens_BxT)
        return (hidden_BxTxD @ models.build(cfg).apply({"params": params}, method="head_VxD").T)[..., : cfg.vocab_size]

    return quick.jit(logits)(params)


def assert_transformers_agree(cls, cfg, params, folder):
    """`cls` finds every weight of our export, gives our logits, and what it saves again comes back to us unchanged."""
    import torch

    ours = convert.converter(cfg)
    ours.save(params, cfg, folder / "ours")
    theirs, found = cls.from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(found.values()), found
    tokens_BxT = np.random.RandomState(2).randint(0, cfg.vocab_size, (2, 12))
    want = theirs.eval()(torch.tensor(tokens_BxT)).logits.detach().numpy()
    assert quick.relative_error(logits_of(cfg, params, tokens_BxT), want) <= 1e-5
    theirs.save_pretrained(folder / "theirs")
    assert_equal(ours.load_params(folder / "theirs", cfg), params)


def edit_config(folder, remove=(), **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def edit_weights(folder, edit, file=WEIGHTS):
    """`edit`: from a dict of tensors by name to another."""
    tensors = edit(dict(safetensors.numpy.load_file(folder / file)))
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / file)


def edit_tensors(folder, file=WEIGHTS, **edits):
    """`name=function of the tensor (None where there is none)`; what becomes None is left out."""

    def edit(tensors):
        tensors |= {name: edit(tensors.get(name)) for name, edit in edits.items()}
        return {name: x for name, x in tensors.items() if x is not None}

    edit_weights(folder, edit, file)


def store_as(folder, dtype, file=WEIGHTS):
    edit_weights(folder, lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()}, file)


def rounded(params, dtype):
    """What becomes of parameters that were stored in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)


def truncate(folder, file=WEIGHTS):
    (folder / file).write_bytes((folder / file).read_bytes()[:-7])
