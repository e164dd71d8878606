"""LoRAs of denoisers: diffusers multiplies what was exported as we do, merged equals unmerged, what was written is read."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import quick
import safetensors.numpy
from flax import traverse_util

from jaxvram.convert import diffusers_lora, pixart, unet
from jaxvram.errors import UserError
from jaxvram.finetune.adapted import adapted
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.finetune.weights import base_parameters, merged, one_by_one
from jaxvram.models.pixart import PixArt, PixArtConfig
from jaxvram.models.unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("quick_compile")
CFG = UNetConfig(
    image_size=4, channels=2, width=8, multipliers=(1, 2), res_blocks=1, attention_levels=(0,), heads=2, head_dim=0,
    groups=2, context_dim=6, context_length=3, remat="none", dtype="float32",
)  # fmt: skip
EVERYTHING = FinetuneConfig(method="lora", rank=2, alpha=3.0, targets=".*(attn|mlp|proj_in|skip).*")
RANDOM = np.random.RandomState(0)
EXAMPLE = (
    RANDOM.normal(size=(2, 4, 4, 2)).astype(np.float32),
    np.float32([3, 700]),
    {"context_BxSxE": RANDOM.normal(size=(2, 3, 6)).astype(np.float32), "length_B": np.int32([3, 2])},
)


@functools.cache
def model_and_params(finetune=EVERYTHING):
    """An adapted U-Net of which no weight is zero."""
    model = adapted(UNet(CFG), finetune)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *EXAMPLE)["params"])
    random = np.random.RandomState(1)
    return model, jax.tree.map(lambda p: random.normal(0, 0.2, p.shape).astype(np.float32), shapes)


def said(model, params):
    return np.asarray(quick.jit(lambda params: model.apply({"params": params}, *EXAMPLE))(params))


def plain(params):
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: x for path, x in flat.items() if not path[-1].startswith("lora_")})


def test_merged_equals_unmerged():
    model, params = model_and_params()
    together = merged(model, params, EXAMPLE)
    assert quick.relative_error(said(model.model, together), said(model, params)) < 1e-5
    assert quick.relative_error(said(model.model, plain(params)), said(model, params)) > 0.1


def test_a_base_is_read_under_what_is_added():
    model, params = model_and_params()
    base = base_parameters(model, one_by_one(plain(params)), EXAMPLE)
    assert jax.tree.all(jax.tree.map(np.array_equal, base, plain(params)))


def test_written_and_read(tmp_path):
    _, params = model_and_params()
    diffusers_lora.save(params, CFG, EVERYTHING, tmp_path / "lora", "the base")
    shapes = jax.eval_shape(lambda: params)
    read = traverse_util.flatten_dict(diffusers_lora.load(tmp_path / "lora", shapes, CFG, EVERYTHING))
    wanted = {path: x for path, x in traverse_util.flatten_dict(params).items() if path[-1].startswith("lora_")}
    assert read.keys() == wanted.keys() and len(read) > 40
    for path, x in wanted.items():
        np.testing.assert_allclose(read[path], x, rtol=1e-6)
    other = dataclasses.replace(EVERYTHING, rank=3)
    with pytest.raises(UserError, match=r"add --config.finetune.rank=2"):
        diffusers_lora.load(tmp_path / "lora", shapes, CFG, other)
    fewer = dataclasses.replace(EVERYTHING, targets=".*attn.*")
    with pytest.raises(UserError, match="which this model has not"):
        diffusers_lora.load(tmp_path / "lora", jax.eval_shape(lambda: model_and_params(fewer)[1]), CFG, fewer)
    with pytest.raises(UserError, match="diffusers takes plain LoRAs"):
        diffusers_lora.save(params, CFG, dataclasses.replace(EVERYTHING, dora=True), tmp_path / "dora")


def test_diffusers_reads_it(tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model, params = model_and_params()
    unet.save(plain(params), CFG, tmp_path / "base")
    diffusers_lora.save(params, CFG, EVERYTHING, tmp_path / "lora")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base").eval()
    theirs.load_lora_adapter(tmp_path / "lora", weight_name=diffusers_lora.LAYOUT.weights, prefix=unet.LORA_PREFIX)
    x, t_B, condition = EXAMPLE
    mask = np.arange(3) < condition["length_B"][:, None]
    with torch.no_grad():
        out = theirs(
            torch.tensor(x).movedim(-1, 1), torch.tensor(t_B), torch.tensor(condition["context_BxSxE"]),
            encoder_attention_mask=torch.tensor(mask),
        ).sample.movedim(1, -1).numpy()  # fmt: skip
    assert quick.relative_error(said(model, params), out) < 1e-5


def test_with_remat_it_is_the_same():
    model, params = model_and_params()
    again = adapted(UNet(dataclasses.replace(CFG, remat="full")), EVERYTHING)
    shapes = jax.eval_shape(lambda: again.init(jax.random.key(0), *EXAMPLE)["params"])
    assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
    assert quick.relative_error(said(again, params), said(model, params)) < 1e-6


def test_pixarts(tmp_path):
    """Every matrix of a block and what embeds the text. diffusers' PixArt has no loader of LoRAs: peft puts them in."""
    torch, peft, diffusers = (pytest.importorskip(name) for name in ("torch", "peft", "diffusers"))
    cfg = PixArtConfig(
        image_size=4, channels=2, n_layer=2, n_head=2, n_embd=8, context_dim=6, context_length=3, remat="none",
        dtype="float32",
    )  # fmt: skip
    finetune = dataclasses.replace(EVERYTHING, targets=".*(attn|mlp|y_embed)/.*")
    model = adapted(PixArt(cfg), finetune)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *EXAMPLE)["params"])
    random = np.random.RandomState(1)
    params = jax.tree.map(lambda p: random.normal(0, 0.2, p.shape).astype(np.float32), shapes)
    diffusers_lora.save(params, cfg, finetune, tmp_path / "lora")
    read = traverse_util.flatten_dict(diffusers_lora.load(tmp_path / "lora", shapes, cfg, finetune))
    assert len(read) == 2 * (4 + 4 + 2 + 2)
    for path, x in read.items():
        np.testing.assert_allclose(x, traverse_util.flatten_dict(params)[path], rtol=1e-6)

    pixart.save(plain(params), cfg, tmp_path / "base")
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "base").eval()
    tensors = safetensors.numpy.load_file(tmp_path / "lora" / diffusers_lora.LAYOUT.weights)
    tensors = {name.removeprefix(f"{pixart.LORA_PREFIX}."): torch.tensor(x) for name, x in tensors.items()}
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=modules), theirs)
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    x, t_B, condition = EXAMPLE
    mask, none = np.arange(3) < condition["length_B"][:, None], {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        out = theirs(
            torch.tensor(x).movedim(-1, 1), torch.tensor(condition["context_BxSxE"]), torch.tensor(t_B), none,
            encoder_attention_mask=torch.tensor(mask).float(),
        ).sample.movedim(1, -1).numpy()  # fmt: skip
    assert quick.relative_error(said(model, params), out) < 1e-5
    assert quick.relative_error(said(model.model, plain(params)), out) > 0.1
    with pytest.raises(UserError, match="diffusers has no place for a LoRA of patch_embed"):
        pixart.lora_module(cfg, ("patch_embed",), None)
