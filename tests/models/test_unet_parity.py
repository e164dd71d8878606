"""Output and every gradient equal diffusers' two U-Nets: by golden file always, live where installed."""

import functools

import golden_file
import jax
import make_unet
import numpy as np
import parity
import pytest
import quick
from quick import relative_error as error

from jaxvram.models.unet import UNet, UNetConfig

FILE = "diffusion_pytorch_model.safetensors"
CFG = {
    "pixels": UNetConfig(
        image_size=12, channels=3, num_classes=5, learn_sigma=True, width=4, multipliers=(1, 2, 3), res_blocks=1,
        attention_levels=(1,), head_dim=4, groups=2, remat="none", dtype="float32",
    ),
    "text": UNetConfig(
        image_size=10, channels=2, width=8, multipliers=(1, 2), res_blocks=1, attention_levels=(0,), heads=2, head_dim=0,
        groups=2, context_dim=5, context_length=make_unet.S, remat="none", dtype="float32",
    ),
}  # fmt: skip
golden = functools.partial(parity.golden, make_unet)


def in_our_layout(tmp_path, variant, tensors):
    return parity.in_our_layout(tmp_path, make_unet, variant, CFG[variant], tensors, FILE)


@functools.partial(quick.jit, static_argnums=0)
def ours(model, params, x, t, g, labels=None, context=None, length=None):
    def against(params, x_BxHxWxC, context_BxSxE):
        condition = labels if context is None else {"context_BxSxE": context_BxSxE, "length_B": length}
        out_BxHxWxC = model.apply({"params": params}, x_BxHxWxC, t, condition)
        return (out_BxHxWxC * g).sum(), out_BxHxWxC

    return jax.grad(against, (0, 1, 2), has_aux=True)(params, x, context)


def errors(tmp_path, variant, reference):
    """Name -> error of output and all gradients against `reference`, in the form that make_unet.oracle returns."""
    params = in_our_layout(tmp_path, variant, make_unet.weights(variant))
    (grads, dx, dcontext), out = ours(UNet(CFG[variant]), params, **make_unet.batch(variant))
    theirs = golden_file.part(reference, "grad")
    found = {"out": error(out, reference["out"]), "x": error(dx, theirs.pop("x"))}
    if variant == "text":
        found["context"] = error(dcontext, theirs.pop("context"))
    wanted = in_our_layout(tmp_path, variant, theirs)
    is_dead = lambda path: variant == "pixels" and path.endswith("c_k/bias")
    return {
        name: off for name, off in (found | parity.gradient_errors(grads, wanted)).items() if not is_dead(name)
    }  # fmt: skip


@pytest.mark.parametrize("variant", make_unet.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(errors(tmp_path, variant, golden(variant)))


@pytest.mark.parametrize("variant", make_unet.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    live = make_unet.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, live))
    parity.assert_golden_is_live(make_unet, variant, live, nought=make_unet.DEAD)


def test_the_file_has_a_gradient_for_every_weight():
    """None of them is nought, which would prove nothing - but a bias of keys."""
    for variant in make_unet.VARIANTS:
        kept = golden(variant)
        assert {f"grad/{name}" for name in make_unet.weights(variant)} <= set(kept)
        assert min(np.abs(x).max() for name, x in kept.items() if not name.endswith(make_unet.DEAD)) > 0.01
