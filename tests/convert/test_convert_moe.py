"""Mixtral's folders to ours and back, in both layouts; a dense Llama as every expert; what does not fit is told."""

import dataclasses

import checkpoints
import jax
import numpy as np
import parity
import pytest
import quick
import tiny_llama

from jaxvram.convert import llama, moe
from jaxvram.errors import UserError
from jaxvram.models.moe import GROK, MoEConfig

FIELDS = {field.name: getattr(tiny_llama.CFG, field.name) for field in dataclasses.fields(tiny_llama.CFG)}
CFG = MoEConfig(**FIELDS, n_expert=3)
params_of = lambda cfg, **options: checkpoints.random_params(cfg, std=0.4, **options)


def test_there_and_back(tmp_path):
    params = params_of(CFG)
    moe.save(params, CFG, tmp_path / "out")
    checkpoints.assert_equal(moe.load_params(tmp_path / "out", CFG), params)


@parity.needs_transformers
def test_transformers_loads_what_we_write_and_we_what_it_writes(tmp_path):
    import transformers

    checkpoints.assert_transformers_agree(transformers.MixtralForCausalLM, CFG, params_of(CFG), tmp_path)


def test_upcycled_is_the_dense_model_whatever_its_routers(tmp_path):
    cfg = dataclasses.replace(CFG, n_expert=4)
    dense = tiny_llama.random_params(tiny_llama.CFG)
    llama.save(dense, tiny_llama.CFG, tmp_path / "dense")
    params = moe.load_params(tmp_path / "dense", cfg)
    assert "router" not in params["layers"]["moe"]
    params["layers"]["moe"]["router"] = params_of(cfg)["layers"]["moe"]["router"]
    tokens_BxT = np.random.RandomState(2).randint(0, 37, (2, 12))
    want = checkpoints.logits_of(tiny_llama.CFG, dense, tokens_BxT)
    assert quick.relative_error(checkpoints.logits_of(cfg, params, tokens_BxT), want) < 1e-5


def test_the_head_of_a_tied_llama_becomes_one_of_its_own(tmp_path):
    tied = dataclasses.replace(tiny_llama.CFG, tie_head=True)
    dense = tiny_llama.random_params(tied)
    llama.save(dense, tied, tmp_path / "dense")
    params = moe.load_params(tmp_path / "dense", CFG)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], dense["embed_tokens"]["embedding"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 4}, "n_expert=4 .the recipe: 3.; add --config.model.n_expert=4"),
        ({"sliding_window": 8}, "sliding_window=8 hides what model.block_size=12 shows"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is no Mixtral"),
    ],
)
def test_another_mixtral_is_told(change, message, tmp_path):
    moe.save(params_of(CFG), CFG, tmp_path / "out")
    checkpoints.edit_config(tmp_path / "out", **change)
    with pytest.raises(UserError, match=message):
        moe.load_params(tmp_path / "out", CFG)


def test_an_expert_that_is_missing_is_named(tmp_path):
    moe.save(params_of(CFG), CFG, tmp_path / "out")
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    checkpoints.edit_weights(tmp_path / "out", lambda tensors: {n: x for n, x in tensors.items() if n != lost})
    with pytest.raises(UserError, match=f"lacks {lost}"):
        moe.load_params(tmp_path / "out", CFG)


def test_a_grok_is_neither_exported_nor_made_of_a_llama(tmp_path):
    grok = dataclasses.replace(CFG, **GROK)
    with pytest.raises(UserError, match="is no Mixtral's"):
        moe.save(jax.eval_shape(lambda: 0), grok, tmp_path / "out")
    llama.save(tiny_llama.random_params(tiny_llama.CFG), tiny_llama.CFG, tmp_path / "dense")
    with pytest.raises(UserError, match=r"dense Llama, which has no weights for model\.sandwich_norm"):
        moe.load_params(tmp_path / "dense", grok)
