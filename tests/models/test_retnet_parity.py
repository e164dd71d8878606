"""Logits, loss and every gradient equal torchscale's RetNet: by golden file always, live where it is there."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import make_retnet
import numpy as np
import parity
import pytest
import quick
from quick import relative_error

from jaxvram import models
from jaxvram.models.retnet import SIZES, RetNetConfig

golden = functools.partial(parity.golden, make_retnet)
needs_torchscale = pytest.mark.skipif(not parity.installed("torch", "torchscale"), reason="needs torch and torchscale")


def our_config(variant):
    c = make_retnet.VARIANTS[variant]
    return RetNetConfig(
        vocab_size=c["vocab_size"], vocab_multiple=16, n_layer=c["decoder_layers"], n_embd=c["decoder_embed_dim"],
        n_head=c["decoder_retention_heads"], d_value=c["decoder_value_embed_dim"], n_inner=c["decoder_ffn_embed_dim"],
        activation=c["activation_fn"], scale_embedding=not c["no_scale_embedding"], norm_eps=c["layernorm_eps"],
        tie_head=c["share_decoder_input_output_embed"], remat="none", dtype="float32",
    )  # fmt: skip


def errors(tmp_path, variant, reference):
    return parity.language_model_errors(tmp_path, make_retnet, variant, our_config(variant), reference)


@pytest.mark.parametrize("variant", make_retnet.VARIANTS)
def test_the_golden_file(tmp_path, variant):
    parity.assert_small(errors(tmp_path, variant, golden(variant)))


@needs_torchscale
@pytest.mark.parametrize("variant", make_retnet.VARIANTS)
def test_torchscale_itself_and_the_golden_file_is_of_it(tmp_path, variant):
    live = make_retnet.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, live))
    parity.assert_golden_is_live(make_retnet, variant, live)


def test_the_comparison_can_fail(tmp_path):
    """A gradient that is off by a thousandth is seen, and so is another eps."""
    reference = golden("retnet")
    name = "grad/layers.1.retention.q_proj.weight"
    found = errors(tmp_path, "retnet", reference | {name: reference[name] * 1.001})
    assert found["layers/retention/q_proj/kernel"] > parity.TOLERANCE
    cfg = our_config("usual_eps")
    params = parity.in_our_layout(tmp_path, make_retnet, "usual_eps", cfg, make_retnet.weights("usual_eps"))
    other = models.build(dataclasses.replace(cfg, norm_eps=1e-14))
    logits, *_ = parity.language_model(other, params, **parity.of_batch(make_retnet))
    assert relative_error(logits, golden("usual_eps")["logits"]) > 100 * parity.TOLERANCE


@needs_torchscale
@pytest.mark.parametrize("variant", ["retnet", "usual_eps"])
def test_torchscales_recurrent_form(tmp_path, variant):
    """A token at a time there, all at once here; equal at any eps."""
    cfg = our_config(variant)
    params = parity.in_our_layout(tmp_path, make_retnet, variant, cfg, make_retnet.weights(variant))
    logits, *_ = parity.language_model(models.build(cfg), params, **parity.of_batch(make_retnet))
    assert relative_error(logits, make_retnet.recurrent_logits(variant)) < parity.TOLERANCE


@needs_torchscale
def test_parameter_counts_and_starting_weights_are_torchscales():
    """Of all sizes, as it builds them; W_o is the exception: half of what 0.3.0 starts from, as it has been since."""
    import torch

    for name, size in SIZES.items():
        with torch.device("meta"):
            theirs = make_retnet.decoder(torchscale_config(name))
        wanted = sum(p.numel() for p in theirs.parameters())
        assert count(RetNetConfig(vocab_size=64, **size)) == wanted, name
    torch.manual_seed(0)
    small = SIZES["base"] | {"n_layer": 1}
    theirs = make_retnet.decoder(torchscale_config("base") | {"decoder_layers": 1})
    std = {name: float(p.detach().std()) for name, p in theirs.named_parameters() if p.ndim == 2}
    cfg = RetNetConfig(vocab_size=64, **small)
    ours = jax.tree.map(np.asarray, quick.jit(fresh(cfg))(jax.random.key(0)))
    ratio = {"retention/out_proj": 0.5}
    for path, kernel in jax.tree.leaves_with_path(ours["layers"]):
        name = "/".join(key.key for key in path[:-1])
        if path[-1].key == "kernel":
            want = std[f"layers.0.{name.replace('/', '.')}.weight"] * ratio.get(name, 1)
            assert abs(kernel.std() / want - 1) < 0.01, name
    assert abs(ours["lm_head"]["kernel"].std() / std["output_projection.weight"] - 1) < 0.02


def torchscale_config(name):
    s = SIZES[name]
    return {
        "vocab_size": 64, "decoder_embed_dim": s["n_embd"], "decoder_layers": s["n_layer"],
        "decoder_retention_heads": s["n_head"], "decoder_value_embed_dim": s["d_value"],
        "decoder_ffn_embed_dim": s["n_inner"],
    }  # fmt: skip


def fresh(cfg):
    return lambda key: models.build(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def count(cfg):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(fresh(cfg), jax.random.key(0))))
