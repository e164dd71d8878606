"""What autoencoders learn: the loss by hand, a discriminator in the same step as if it had one of its own, what is shown."""

import dataclasses
import functools
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from PIL import Image

from jaxvram import modes
from jaxvram.data.images import Arrays, ArraySource, ImageDataConfig
from jaxvram.errors import UserError
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.autoencoder import AutoencoderConfig, AutoencoderKL
from jaxvram.tasks.autoencoder import AutoencodingConfig, AutoencodingTask, ReconstructionConfig, psnr
from jaxvram.tasks.discriminator import Discriminator
from jaxvram.train.step import loss_and_gradients

pytestmark = pytest.mark.usefixtures("quick_compile")

CFG = AutoencoderConfig(
    image_size=12, width=4, multipliers=(1, 2), res_blocks=1, groups=2, remat="none", dtype="float32"
)
AGAINST = {"disc_weight": 0.7, "disc_width": 4, "disc_layers": 2, "kl_weight": 0.3}
KEY = jax.random.key(3)
B = 3


def source(size=12, channels=3):
    random = np.random.RandomState(0)
    images = random.uniform(-1, 1, (20, size, size, channels)).astype(np.float32)
    labels = np.arange(20, dtype=np.int32) % 2
    parts = {"train": Arrays(images, labels, np.arange(15)), "val": Arrays(images, labels, np.arange(15, 20))}
    return ArraySource(parts, images.shape[1:], ("a", "b"), ImageDataConfig("npz"), 0, "noise")


def task_of(data=None, cfg=CFG, sample=None, **fields):
    return AutoencodingTask(AutoencoderKL(cfg), data, AutoencodingConfig(**fields), sample or ReconstructionConfig())


@functools.cache
def grown(with_critic=True):
    """Weights of which none is zero."""
    random = np.random.RandomState(1)
    draw = lambda path, s: random.normal(path[-1].key == "scale", 0.2, s.shape).astype(np.float32)
    task = task_of(**AGAINST if with_critic else {})
    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(task.init, KEY))
    if with_critic:
        params["discriminator"]["out"]["bias"] += 1  # some images are beyond the hinge, else it would have no gradient
    return params


def batch(step=None):
    found = source().batch("train", 0, B)
    return found if step is None else found | {"step": np.full(B, step, np.int32)}


def model(params, x, method):
    return AutoencoderKL(CFG).apply({"params": params}, x, method=method)


def parts_by_hand(params, x, error):
    """(error (B,), divergence in nats (B,), image), one formula after the other."""
    mean, logvar = model(params, x, "encode")
    image = model(params, mean + jnp.exp(0.5 * logvar) * jax.random.normal(KEY, mean.shape), "decode")
    kl_B = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
    return error(x - image).reshape(B, -1).mean(1), kl_B, image


@pytest.mark.parametrize(("name", "error"), [("l1", jnp.abs), ("l2", jnp.square)])
def test_the_loss_by_hand(name, error):
    """A sum over images of the mean error a number and its share of the divergence; it learns both halves."""
    task, params, x = task_of(reconstruction=name, kl_weight=0.3), grown(False), batch()["images"]

    def by_hand(params):
        error_B, kl_B, _ = parts_by_hand(params["autoencoder"], x, error)
        return (error_B + 0.3 * kl_B / (12 * 12 * 3)).mean(), (error_B.mean(), kl_B.mean())

    def both(params):
        return loss_and_gradients(task, params, batch(), KEY), jax.value_and_grad(by_hand, has_aux=True)(params)

    (loss, grads, told), ((want, (error, kl)), want_grads) = quick.jit(both)(params)
    assert abs(loss / want - 1) < 1e-6 and abs(told["reconstruction"] / error - 1) < 1e-6
    assert abs(told["kl"] / kl - 1) < 1e-6
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, grads, want_grads))) < 1e-5


@functools.cache
def learnt_against(step, start):
    task = task_of(**AGAINST, disc_start=start)
    assert task.reads_step == (start > 0)
    run = quick.jit(lambda params, batch: loss_and_gradients(task, params, batch, KEY))
    return jax.tree.map(np.asarray, run(grown(), batch(step)))


@functools.cache
def learnt_in_turns():
    """(gradients of autoencoder, of discriminator, weight, its share): as latent diffusion has it, each with its own loss.

    The weight is found by two whole gradients by the last kernel.
    """
    x, N = jnp.asarray(batch()["images"]), 12 * 12 * 3
    says = lambda disc, x: Discriminator(4, 2, "float32").apply({"params": disc}, x)

    def of_autoencoder(params, disc, weight):
        error_B, kl_B, image = parts_by_hand(params, x, jnp.abs)
        error, fooled = (N * error_B).mean(), -says(disc, image).mean()
        return error + 0.3 * kl_B.mean() + weight * fooled, (error, fooled)

    def run(params, disc):
        of = lambda i: jax.grad(lambda p: of_autoencoder(p, disc, 0.0)[1][i])(params)["conv_out"]["kernel"]
        adaptive = jnp.linalg.norm(of(0).ravel()) / (jnp.linalg.norm(of(1).ravel()) + 1e-4)
        adaptive = jnp.clip(adaptive, 0.0, 1e4)
        grads = jax.grad(of_autoencoder, has_aux=True)(params, disc, 0.7 * adaptive)[0]
        image = parts_by_hand(params, x, jnp.abs)[2]
        hinge = lambda disc: 0.5 * (jax.nn.relu(1 - says(disc, x)).mean() + jax.nn.relu(1 + says(disc, image)).mean())
        return jax.tree.map(lambda g: g / N, grads), jax.grad(hinge)(disc), adaptive, hinge(disc)

    return jax.tree.map(np.asarray, quick.jit(run)(grown()["autoencoder"], grown()["discriminator"]))


@pytest.mark.parametrize(("step", "start"), [(None, 0), (5, 5), (6, 5)])
def test_one_step_for_both_is_what_two_losses_give(step, start):
    """Every gradient of either, from one backward pass; the weight as well."""
    loss, grads, told = learnt_against(step, start)
    of_autoencoder, of_discriminator, adaptive, hinge = learnt_in_turns()
    wanted = {"autoencoder": of_autoencoder, "discriminator": of_discriminator}
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, grads, wanted))) < 2e-5
    assert abs(told["adaptive_weight"] / adaptive - 1) < 1e-5 and abs(told["discriminator"] / hinge - 1) < 1e-5
    assert 1 < adaptive < 1e4 and np.isfinite(loss)


def test_before_its_time_there_is_no_discriminator():
    """Gradients as without it; its own are zero; and the loss that is told never knows of it."""
    loss, grads, told = learnt_against(4, 5)
    alone = task_of(kl_weight=0.3)
    run = quick.jit(lambda params: loss_and_gradients(alone, params, batch(), KEY))
    want, want_grads, _ = jax.tree.map(np.asarray, run({"autoencoder": grown()["autoencoder"]}))
    assert loss == pytest.approx(want, rel=1e-6) and learnt_against(5, 5)[0] == pytest.approx(want, rel=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, grads["autoencoder"], want_grads["autoencoder"]))) < 1e-6
    assert not any(g.any() for g in jax.tree.leaves(grads["discriminator"]))
    assert told["discriminator"] == told["generator"] == told["adaptive_weight"] == 0


def test_the_discriminator_is_a_patchgan():
    """Its outputs are those of PyTorch's layers in a row; 3 layers see 70 pixels and give 30 x 30 patches of 256."""
    torch = pytest.importorskip("torch")
    nn, disc = torch.nn, grown()["discriminator"]
    widths = [3, 4, 8, 16]
    layers = []
    for i in range(3):
        layers.append(nn.Conv2d(widths[i], widths[i + 1], 4, stride=2 if i < 2 else 1, padding=1))
        layers += [nn.GroupNorm(widths[i + 1] // 4, widths[i + 1], eps=1e-5)] if i else []
        layers.append(nn.LeakyReLU(0.2))
    layers.append(nn.Conv2d(widths[3], 1, 4, padding=1))
    names = iter(("conv_0", "conv_1", "norm_1", "conv_2", "norm_2", "out"))
    with torch.no_grad():
        for layer in (layer for layer in layers if hasattr(layer, "weight")):
            ours = disc[next(names)]
            kernel = ours["kernel"].transpose(3, 2, 0, 1) if "kernel" in ours else ours["scale"]
            layer.weight.copy_(torch.tensor(kernel))
            layer.bias.copy_(torch.tensor(ours["bias"]))
        x = batch()["images"]
        want = nn.Sequential(*layers)(torch.tensor(x).movedim(-1, 1)).movedim(1, -1).numpy()
    got = quick.jit(lambda p, x: Discriminator(4, 2, "float32").apply({"params": p}, x))(disc, x)
    assert got.shape == (B, 1, 1, 1) and quick.relative_error(got, want) < 1e-5
    says = jax.eval_shape(lambda x: Discriminator().init_with_output(KEY, x)[0], jnp.zeros((1, 256, 256, 3)))
    assert says.shape == (1, 30, 30, 1)


def test_an_evaluation():
    """The same parts, means over images, of a latent drawn with the evaluation's key; decibels by hand."""
    task, params = task_of(kl_weight=0.3), grown(False)

    def both(params):
        x = batch()["images"]
        return task.evaluation(params, batch(), KEY), parts_by_hand(params["autoencoder"], x, jnp.abs)

    found, (error_B, kl_B, image) = jax.tree.map(np.asarray, quick.jit(both)(params))
    mse_B = np.square(batch()["images"] - np.clip(image, -1, 1)).reshape(B, -1).mean(1)
    wanted = {
        "loss": error_B + 0.3 * kl_B / 432, "reconstruction": error_B, "kl": kl_B, "psnr": 20 * np.log10(2 / np.sqrt(mse_B))
    }  # fmt: skip
    assert set(found) == set(wanted) and all(weight == B for _, weight in found.values())
    for name, of_B in wanted.items():
        assert found[name][0] == pytest.approx(of_B.sum(), rel=1e-5), name


def test_decibels():
    assert psnr(np.full((1, 2, 2, 1), -1.0), np.full((1, 2, 2, 1), 3.0))[0] == 0  # as far as can be, and not farther
    assert psnr(np.zeros((1, 2, 2, 1)), np.full((1, 2, 2, 1), 0.02))[0] == pytest.approx(40, abs=1e-4)


def test_what_is_shown():
    """Held-out images in rows of eight or fewer, each row over its reconstructions; the reconstructions alone as .npz."""
    data = source()
    task = task_of(data, sample=ReconstructionConfig(num_samples=5, batch_size=2))
    samples = task.show_on_request(grown(False))
    assert samples.text.startswith("5 held-out images over their reconstructions: ") and samples.text.endswith(" dB")
    rebuilt = np.load(io.BytesIO(samples.files[".npz"]))["arr_0"]
    assert rebuilt.shape == (5, 12, 12, 3)
    picture = np.asarray(Image.open(io.BytesIO(samples.files[".png"])))
    zoom, step = 6, 12 * 6 + 2
    assert picture.shape == (2 * step - 2, 5 * step - 2, 3)
    tile = lambda row, column: picture[row * step : row * step + 72 : zoom, column * step : column * step + 72 : zoom]
    originals = data.to_pixels(data.val_images(5)[0])
    for i in range(5):
        np.testing.assert_array_equal(tile(0, i), originals[i])
        np.testing.assert_array_equal(tile(1, i), rebuilt[i])
    assert task.show(grown(False)).files.keys() == {".png"} and task.check_samples() is None


def test_a_last_row_that_is_not_full():
    data = source()
    data.val_images = lambda limit: tuple(x[:11] for x in (np.tile(data._parts["val"].read(np.arange(1))[0], (11, 1, 1, 1)),
                                                           np.zeros(11, np.int32)))  # fmt: skip
    samples = task_of(data, sample=ReconstructionConfig(num_samples=11, batch_size=4)).show(grown(False))
    picture = np.asarray(Image.open(io.BytesIO(samples.files[".png"])))
    assert picture.shape == (4 * 74 - 2, 8 * 74 - 2, 3) and (picture[2 * 74 :, 3 * 74 :] == 255).all()


def test_scores_and_the_scale():
    """The spread of held-out latents, the data's own rules on reconstructions, and 1 over the spread of training latents."""
    data, seen = source(), []
    data.score = lambda images, labels: seen.append((images, labels)) or {"colour": 0.5}
    task = task_of(data, sample=ReconstructionConfig(batch_size=2), score_images=4)
    found, params = task.scores(grown(False)), grown(False)
    (images, labels), kept = seen[0], data.val_images(4)
    assert images.shape == (4, 12, 12, 3) and (labels == kept[1]).all() and found["colour"] == 0.5
    mean, logvar = (np.asarray(x) for x in quick.jit(lambda p, x: model(p, x, "encode"))(params["autoencoder"], kept[0]))
    expected = np.sqrt(mean.var() + np.exp(logvar).mean())  # of what is drawn
    assert found["latent_std"] == pytest.approx(expected, rel=0.1)
    train = data.train_images(1024)[0]
    assert len(train) == 15
    mean, logvar = (np.asarray(x) for x in quick.jit(lambda p, x: model(p, x, "encode"))(params["autoencoder"], train))
    scale = task.measured(params)["scaling_factor"]
    assert scale == pytest.approx(1 / np.sqrt(mean.var() + np.exp(logvar).mean()), rel=0.1)
    assert task_of(data).scores(params) == {} and len(seen) == 1


def test_a_batch_is_as_announced_and_a_plan_needs_no_data():
    task = task_of(source(), **AGAINST)
    announced = jax.tree.map(lambda s: (s.shape, s.dtype), task.batch_spec(B))
    assert announced == jax.tree.map(lambda x: (x.shape, x.dtype), batch())
    params = jax.eval_shape(task.init, KEY)
    function, arguments = task_of(**AGAINST).sampling(params)
    image, latent = jax.eval_shape(function, *arguments)
    assert image.shape == (16, 12, 12, 3) and latent.shape == (16, 6, 6, 4)
    assert set(params) == {"autoencoder", "discriminator"} and set(jax.eval_shape(task_of().init, KEY)) == {"autoencoder"}
    assert task.data_identity == task.source.identity and (task.unit, task.units_per_example) == ("images", 1)


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        ({"channels": 1}, {}, "12 x 12 with 1 channels, .* 12 x 12 with 3: set model.image_size=12 model.channels=1"),
        ({"size": 16}, {}, "the data are 16 x 16 with 3 channels, the model is for 12 x 12 with 3: set model.image_size=16"),
        ({}, {"reconstruction": "l3"}, "task.reconstruction='l3' is unknown; did you mean 'l"),
        ({}, {"kl_weight": -1.0}, "must not be negative"),
        ({}, {"disc_layers": 0}, "must be at least 1"),
        ({}, {"disc_weight": 0.5}, "task.disc_layers=3 needs images of 24 pixels, and model.image_size=12: take fewer"),
    ],
)
def test_what_does_not_go_together(data, fields, message):
    with pytest.raises(UserError, match=message):
        task_of(source(**data), **fields)


def test_the_task_of_a_recipe():
    recipe = types.SimpleNamespace(
        model=dataclasses.replace(CFG, image_size=16), task=AutoencodingConfig(), sample=ReconstructionConfig(),
        data=ImageDataConfig("shapes", image_size=16), train=types.SimpleNamespace(seed=0), finetune=FinetuneConfig(),
    )  # fmt: skip
    task = AutoencodingTask.of_recipe(recipe)
    assert task.source.shape == (16, 16, 3) and isinstance(task.model, AutoencoderKL)
    assert AutoencodingTask.of_recipe(recipe, with_data=False).source is None
    recipe.data = ImageDataConfig("latents", path="x")
    with pytest.raises(UserError, match="are an autoencoder's results"):
        AutoencodingTask.of_recipe(recipe)
    recipe.finetune = FinetuneConfig(method="lora")
    with pytest.raises(UserError, match=r"finetune\.method=lora is not for autoencoders"):
        AutoencodingTask.of_recipe(recipe)
    with pytest.raises(UserError, match="num_samples and batch_size must be at least 1"):
        ReconstructionConfig(batch_size=0)


def test_an_export_measures_the_scale(tmp_path, monkeypatch, capsys):
    """--mode=export asks for the data too, and config.json says 1 over the spread of its latents."""
    task, asked = task_of(source(), sample=ReconstructionConfig(batch_size=2)), []

    def load_checkpoint(recipe, workdir, kind, with_data=True):
        asked.append(with_data)
        return task, grown(False), 7

    monkeypatch.setattr(modes, "load_checkpoint", load_checkpoint)
    recipe = types.SimpleNamespace(
        model=CFG, task=AutoencodingConfig(), train=types.SimpleNamespace(init_from=""), finetune=FinetuneConfig()
    )
    options = types.SimpleNamespace(out=str(tmp_path / "ae"), checkpoint="latest", adapter=False, storage=None)
    assert modes.export(recipe, tmp_path, options) == 0 and asked == [True]
    assert "step 7" in capsys.readouterr().out
    scale = json.loads((tmp_path / "ae" / "config.json").read_text())["scaling_factor"]
    assert scale == pytest.approx(task.measured(grown(False))["scaling_factor"], rel=1e-6)
