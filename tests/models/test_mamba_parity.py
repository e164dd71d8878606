"""Logits, loss and every gradient equal transformers' Mamba and Mamba-2: by golden file always, live where it is there."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import make_mamba
import numpy as np
import pytest
import quick
import safetensors.numpy
from quick import relative_error as error

from jaxvram import convert, models
from jaxvram.kernels.linear_cross_entropy import linear_cross_entropy
from jaxvram.models.mamba import MambaConfig
from jaxvram.models.mamba2 import Mamba2Config
from jaxvram.train.optimizer import path_name

TOLERANCE = 1e-5  # of the largest element of the reference's tensor
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def our_config(variant):
    theirs = make_mamba.VARIANTS[variant]
    common = {
        "vocab_size": make_mamba.V, "vocab_multiple": 16, "n_layer": make_mamba.L, "n_embd": make_mamba.D,
        "d_state": theirs["state_size"], "tie_head": theirs["tie_word_embeddings"], "remat": "none", "dtype": "float32",
    }  # fmt: skip
    if theirs["model_type"] == "mamba":
        return MambaConfig(**common, dt_rank=theirs["time_step_rank"])
    return Mamba2Config(**common, head_dim=theirs["head_dim"], n_groups=theirs["n_groups"])


def in_our_layout(tmp_path, variant, cfg, tensors):
    """Tensors under Hugging Face's names (weights or gradients, of which the layout is the same) as our tree."""
    folder = tmp_path / f"{variant}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_mamba.VARIANTS[variant]))
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return convert.converter(cfg).load_params(folder, cfg)


@functools.cache
def golden():
    with np.load(make_mamba.FILE) as file:
        return {name: file[name] for name in file.files}


@functools.partial(quick.jit, static_argnums=0)
def ours(model, params, tokens_BxT, targets_BxT):
    def loss_fn(params):
        hidden_BxTxD, _ = model.apply({"params": params}, tokens_BxT)
        head_VxD = model.apply({"params": params}, method="head_VxD")
        loss_BxT, _ = linear_cross_entropy(hidden_BxTxD, head_VxD, targets_BxT, model.cfg.vocab_size)
        return loss_BxT.sum() / (targets_BxT >= 0).sum(), jnp.einsum("btd,vd->btv", hidden_BxTxD, head_VxD)

    (loss, logits_BxTxV), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return logits_BxTxV[..., : model.cfg.vocab_size], loss, grads


def errors(tmp_path, variant, reference):
    """Name -> error of logits, loss and all gradients against `reference`, in the form that make_mamba.oracle returns."""
    cfg = our_config(variant)
    params = in_our_layout(tmp_path, variant, cfg, make_mamba.weights(variant))
    logits, loss, grads = ours(models.build(cfg), params, **{f"{k}_BxT": v for k, v in make_mamba.batch().items()})
    theirs = {name.removeprefix("grad/"): x for name, x in reference.items() if name.startswith("grad/")}
    theirs = in_our_layout(tmp_path, variant, cfg, theirs)
    theirs = {path_name(path): x for path, x in jax.tree.leaves_with_path(theirs)}
    grads = {path_name(path): x for path, x in jax.tree.leaves_with_path(grads)}
    assert set(theirs) == set(grads)
    found = {"logits": error(logits, reference["logits"]), "loss": error(loss, reference["loss"])}
    return found | {name: error(grad, theirs[name]) for name, grad in grads.items()}


@pytest.mark.parametrize("variant", make_mamba.VARIANTS)
def test_the_golden_file(tmp_path, variant):
    reference = {name.partition("/")[2]: x for name, x in golden().items() if name.startswith(variant + "/")}
    found = errors(tmp_path, variant, reference)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.skipif(not INSTALLED, reason="torch or transformers is not installed")
@pytest.mark.parametrize("variant", make_mamba.VARIANTS)
def test_transformers_itself_and_the_golden_file_is_of_it(tmp_path, variant):
    reference = make_mamba.oracle(variant)
    found = errors(tmp_path, variant, reference)
    assert max(found.values()) < TOLERANCE, found
    for name, x in reference.items():
        assert error(golden()[f"{variant}/{name}"], x) < TOLERANCE, name


def test_the_comparison_can_fail(tmp_path):
    """A reference that is off by a thousandth is seen."""
    reference = {name.partition("/")[2]: x for name, x in golden().items() if name.startswith("mamba2/")}
    reference["grad/backbone.layers.1.mixer.A_log"] = reference["grad/backbone.layers.1.mixer.A_log"] * 1.001
    found = errors(tmp_path, "mamba2", reference)
    assert found["layers/mixer/A_log"] > TOLERANCE
