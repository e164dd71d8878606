"""Output and every gradient equal diffusers' DiTTransformer2DModel: by golden file always, live where installed."""

import functools

import golden_file
import jax
import make_dit
import numpy as np
import parity
import pytest
import quick
from quick import relative_error as error

from jaxvram.models.dit import DiT, DiTConfig

golden = functools.partial(parity.golden, make_dit)


def our_config(variant):
    c = make_dit.VARIANTS[variant]
    return DiTConfig(
        image_size=c["sample_size"], channels=c["in_channels"], patch_size=c["patch_size"],
        num_classes=c["num_embeds_ada_norm"], n_layer=c["num_layers"], n_head=c["num_attention_heads"],
        n_embd=c["num_attention_heads"] * c["attention_head_dim"], learn_sigma=c["out_channels"] > c["in_channels"],
        remat="none", dtype="float32",
    )  # fmt: skip


def in_our_layout(tmp_path, variant, tensors):
    tensors = make_dit.with_copies(tensors, make_dit.VARIANTS[variant]["num_layers"])
    file = "diffusion_pytorch_model.safetensors"
    return parity.in_our_layout(tmp_path, make_dit, variant, our_config(variant), tensors, file)


@functools.partial(quick.jit, static_argnums=0)
def ours(model, params, x, t, labels, g):
    def against(params, x_BxHxWxC):
        out_BxHxWxC = model.apply({"params": params}, x_BxHxWxC, t, labels)
        return (out_BxHxWxC * g).sum(), out_BxHxWxC

    return jax.grad(against, (0, 1), has_aux=True)(params, x)


def errors(tmp_path, variant, reference):
    """Name -> error of output and all gradients against `reference`, in the form that make_dit.oracle returns."""
    params = in_our_layout(tmp_path, variant, make_dit.weights(variant))
    (grads, dx), out = ours(DiT(our_config(variant)), params, **make_dit.batch(variant))
    found = {"out": error(out, reference["out"]), "x": error(dx, reference["grad/x"])}
    theirs = {name: x for name, x in golden_file.part(reference, "grad").items() if name != "x"}
    return found | parity.gradient_errors(grads, in_our_layout(tmp_path, variant, theirs))


@pytest.mark.parametrize("variant", make_dit.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(errors(tmp_path, variant, golden(variant)))


@pytest.mark.parametrize("variant", make_dit.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    live = make_dit.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, live))
    parity.assert_golden_is_live(make_dit, variant, live, nought=("to_k.bias",))


def test_diffusers_own_frequencies_are_not_the_papers(monkeypatch):
    """Without that correction its outputs are far off: parity would notice the wrong sines."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.setattr(make_dit, "correct", lambda model: model.eval())
    variant = "fixed_variance"
    assert error(make_dit.oracle(variant)["out"], golden(variant)["out"]) > 100 * parity.TOLERANCE


def test_the_file_has_a_gradient_for_every_weight():
    """None of them is nought, which would prove nothing - but a bias of keys: it moves all scores of a query alike."""
    for variant in make_dit.VARIANTS:
        kept = golden(variant)
        first = make_dit.EMBEDDERS.format(0)
        weights = {n for n in make_dit.weights(variant) if ".norm1.emb." not in n or n.startswith(first)}
        assert set(kept) == {f"grad/{name}" for name in weights} | {"out", "grad/x"}
        assert min(np.abs(x).max() for name, x in kept.items() if not name.endswith("to_k.bias")) > 0.05
