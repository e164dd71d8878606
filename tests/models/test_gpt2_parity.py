"""Logits, loss and every gradient equal transformers.GPT2LMHeadModel: by golden file always, live where it is installed."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import make_gpt2
import numpy as np
import pytest
import quick
import safetensors.numpy
from quick import relative_error as error

from jaxvram.convert import gpt2 as convert
from jaxvram.kernels.linear_cross_entropy import linear_cross_entropy
from jaxvram.layers.stack import REMAT
from jaxvram.models.gpt2 import GPT2, GPT2Config
from jaxvram.train.optimizer import path_name

TOLERANCE = 1e-5  # of the largest element of the reference's tensor
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def our_config(variant):
    theirs, bias = make_gpt2.VARIANTS[variant]
    return GPT2Config(
        vocab_size=make_gpt2.V, vocab_multiple=16, block_size=make_gpt2.T, n_layer=make_gpt2.L, n_head=make_gpt2.H,
        n_embd=make_gpt2.D, bias=bias, tie_head=theirs["tie_word_embeddings"], remat="none", dtype="float32",
        activation={"gelu_new": "gelu_tanh", "gelu": "gelu"}[theirs["activation_function"]],
    )  # fmt: skip


def in_our_layout(tmp_path, variant, cfg, tensors):
    """Tensors under Hugging Face's names (weights or gradients, of which the layout is the same) as our tree."""
    folder = tmp_path / f"{variant}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_gpt2.config(variant)))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return convert.load_params(folder, cfg)


@functools.cache
def golden():
    with np.load(make_gpt2.FILE) as file:
        return {name: file[name] for name in file.files}


def golden_of(variant):
    return {name.partition("/")[2]: x for name, x in golden().items() if name.startswith(variant + "/")}


@functools.partial(quick.jit, static_argnums=0)
def ours(model, params, tokens_BxT, targets_BxT):
    def loss_fn(params):
        hidden_BxTxD, _ = model.apply({"params": params}, tokens_BxT)
        head_VxD = model.apply({"params": params}, method="head_VxD")
        loss_BxT, _ = linear_cross_entropy(hidden_BxTxD, head_VxD, targets_BxT, model.cfg.vocab_size, chunk=7)
        return loss_BxT.sum() / (targets_BxT >= 0).sum(), jnp.einsum("btd,vd->btv", hidden_BxTxD, head_VxD)

    (loss, logits_BxTxV), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return logits_BxTxV[..., : model.cfg.vocab_size], loss, grads


def errors(tmp_path, variant, cfg, reference):
    """Name -> error of logits, loss and all gradients against `reference`, in the form that make_gpt2.oracle returns."""
    params = in_our_layout(tmp_path, variant, cfg, make_gpt2.weights(variant))
    logits, loss, grads = ours(GPT2(cfg), params, **{f"{k}_BxT": v for k, v in make_gpt2.batch().items()})
    theirs = {name.removeprefix("grad/"): x for name, x in reference.items() if name.startswith("grad/")}
    theirs = in_our_layout(tmp_path, variant, dataclasses.replace(cfg, bias=True), theirs)
    theirs = {path_name(path): x for path, x in jax.tree.leaves_with_path(theirs)}
    grads = {path_name(path): x for path, x in jax.tree.leaves_with_path(grads)}
    assert set(theirs) == set(grads) | ({name for name in theirs if name.endswith("bias")} if not cfg.bias else set())
    found = {"logits": error(logits, reference["logits"]), "loss": error(loss, reference["loss"])}
    return found | {name: error(grad, theirs[name]) for name, grad in grads.items()}


def assert_small(found):
    worst = max(found, key=found.get)
    assert found[worst] <= TOLERANCE, f"{worst} is off by {found[worst]:.1e} of its largest element"


@pytest.mark.parametrize("variant", make_gpt2.VARIANTS)
def test_golden(variant, tmp_path):
    assert_small(errors(tmp_path, variant, our_config(variant), golden_of(variant)))


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("remat", REMAT)
def test_golden_under_remat(remat, unroll, tmp_path):
    cfg = dataclasses.replace(our_config("mingpt"), remat=remat, unroll_layers=unroll)
    assert_small(errors(tmp_path, "mingpt", cfg, golden_of("mingpt")))


@pytest.mark.skipif(not INSTALLED, reason="needs torch and transformers")
@pytest.mark.parametrize("variant", make_gpt2.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    live = make_gpt2.oracle(variant)
    assert_small(errors(tmp_path, variant, our_config(variant), live))
    assert set(live) == set(golden_of(variant))
    assert_small({name: error(live[name], want) for name, want in golden_of(variant).items()})


def test_variants_are_far_apart():
    """Each field that the variants differ in moves the logits by much more than the tolerance."""
    logits = {variant: golden_of(variant)["logits"] for variant in make_gpt2.VARIANTS}
    assert min(error(logits[a], logits[b]) for a in logits for b in logits if a != b) > 100 * TOLERANCE


def test_the_activations_differ(tmp_path):
    """The tanh form is not within tolerance of the exact one: parity would notice the wrong field."""
    cfg = dataclasses.replace(our_config("openai"), activation="gelu")
    tensors = make_gpt2.weights("openai")
    params = in_our_layout(tmp_path, "nanogpt", cfg, tensors)
    logits, _, _ = ours(GPT2(cfg), params, **{f"{k}_BxT": v for k, v in make_gpt2.batch().items()})
    assert error(logits, golden_of("openai")["logits"]) > 10 * TOLERANCE
