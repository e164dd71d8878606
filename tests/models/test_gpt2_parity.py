"""Logits, loss and every gradient equal transformers.GPT2LMHeadModel: by golden file always, live where it is installed."""

import dataclasses
import functools

import make_gpt2
import parity
import pytest
from quick import relative_error as error

from jaxvram.layers.stack import REMAT
from jaxvram.models.gpt2 import GPT2, GPT2Config

golden = functools.partial(parity.golden, make_gpt2)


def our_config(variant):
    theirs, bias = make_gpt2.VARIANTS[variant]
    return GPT2Config(
        vocab_size=make_gpt2.V, vocab_multiple=16, block_size=make_gpt2.T, n_layer=make_gpt2.L, n_head=make_gpt2.H,
        n_embd=make_gpt2.D, bias=bias, tie_head=theirs["tie_word_embeddings"], remat="none", dtype="float32",
        activation={"gelu_new": "gelu_tanh", "gelu": "gelu"}[theirs["activation_function"]],
    )  # fmt: skip


def errors(tmp_path, variant, cfg, reference):
    if not cfg.bias:  # GPT2LMHeadModel always has biases, and gradients of them: an import drops those that are zero
        is_of_bias = lambda name: name.startswith("grad/") and name.endswith(".bias")
        reference = {name: 0 * x if is_of_bias(name) else x for name, x in reference.items()}
    return parity.language_model_errors(tmp_path, make_gpt2, variant, cfg, reference, chunk=7)


@pytest.mark.parametrize("variant", make_gpt2.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(errors(tmp_path, variant, our_config(variant), golden(variant)))


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("remat", REMAT)
def test_golden_under_remat(remat, unroll, tmp_path):
    cfg = dataclasses.replace(our_config("mingpt"), remat=remat, unroll_layers=unroll)
    parity.assert_small(errors(tmp_path, "mingpt", cfg, golden("mingpt")))


@parity.needs_transformers
@pytest.mark.parametrize("variant", make_gpt2.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    live = make_gpt2.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, our_config(variant), live))
    parity.assert_golden_is_live(make_gpt2, variant, live)


def test_variants_are_far_apart(tmp_path):
    """Each field that the variants differ in moves the logits of equal weights by much more than the tolerance."""
    for variant, field in (
        ("openai", {"activation": "gelu"}), ("nanogpt", {"activation": "gelu_tanh"}), ("openai", {"bias": False}),
        ("mingpt", {"tie_head": True}),
    ):  # fmt: skip
        right = our_config(variant)
        params = parity.in_our_layout(tmp_path, make_gpt2, variant, right, make_gpt2.weights(variant))
        wrong = GPT2(dataclasses.replace(right, **field))
        logits, _, _ = parity.language_model(wrong, params, **parity.of_batch(make_gpt2))
        assert error(logits, golden(variant)["logits"]) > 10 * parity.TOLERANCE, (variant, field)


def test_the_activations_differ(tmp_path):
    """The tanh form is not within tolerance of the exact one: parity would notice the wrong field."""
    cfg = dataclasses.replace(our_config("openai"), activation="gelu")
    params = parity.in_our_layout(tmp_path, make_gpt2, "nanogpt", cfg, make_gpt2.weights("openai"))
    logits, _, _ = parity.language_model(GPT2(cfg), params, **parity.of_batch(make_gpt2))
    assert error(logits, golden("openai")["logits"]) > 10 * parity.TOLERANCE
