"""Output and every gradient equal diffusers' PixArtTransformer2DModel: by golden file always, live where installed."""

import functools

import golden_file
import jax
import make_pixart
import numpy as np
import parity
import pytest
import quick
from quick import relative_error as error

from jaxvram.models.pixart import PixArt, PixArtConfig

golden = functools.partial(parity.golden, make_pixart)


def our_config(variant):
    c = make_pixart.VARIANTS[variant]
    return PixArtConfig(
        image_size=c["sample_size"], channels=c["in_channels"], patch_size=c["patch_size"], n_layer=c["num_layers"],
        n_head=c["num_attention_heads"], n_embd=c["cross_attention_dim"], learn_sigma=c["out_channels"] > c["in_channels"],
        context_dim=c["caption_channels"], context_length=make_pixart.S, remat="none", dtype="float32",
        micro_conditions=c["use_additional_conditions"], interpolation_scale=float(c.get("interpolation_scale", 1)),
    )  # fmt: skip


def in_our_layout(tmp_path, variant, tensors):
    file = "diffusion_pytorch_model.safetensors"
    return parity.in_our_layout(tmp_path, make_pixart, variant, our_config(variant), tensors, file)


@functools.partial(quick.jit, static_argnums=0)
def ours(model, params, x, t, context, length, size, aspect, g):
    def against(params, x_BxHxWxC, context_BxSxE):
        told = {"context_BxSxE": context_BxSxE, "length_B": length, "size_Bx2": size, "aspect_B": aspect}
        out_BxHxWxC = model.apply({"params": params}, x_BxHxWxC, t, told)
        return (out_BxHxWxC * g).sum(), out_BxHxWxC

    return jax.grad(against, (0, 1, 2), has_aux=True)(params, x, context)


def errors(tmp_path, variant, reference):
    """Name -> error of output and all gradients against `reference`, in the form that make_pixart.oracle returns."""
    params = in_our_layout(tmp_path, variant, make_pixart.weights(variant))
    (grads, *of_inputs), out = ours(PixArt(our_config(variant)), params, **make_pixart.batch(variant))
    found = {"out": error(out, reference["out"])}
    found |= {key: error(g, reference[f"grad/{key}"]) for key, g in zip(make_pixart.KEYS, of_inputs, strict=True)}
    theirs = {name: x for name, x in golden_file.part(reference, "grad").items() if name not in make_pixart.KEYS}
    return found | parity.gradient_errors(grads, in_our_layout(tmp_path, variant, theirs))


def known(found):
    """Without the biases of the keys, whose gradients are nought but for rounding: they move all scores of a query alike."""
    return {name: x for name, x in found.items() if not name.endswith("c_k/bias")}


@pytest.mark.parametrize("variant", make_pixart.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(known(errors(tmp_path, variant, golden(variant))))


@pytest.mark.parametrize("variant", make_pixart.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    live = make_pixart.oracle(variant)
    parity.assert_small(known(errors(tmp_path, variant, live)))
    parity.assert_golden_is_live(make_pixart, variant, live, nought=("to_k.bias",))


def test_the_file_has_a_gradient_for_every_weight():
    """None of them is nought, which would prove nothing - but a bias of keys; padding of a text has none at all."""
    for variant in make_pixart.VARIANTS:
        kept = golden(variant)
        inputs = {f"grad/{key}" for key in make_pixart.KEYS}
        assert set(kept) == {f"grad/{name}" for name in make_pixart.weights(variant)} | {"out"} | inputs
        assert min(np.abs(x).max() for name, x in kept.items() if not name.endswith("to_k.bias")) > 0.05
        length_B = make_pixart.batch(variant)["length"]
        padding_BxS = np.arange(make_pixart.S) >= length_B[:, None]
        moved_BxS = np.abs(kept["grad/context"]).max(-1) > 0
        assert not moved_BxS[padding_BxS].any() and moved_BxS[~padding_BxS].all()
