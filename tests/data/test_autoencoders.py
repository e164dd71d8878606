"""Autoencoders by name and in folders: what they give, that they come in chunks, and that no weight stays on the device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import quick

from jaxvram.convert import autoencoder as convert
from jaxvram.data import autoencoders
from jaxvram.data.autoencoders import RandomAutoencoder, load_autoencoder
from jaxvram.errors import UserError
from jaxvram.models.autoencoder import AutoencoderConfig, AutoencoderKL

pytestmark = pytest.mark.usefixtures("quick_compile")

CFG = AutoencoderConfig(
    image_size=8, width=4, multipliers=(1, 2), res_blocks=1, groups=2, remat="none", dtype="float32"
)
RNG = np.random.default_rng(0)


@functools.cache
def random_params(cfg=CFG, seed=0):
    x = np.zeros((1, cfg.image_size, cfg.image_size, cfg.channels), np.float32)
    shapes = jax.eval_shape(lambda: AutoencoderKL(cfg).init(jax.random.key(0), x)["params"])
    random = np.random.RandomState(seed)
    return {"autoencoder": jax.tree.map(lambda s: random.normal(0, 0.3, s.shape).astype(s.dtype), shapes)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("autoencoder") / "model"
    convert.save(random_params(), CFG, path, scaling_factor=0.25)
    return path


def images(count, side=8):
    return RNG.uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


def test_of_a_folder(folder):
    """Moments and images are the model's; images are cut at -1 and 1; nothing is multiplied by the scale."""
    of, x, params = load_autoencoder(str(folder)), images(3), random_params()["autoencoder"]
    assert (of.downsample, of.channels, of.scale, of.path) == (2, 4, 0.25, str(folder.resolve()))
    mean, std = of.encode(x)
    apply = quick.jit(lambda method, x: AutoencoderKL(CFG).apply({"params": params}, x, method=method), static_argnums=0)
    want_mean, want_logvar = apply("encode", x)
    assert quick.relative_error(mean, want_mean) < 1e-5 and quick.relative_error(std, np.exp(want_logvar / 2)) < 1e-5
    out = of.decode(20 * mean)
    assert isinstance(out, np.ndarray) and out.dtype == mean.dtype == np.float32 and np.abs(out).max() == 1
    assert quick.relative_error(out, np.clip(apply("decode", 20 * mean), -1, 1)) < 1e-5


def test_in_chunks(folder, monkeypatch):
    """Five images in chunks of two are as one by one, and never more than two go through."""
    seen, whole = [], autoencoders._decode
    monkeypatch.setattr(autoencoders, "_decode", lambda cfg, params, x: seen.append(x.shape) or whole(cfg, params, x))
    of, x = load_autoencoder(folder), images(5)
    monkeypatch.setattr(autoencoders, "PIXELS", 2 * 8 * 8)
    mean, std = of.encode(x)
    ones = [of.encode(x[i : i + 1]) for i in range(5)]
    assert quick.relative_error(mean, np.concatenate([one[0] for one in ones])) < 1e-5
    assert quick.relative_error(std, np.concatenate([one[1] for one in ones])) < 1e-5
    out = of.decode(mean)
    assert out.shape == x.shape and seen == [(2, 4, 4, 4)]
    assert quick.relative_error(out, np.concatenate([of.decode(mean[i : i + 1]) for i in range(5)])) < 1e-5
    assert [autoencoders.at_once(side * side) for side in (4, 8, 1024)] == [8, 2, 1]


def test_no_weight_stays_on_the_device(folder):
    of = load_autoencoder(folder)
    of.decode(of.encode(images(1))[0])  # compiled: constants of a program stay, and are few
    before = sum(x.nbytes for x in jax.live_arrays())
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(of._params))
    of.decode(of.encode(images(2))[0])
    assert sum(x.nbytes for x in jax.live_arrays()) == before


def test_identities(folder, tmp_path):
    """The same numbers, wherever they lie and whatever the scale, are the same; one other number is another autoencoder."""
    of = load_autoencoder(folder)
    assert of.identity["name"] == "AutoencoderKL" and len(of.identity["fingerprint"]) == 12
    convert.save(random_params(), CFG, tmp_path / "moved", scaling_factor=0.5)
    assert load_autoencoder(tmp_path / "moved").identity == of.identity
    other = jax.tree.map(np.copy, random_params())
    other["autoencoder"]["decoder"]["mid"]["resnet_0"]["norm1"]["bias"][-1] += 1e-3
    convert.save(other, CFG, tmp_path / "other", scaling_factor=0.25)
    assert load_autoencoder(tmp_path / "other").identity != of.identity
    random = load_autoencoder("random")
    assert random.identity == RandomAutoencoder().identity and random.path == "random"


def test_what_is_none(tmp_path):
    with pytest.raises(UserError, match=r"the autoencoder 'randm' is unknown, and no folder; did you mean 'random'"):
        load_autoencoder("randm")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_autoencoder(tmp_path)
    grey = dataclasses.replace(CFG, channels=1)
    convert.save(random_params(grey), grey, tmp_path / "grey", scaling_factor=1.0)
    with pytest.raises(UserError, match="is for images of 1 channels; it must be for 3"):
        load_autoencoder(tmp_path / "grey")


def test_what_a_plan_compiles(folder, tmp_path):
    """As many images as go through at once; config.json is enough."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    programs = autoencoders.programs(tmp_path, 32)
    images, latents = (256, 32, 32, 3), (256, 16, 16, 4)
    for name, inside, out in (("encode", images, (256, 2, 16, 16, 4)), ("decode", latents, images)):
        function, (params, x), donated = programs[name]
        assert x.shape == inside and jax.eval_shape(function, params, x).shape == out and donated == ()
    with pytest.raises(UserError, match="image_size=33 must be a multiple of the autoencoder's 2 pixels"):
        autoencoders.programs(folder, 33)
