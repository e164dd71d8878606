"""Our numbers beside those of a reference, live or kept in a golden file: one way to make ours, and one to compare.

`make` is a script of tests/golden: VARIANTS, and `config`, `weights`, `batch` and `oracle` of each.
"""

import functools
import importlib.util
import json

import chex
import golden_file
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import safetensors.numpy

from jaxvram import convert, models
from jaxvram.kernels.linear_cross_entropy import linear_cross_entropy
from jaxvram.train.optimizer import path_name
from jaxvram.train.partition import join

TOLERANCE = 1e-5  # of the largest element of the reference's tensor


def installed(*packages) -> bool:
    return all(importlib.util.find_spec(name) for name in packages)


needs_transformers = pytest.mark.skipif(not installed("torch", "transformers"), reason="needs torch and transformers")
needs_rwkv = pytest.mark.skipif(not installed("torch", "rwkv"), reason="needs torch and rwkv")


def golden(make, variant):
    """What `make.oracle(variant)` returned when the file was made."""
    return golden_file.part(golden_file.read(make.FILE), variant)


def in_our_layout(tmp_path, make, variant, cfg, tensors, file="model.safetensors"):
    """Tensors under the reference's names (weights or gradients, of which the layout is the same) as our tree."""
    folder = tmp_path / f"{variant}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make.config(variant)))
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / file)
    return convert.converter(cfg).load_params(folder, cfg)


@functools.partial(quick.jit, static_argnums=0, static_argnames="chunk")
def language_model(model, trained, tokens_BxT, targets_BxT, frozen=None, chunk=None):
    """(logits, mean loss of the targets, gradients of `trained`), as in training: the loss from chunks of the tokens."""
    vocab_size = model.cfg.vocab_size

    def loss_fn(trained):
        params = {"params": join(trained, frozen)}
        hidden_BxTxD, _ = model.apply(params, tokens_BxT)
        head_VxD = model.apply(params, method="head_VxD")
        loss_BxT, _ = linear_cross_entropy(hidden_BxTxD, head_VxD, targets_BxT, vocab_size, chunk=chunk)
        return loss_BxT.sum() / (targets_BxT >= 0).sum(), jnp.einsum("btd,vd->btv", hidden_BxTxD, head_VxD)

    (loss, logits_BxTxV), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    return logits_BxTxV[..., :vocab_size], loss, grads


def of_batch(make):
    return {f"{name}_BxT": x for name, x in make.batch().items()}


def language_model_errors(tmp_path, make, variant, cfg, reference, chunk=None):
    """Name -> error of logits, loss and all gradients against `reference`, in the form that `make.oracle` returns."""
    params = in_our_layout(tmp_path, make, variant, cfg, make.weights(variant))
    found = language_model(models.build(cfg), params, **of_batch(make), chunk=chunk)
    return errors(found, reference, in_our_layout(tmp_path, make, variant, cfg, golden_file.part(reference, "grad")))


def errors(found, reference, their_grads):
    """The same, of what `language_model` returns; `their_grads`: the reference's, in our layout."""
    logits, loss, grads = found
    of_outputs = {name: quick.relative_error(x, reference[name]) for name, x in (("logits", logits), ("loss", loss))}
    return of_outputs | gradient_errors(grads, their_grads)


def gradient_errors(grads, theirs):
    """Name -> error of every gradient; both trees have the same."""
    chex.assert_trees_all_equal_structs(grads, theirs)
    off = jax.tree.map(quick.relative_error, grads, theirs)
    return {path_name(path): x for path, x in jax.tree.leaves_with_path(off)}


def assert_small(errors, bound=TOLERANCE):
    worst = max(errors, key=errors.get)
    assert errors[worst] < bound, f"{worst} is off by {errors[worst]:.1e} of its largest element"


def assert_golden_is_live(make, variant, live, nought=()):
    """The golden file is what its script makes. `nought`: ends of names whose gradients are zero but for rounding."""
    kept = golden(make, variant)
    assert set(live) == set(kept), set(live) ^ set(kept)
    rounding = {name for name in kept if name.endswith(tuple(nought))}
    assert all(max(np.abs(x[name]).max() for x in (live, kept)) < TOLERANCE for name in rounding)
    assert_small({name: quick.relative_error(live[name], want) for name, want in kept.items() if name not in rounding})
