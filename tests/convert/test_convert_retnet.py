"""RetNet's weights to and from torchscale's names: exact, or refused with a line that says why."""

import dataclasses
import json

import make_retnet
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import assert_equal, edit_config, edit_weights, logits_of, random_params
from parity import installed
from quick import relative_error

from jaxvram import convert
from jaxvram.errors import UserError
from jaxvram.models.retnet import RetNetConfig

CFG = RetNetConfig(
    vocab_size=37, vocab_multiple=16, n_layer=2, n_embd=8, n_head=2, d_value=12, n_inner=10, norm_eps=1e-14, dtype="float32"
)
VARIANTS = [{}, {"tie_head": True, "scale_embedding": False, "activation": "gelu"}]


def exported(cfg, folder):
    params = random_params(cfg)
    convert.converter(cfg).save(params, cfg, folder)
    return params


def load(folder, cfg=CFG):
    return convert.converter(cfg).load_params(folder, cfg)


@pytest.mark.parametrize("fields", [*VARIANTS, {"param_dtype": "bfloat16"}], ids=str)
def test_round_trip_is_exact(fields, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    params = exported(cfg, tmp_path / "model")
    assert_equal(load(tmp_path / "model", cfg), params)


def test_fairseqs_prefix_and_no_buffers(tmp_path):
    params = exported(CFG, tmp_path / "model")
    kept = lambda t: {f"decoder.{k}": v for k, v in t.items() if "rel_pos" not in k}
    edit_weights(tmp_path / "model", kept)
    assert_equal(load(tmp_path / "model"), params)


def test_padding_is_not_exported(tmp_path):
    exported(CFG, tmp_path / "model")
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["embed_tokens.weight"].shape == tensors["output_projection.weight"].shape == (37, 8)


@pytest.mark.skipif(not installed("torch", "torchscale"), reason="needs torch and torchscale")
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_torchscale_loads_all_of_it_and_gives_our_logits(fields, tmp_path):
    import torch

    cfg = dataclasses.replace(CFG, **fields)
    params = exported(cfg, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("exported_by")
    theirs = make_retnet.decoder(config)
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    theirs.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()}, strict=True)
    tokens_BxT = np.random.RandomState(2).randint(0, 37, (2, 12))
    want = theirs(torch.tensor(tokens_BxT))[0].detach().numpy()
    assert relative_error(logits_of(cfg, params, tokens_BxT), want) <= 1e-5


LAST = "layers.1.ffn.fc2.weight"
DECAY = "retnet_rel_pos.decay"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: edit_config(p, model_type="mamba2"), "is of a 'mamba2' model; this recipe's model is 'retnet'"),
        (lambda p: edit_config(p, deepnorm=True), "deepnorm=True is no RetNet of ours"),
        (lambda p: edit_config(p, decoder_layers=3), r"n_layer=3 \(the recipe: 2\); add --config\.model\.n_layer=3"),
        (lambda p: edit_config(p, activation_fn="gelu"), r"add --config\.model\.activation=gelu"),
        (lambda p: edit_config(p, layernorm_eps=1e-6), r"add --config\.model\.norm_eps=1e-06"),
        (lambda p: edit_config(p, decoder_embed_dim="wide"), "damaged: decoder_embed_dim='wide'"),
        (lambda p: edit_weights(p, lambda t: {k: t[k] for k in t if k != LAST}), f"has no tensor '{LAST}'"),
        (lambda p: edit_weights(p, lambda t: t | {LAST: t[LAST].T}), r"fc2\.weight has shape \(10, 8\)"),
        (lambda p: edit_weights(p, lambda t: t | {DECAY: 2 * t[DECAY]}), "decays .* of its own"),
    ],
)
def test_damage(damage, message, tmp_path):
    exported(CFG, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_an_untied_checkpoint_asks_for_an_untied_recipe(tmp_path):
    exported(CFG, tmp_path / "model")
    with pytest.raises(UserError, match=r"add --config\.model\.tie_head=False"):
        load(tmp_path / "model", dataclasses.replace(CFG, tie_head=True))
