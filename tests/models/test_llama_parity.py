"""Logits, loss and every gradient equal transformers.LlamaForCausalLM: by golden file always, live where it is there."""

import dataclasses
import functools

import make_llama
import parity
import pytest
from quick import relative_error as error

from jaxvram.convert import llama as convert
from jaxvram.layers.stack import REMAT
from jaxvram.models.llama import Llama, LlamaConfig

golden = functools.partial(parity.golden, make_llama)


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


def errors(tmp_path, variant, cfg, reference):
    return parity.language_model_errors(tmp_path, make_llama, variant, cfg, reference, chunk=7)


@pytest.mark.parametrize("variant", make_llama.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(errors(tmp_path, variant, our_config(variant), golden(variant)))


def test_golden_with_the_other_layout(tmp_path):
    """Rows of q and k (and of their gradients) in EasyLM's order, turned in its way: the same model."""
    cfg = dataclasses.replace(our_config("biases"), rope_layout="interleaved")
    parity.assert_small(errors(tmp_path, "biases", cfg, golden("biases")))


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("remat", [remat for remat in REMAT if remat != "none"])
def test_golden_under_remat(remat, unroll, tmp_path):
    cfg = dataclasses.replace(our_config("gqa"), remat=remat, unroll_layers=unroll)
    parity.assert_small(errors(tmp_path, "gqa", cfg, golden("gqa")))


@parity.needs_transformers
@pytest.mark.parametrize("variant", make_llama.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    live = make_llama.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, our_config(variant), live))
    parity.assert_golden_is_live(make_llama, variant, live)


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
    params = parity.in_our_layout(tmp_path, make_llama, variant, right, make_llama.weights(variant))
    wrong = Llama(dataclasses.replace(right, **fields))
    logits, _, _ = parity.language_model(wrong, params, **parity.of_batch(make_llama))
    assert error(logits, golden(variant)["logits"]) > 5 * parity.TOLERANCE
