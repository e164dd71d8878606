"""Logits, loss and every gradient equal transformers.LlamaForCausalLM: by golden file always, live where it is there."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import make_llama
import numpy as np
import pytest
import quick
import safetensors.numpy
from quick import relative_error as error

from jaxvram.convert import llama as convert
from jaxvram.kernels.linear_cross_entropy import linear_cross_entropy
from jaxvram.layers.stack import REMAT
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.train.optimizer import path_name

TOLERANCE = 1e-5  # of the largest element of the reference's tensor
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def our_config(variant):
    c = make_llama.VARIANTS[variant]
    scaling = c.get("rope_scaling", {})
    ours = {ours: scaling[theirs] for ours, theirs in convert.SCALING_OF.items() if theirs in scaling}
    return LlamaConfig(
        vocab_size=make_llama.V, vocab_multiple=16, block_size=make_llama.T, n_layer=make_llama.L, n_embd=make_llama.D,
        n_inner=make_llama.F, n_head=c["num_attention_heads"], n_kv_head=c["num_key_value_heads"],
        head_dim=c.get("head_dim", 0), rope_theta=c["rope_theta"], norm_eps=c["rms_norm_eps"], remat="none",
        tie_head=c["tie_word_embeddings"], attention_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False),
        dtype="float32", **ours,
    )  # fmt: skip


def in_our_layout(tmp_path, variant, cfg, tensors):
    """Tensors under Hugging Face's names (weights or gradients, of which the layout is the same) as our tree."""
    folder = tmp_path / f"{variant}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_llama.VARIANTS[variant]))
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return convert.load_params(folder, cfg)


@functools.cache
def golden():
    with np.load(make_llama.FILE) as file:
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
    """Name -> error of logits, loss and all gradients against `reference`, in the form that make_llama.oracle returns."""
    params = in_our_layout(tmp_path, variant, cfg, make_llama.weights(variant))
    logits, loss, grads = ours(Llama(cfg), params, **{f"{k}_BxT": v for k, v in make_llama.batch().items()})
    theirs = {name.removeprefix("grad/"): x for name, x in reference.items() if name.startswith("grad/")}
    theirs = in_our_layout(tmp_path, variant, cfg, theirs)
    theirs = {path_name(path): x for path, x in jax.tree.leaves_with_path(theirs)}
    grads = {path_name(path): x for path, x in jax.tree.leaves_with_path(grads)}
    assert set(theirs) == set(grads)
    found = {"logits": error(logits, reference["logits"]), "loss": error(loss, reference["loss"])}
    return found | {name: error(grad, theirs[name]) for name, grad in grads.items()}


def assert_small(found):
    worst = max(found, key=found.get)
    assert found[worst] <= TOLERANCE, f"{worst} is off by {found[worst]:.1e} of its largest element"


@pytest.mark.parametrize("variant", make_llama.VARIANTS)
def test_golden(variant, tmp_path):
    assert_small(errors(tmp_path, variant, our_config(variant), golden_of(variant)))


def test_golden_with_the_other_layout(tmp_path):
    """Rows of q and k (and of their gradients) in EasyLM's order, turned in its way: the same model."""
    cfg = dataclasses.replace(our_config("biases"), rope_layout="interleaved")
    assert_small(errors(tmp_path, "biases", cfg, golden_of("biases")))


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("remat", [remat for remat in REMAT if remat != "none"])
def test_golden_under_remat(remat, unroll, tmp_path):
    cfg = dataclasses.replace(our_config("gqa"), remat=remat, unroll_layers=unroll)
    assert_small(errors(tmp_path, "gqa", cfg, golden_of("gqa")))


@pytest.mark.skipif(not INSTALLED, reason="needs torch and transformers")
@pytest.mark.parametrize("variant", make_llama.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    live = make_llama.oracle(variant)
    assert_small(errors(tmp_path, variant, our_config(variant), live))
    assert set(live) == set(golden_of(variant))
    assert_small({name: error(live[name], want) for name, want in golden_of(variant).items()})


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("mha", {"rope_theta": 10010.0}),
        ("gqa", {"norm_eps": 1.01e-2}),
        ("llama3", {"rope_factor": 4.1}),
        ("llama3", {"rope_original_context": 33}),
        ("llama3", {"rope_low_freq_factor": 1.1}),
        ("llama3", {"rope_high_freq_factor": 4.1}),
    ],
    ids=str,
)
def test_the_comparison_sees_a_small_change(variant, fields, tmp_path):
    right = our_config(variant)
    params = in_our_layout(tmp_path, variant, right, make_llama.weights(variant))
    batch = {f"{k}_BxT": v for k, v in make_llama.batch().items()}
    logits, _, _ = ours(Llama(dataclasses.replace(right, **fields)), params, **batch)
    assert error(logits, golden_of(variant)["logits"]) > 5 * TOLERANCE
