"""Logits, loss, balance loss and gradients equal transformers.MixtralForCausalLM: by golden file, live where it is there."""

import dataclasses
import functools

import make_moe
import parity
import pytest
import quick

from jaxvram.models.moe import MoE, MoEConfig

golden = functools.partial(parity.golden, make_moe)


def our_config(variant):
    c = make_moe.VARIANTS[variant]
    return MoEConfig(
        vocab_size=make_moe.V, vocab_multiple=16, block_size=make_moe.T, n_layer=make_moe.L, n_embd=make_moe.D,
        n_inner=make_moe.F, n_head=c["num_attention_heads"], n_kv_head=c["num_key_value_heads"],
        head_dim=c.get("head_dim", 0), rope_theta=c["rope_theta"], norm_eps=c["rms_norm_eps"], remat="none",
        tie_head=c["tie_word_embeddings"], n_expert=c["num_local_experts"], n_expert_per_token=c["num_experts_per_tok"],
        dtype="float32",
    )  # fmt: skip


def errors(tmp_path, variant, cfg, reference):
    return parity.language_model_errors(tmp_path, make_moe, variant, cfg, reference, chunk=7)


@pytest.mark.parametrize("variant", make_moe.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(errors(tmp_path, variant, our_config(variant), golden(variant)))


@pytest.mark.parametrize("remat", ["full", "nested"])
def test_golden_under_remat(remat, tmp_path):
    cfg = dataclasses.replace(our_config("2 of 4"), remat=remat)
    parity.assert_small(errors(tmp_path, "2 of 4", cfg, golden("2 of 4")))


@pytest.mark.parametrize("variant", make_moe.VARIANTS)
def test_balance_loss(variant, tmp_path):
    """Theirs adds up over the k choices, ours takes the mean."""
    cfg = our_config(variant)
    params = parity.in_our_layout(tmp_path, make_moe, variant, cfg, make_moe.weights(variant))
    told = quick.jit(lambda p: MoE(cfg).apply({"params": p}, make_moe.batch()["tokens"], method="routed")[2])(params)
    assert quick.relative_error(cfg.n_expert_per_token * told["balance"], golden(variant)["balance"]) < 1e-5


@parity.needs_transformers
@pytest.mark.parametrize("variant", make_moe.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    live = make_moe.oracle(variant)
    parity.assert_golden_is_live(make_moe, variant, live)
    parity.assert_small(errors(tmp_path, variant, our_config(variant), live))


@pytest.mark.parametrize("fields", [{"renormalise": False}, {"n_expert_per_token": 3}, {"norm_eps": 2e-3}], ids=str)
def test_the_comparison_sees_a_small_change(fields, tmp_path):
    right = our_config("2 of 4")
    params = parity.in_our_layout(tmp_path, make_moe, "2 of 4", right, make_moe.weights("2 of 4"))
    wrong = MoE(dataclasses.replace(right, **fields))
    logits, _, _ = parity.language_model(wrong, params, **parity.of_batch(make_moe))
    assert quick.relative_error(logits, golden("2 of 4")["logits"]) > 5 * parity.TOLERANCE
