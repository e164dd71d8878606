"""Output and every gradient equal transformers' CLIPTextModel and T5EncoderModel: by golden file always, live too."""

import dataclasses
import functools
import json

import golden_file
import jax
import make_text_encoder
import numpy as np
import parity
import pytest
import quick
import safetensors.numpy

from jaxvram.convert import text_encoder as convert
from jaxvram.models.text_encoder import bucket

golden = functools.partial(parity.golden, make_text_encoder)
NOUGHT = ("k_proj.bias",)  # moves all scores of a query alike


def in_our_layout(tmp_path, variant, tensors):
    folder = tmp_path / f"{variant}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_text_encoder.config(variant)))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    found = convert.find(folder)
    cfg = dataclasses.replace(found.cfg, dtype="float32", param_dtype="float32")
    return convert.TextWeights(dataclasses.replace(found, cfg=cfg)).whole(), cfg


@functools.partial(quick.jit, static_argnums=0)
def ours(model, params, tokens, length, g):
    def against(params):
        out_BxSxE = model.apply({"params": params}, tokens, length)
        return (out_BxSxE * g).sum(), out_BxSxE * (np.arange(g.shape[1]) < length[:, None])[..., None]

    return jax.grad(against, has_aux=True)(params)


def errors(tmp_path, variant, reference):
    """Name -> error of output and all gradients against `reference`, in the form that `oracle` returns."""
    params, cfg = in_our_layout(tmp_path, variant, make_text_encoder.weights(variant))
    grads, out = ours(convert.MODULE_OF[type(cfg)](cfg), params, **make_text_encoder.batch(variant))
    theirs, _ = in_our_layout(tmp_path, variant, golden_file.part(reference, "grad"))
    return {"out": quick.relative_error(out, reference["out"])} | parity.gradient_errors(grads, theirs)


@pytest.mark.parametrize("variant", make_text_encoder.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(errors(tmp_path, variant, golden(variant)))


@parity.needs_transformers
@pytest.mark.parametrize("variant", make_text_encoder.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    live = make_text_encoder.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, live))
    parity.assert_golden_is_live(make_text_encoder, variant, live, nought=NOUGHT)


def test_the_file_has_a_gradient_for_every_weight():
    """None of them is nought, which would prove nothing - but a bias of keys."""
    for variant in make_text_encoder.VARIANTS:
        kept = golden(variant)
        assert set(kept) == {f"grad/{name}" for name in make_text_encoder.weights(variant)} | {"out"}
        assert min(np.abs(x).max() for name, x in kept.items() if not name.endswith(NOUGHT)) > 0.02


@parity.needs_transformers
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 6), (16, 100)])
def test_buckets_of_distances(buckets, max_distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-400, 401)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distance), True, buckets, max_distance)
    assert (bucket(distance, buckets, max_distance) == theirs.numpy()).all()
