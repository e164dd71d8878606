"""Moments, decoded images and every gradient equal diffusers' AutoencoderKL: by golden file always, live where installed."""

import functools

import golden_file
import jax
import jax.numpy as jnp
import make_autoencoder
import numpy as np
import parity
import pytest
import quick
from quick import relative_error as error

from jaxvram.models.autoencoder import AutoencoderConfig, AutoencoderKL

golden = functools.partial(parity.golden, make_autoencoder)


def our_config(variant):
    c = make_autoencoder.VARIANTS[variant]
    widths = c["block_out_channels"]
    return AutoencoderConfig(
        image_size=c["sample_size"], channels=c["in_channels"], latent_channels=c["latent_channels"],
        width=widths[0], multipliers=tuple(width // widths[0] for width in widths),
        res_blocks=c["layers_per_block"], groups=c["norm_num_groups"], remat="none", dtype="float32",
    )  # fmt: skip


def in_our_layout(tmp_path, variant, tensors):
    file = "diffusion_pytorch_model.safetensors"
    tree = parity.in_our_layout(tmp_path, make_autoencoder, variant, our_config(variant), tensors, file)
    return tree["autoencoder"]


@functools.partial(quick.jit, static_argnums=0)
def ours(model, params, x, noise, g_mean, g_logvar, g):
    def against(params, x):
        mean, logvar = model.apply({"params": params}, x, method="encode")
        out = model.apply({"params": params}, mean + jnp.exp(logvar / 2) * noise, method="decode")
        return (mean * g_mean).sum() + (logvar * g_logvar).sum() + (out * g).sum(), (mean, logvar, out)

    return jax.grad(against, (0, 1), has_aux=True)(params, x)


def errors(tmp_path, variant, reference):
    """Name -> error of moments, image and all gradients against `reference`, as make_autoencoder.oracle returns it."""
    params = in_our_layout(tmp_path, variant, make_autoencoder.weights(variant))
    batch = make_autoencoder.batch(variant)
    (grads, dx), outputs = ours(AutoencoderKL(our_config(variant)), params, **batch)
    found = {name: error(x, reference[name]) for name, x in zip(("mean", "logvar", "out"), outputs, strict=True)}
    theirs = {name: x for name, x in golden_file.part(reference, "grad").items() if name != "x"}
    of_grads = parity.gradient_errors(grads, in_our_layout(tmp_path, variant, theirs))
    return found | {"x": error(dx, reference["grad/x"])} | of_grads


@pytest.mark.parametrize("variant", make_autoencoder.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(errors(tmp_path, variant, golden(variant)))


@pytest.mark.parametrize("variant", make_autoencoder.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    live = make_autoencoder.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, live))
    parity.assert_golden_is_live(make_autoencoder, variant, live, nought=("to_k.bias",))


def test_the_file_has_a_gradient_for_every_weight():
    """None of them is nought, which would prove nothing - but a bias of keys: it moves all scores of a query alike."""
    for variant in make_autoencoder.VARIANTS:
        kept = golden(variant)
        names = {f"grad/{name}" for name in make_autoencoder.weights(variant)}
        assert set(kept) == names | {"mean", "logvar", "out", "grad/x"}
        assert min(np.abs(x).max() for name, x in kept.items() if not name.endswith("to_k.bias")) > 0.05
