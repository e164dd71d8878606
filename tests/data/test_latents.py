import json

import numpy as np
import pytest
from kills import killed_after
from PIL import Image

from jaxvram.data import autoencoders
from jaxvram.data.autoencoders import RandomAutoencoder
from jaxvram.data.images import ImageDataConfig, load, to_float, to_uint8
from jaxvram.data.prepare_images import prepare_latents
from jaxvram.errors import UserError

RNG = np.random.default_rng(0)


class Other(RandomAutoencoder):
    """Of larger numbers, as the autoencoders of the trade have them; unknown to jaxvram."""

    std = 0.5

    def __init__(self):
        super().__init__(seed=1)
        self.identity = {"name": "other", "fingerprint": "abc"}


class Dies(RandomAutoencoder):
    """Encodes `batches` batches and their mirror images, and no more."""

    def __init__(self, batches):
        super().__init__()
        self.left = 2 * batches

    def encode(self, images):
        if self.left == 0:
            raise RuntimeError("killed")
        self.left -= 1
        return super().encode(images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 images of two classes, of which two cannot be decoded, one is too small and one unreadable."""
    top = tmp_path_factory.mktemp("images")
    for c, name in enumerate(("hot", "cold")):
        (top / name).mkdir()
        for i in range(12 - c):
            coarse = RNG.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((30, 24), Image.Resampling.BICUBIC).save(top / name / f"{i:02d}.png")
    for damaged in ("cold/03.png", "hot/11.png"):
        raw = (top / damaged).read_bytes()
        (top / damaged).write_bytes(raw[: len(raw) // 2])
    Image.new("RGB", (9, 7)).save(top / "hot" / "tiny.png")
    (top / "cold" / "bad.png").write_bytes(b"")
    return top


def prepare(folder, out, autoencoder=None, image_size=16, **settings):
    return prepare_latents(
        folder, out, autoencoder or RandomAutoencoder(), image_size, **{"batch_size": 3, "shard_size": 5} | settings
    )


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    prepare(folder, out)
    return out


def source(cache, seed=0, **fields):
    return load(ImageDataConfig(name="latents", path=str(cache), **fields), seed)


def contents(out):
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_what_is_written(folder, tmp_path):
    out = tmp_path / "out"
    done = prepare(folder, out)
    assert (done.folder, done.images, done.shards) == (out, 21, 5)
    assert [fault.split(":")[0] for fault in done.skipped] == [
        "cold/bad.png",
        "hot/tiny.png",
        "cold/03.png",
        "hot/11.png",
    ]
    assert sorted(contents(out)) == sorted(
        ["meta.json", *(f"{kind}_{i:06d}.npy" for kind in ("latents", "labels") for i in range(5))]
    )
    files = [
        f for f in sorted(folder.glob("*/[0-9]*.png")) if f.parts[-2:] not in (("cold", "03.png"), ("hot", "11.png"))
    ]
    crops = [Image.open(f).resize((20, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16)) for f in files]
    images = to_float(np.stack([np.asarray(c) for c in crops]))
    autoencoder = RandomAutoencoder()
    got = np.concatenate([np.load(out / f"latents_{i:06d}.npy") for i in range(5)])
    assert got.shape == (21, 2, 2, 2, 2, 4) and got.dtype == np.float16
    for flip, seen in enumerate((images, images[:, :, ::-1])):
        mean, std = autoencoder.encode(seen)
        assert np.abs(got[:, flip, 0] - mean).max() < 0.005 and np.abs(got[:, flip, 1] - std).max() < 1e-4
    labels = np.concatenate([np.load(out / f"labels_{i:06d}.npy") for i in range(5)])
    assert labels.dtype == np.int32 and labels.tolist() == [0] * 10 + [1] * 11  # cold before hot
    meta = json.loads((out / "meta.json").read_text())
    assert meta["class_names"] == ["cold", "hot"] and meta["latent_shape"] == [2, 2, 4] and meta["image_size"] == 16
    assert meta["autoencoder"] == autoencoder.identity and meta["scale"] == autoencoder.scale
    assert [shard["images"] for shard in meta["shards"]] == [5, 5, 5, 5, 1]


def test_killed_and_started_again(folder, cache, tmp_path):
    out = tmp_path / "out"
    for batches, whole in ((1, 0), (3, 1), (2, 2), (0, 2), (4, 4)):  # two batches a shard
        kept = {f.name: f.stat().st_mtime_ns for f in out.glob("*.npy")}
        with pytest.raises(RuntimeError, match="killed"):
            prepare(folder, out, Dies(batches))
        assert len(list(out.glob("latents_*.npy"))) == whole and not list(out.glob("*.part"))
        assert kept.items() <= {f.name: f.stat().st_mtime_ns for f in out.glob("*.npy")}.items()
        if whole:
            with pytest.raises(UserError, match="not finished: run --mode=prepare again"):
                source(out)
    done = prepare(folder, out, Dies(1))  # what is left is one batch
    assert contents(out) == contents(cache) and done.images == 21 and len(done.skipped) == 4
    before = {f.name: f.stat().st_mtime_ns for f in out.glob("*.npy")}
    assert prepare(folder, out, Dies(0)) == done  # nothing to do
    assert before == {f.name: f.stat().st_mtime_ns for f in out.glob("*.npy")}
    (out / "labels_000002.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"latents_000002\.npy or its labels are missing or damaged"):
        source(out)
    prepare(folder, out)  # from there on again
    assert contents(out) == contents(cache)


def test_killed_between_a_shard_and_its_line(folder, cache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for stop in (3, 4, 5, 3, 6):  # after so many files have got their names: meta.json, then three a shard
        with killed_after(stop, monkeypatch):
            prepare(folder, out)
    prepare(folder, out)
    assert contents(out) == contents(cache)


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"image_size": 24}, "image_size, latent_shape"),
        ({"shard_size": 6}, "shard_size"),
        ({"autoencoder": Other()}, "autoencoder"),
    ],
)
def test_other_settings_are_refused(folder, cache, settings, differs):
    before = contents(cache)
    with pytest.raises(UserError, match=f"prepared from other images or settings \\({differs} differ"):
        prepare(folder, cache, **settings)
    assert contents(cache) == before
    prepare(folder, cache, batch_size=7)  # has no say in what is written
    assert contents(cache) == before


def test_other_images_are_refused(folder, cache, tmp_path):
    before = contents(cache)
    extra = folder / "hot" / "99.png"
    Image.new("RGB", (20, 20)).save(extra)
    with pytest.raises(UserError, match=r"other images or settings \(files_sha256, files differ\)"):
        prepare(folder, cache)
    extra.unlink()
    assert contents(cache) == before
    (tmp_path / "latents_000000.npy").touch()
    with pytest.raises(UserError, match=r"holds latents but no meta\.json"):
        prepare(folder, tmp_path)
    for damaged in ("{", "[]", '{"shards": [1]}'):
        (tmp_path / "meta.json").write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            prepare(folder, tmp_path)


def test_wrong_input(folder, tmp_path):
    with pytest.raises(UserError, match="must be a multiple of the autoencoder's 8 pixels"):
        prepare(folder, tmp_path / "out", image_size=20)
    with pytest.raises(UserError, match="must be positive"):
        prepare(folder, tmp_path / "out", shard_size=0)
    with pytest.raises(UserError, match="is not a folder"):
        prepare(folder / "nowhere", tmp_path / "out")
    lonely = tmp_path / "images" / "hot"
    lonely.mkdir(parents=True)
    (lonely / "11.png").write_bytes((folder / "hot" / "11.png").read_bytes())
    with pytest.raises(UserError, match=r"no image in .* can be decoded: hot/11\.png: OSError"):
        prepare(lonely.parent, tmp_path / "out")

    class Huge(RandomAutoencoder):
        def encode(self, images):
            return tuple(1e5 * x for x in super().encode(images))

    with pytest.raises(UserError, match="float16 cannot hold"):
        prepare(folder, tmp_path / "out2", Huge())


def test_a_source_of_latents(cache):
    of = source(cache, autoencoder="random")
    assert of.shape == (2, 2, 4) and of.example_size == 16 and of.class_names == ("cold", "hot")
    assert "latents of 16x16 images by the autoencoder 'random'" in of.description
    assert "19 images to train on, 2 held out, 2x2x4, 2 classes" in of.description
    assert of.identity["autoencoder"] == RandomAutoencoder().identity and of.identity["scale"] == 0.25
    assert json.loads(json.dumps(of.identity)) == of.identity


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_a_function_of_seed_split_n_and_row(cache, flip):
    of = source(cache, seed=3, flip=flip)
    for split in ("train", "val"):
        whole = of.batch(split, 4, 30)
        assert whole["images"].dtype == np.float32 and whole["labels"].dtype == np.int32
        for rows in (slice(7, 20), slice(2, None, 5)):
            part = source(cache, seed=3, flip=flip).batch(split, 4, 30, rows)
            assert all((part[key] == whole[key][rows]).all() for key in whole)
    other = source(cache, seed=4, flip=flip)
    assert (other.batch("val", 4, 30)["images"] == of.batch("val", 4, 30)["images"]).all()
    assert (other.batch("train", 4, 30)["images"] != of.batch("train", 4, 30)["images"]).any()


def test_latents_are_drawn_anew_and_both_ways_round(folder, tmp_path):
    prepare(folder, tmp_path / "out", Other())
    shards = np.concatenate([np.load(f) for f in sorted((tmp_path / "out").glob("latents_*.npy"))]).astype(np.float32)
    of = source(tmp_path / "out", seed=1, flip=True)
    drawn = np.concatenate([of.batch("train", n, 19)["images"] for n in range(30)]) / 0.25  # 30 epochs
    # the nearest mean tells which image was drawn, and whether mirrored
    means = shards[:, :, 0].reshape(42, 2, 2, 4)
    nearest = np.concatenate([((d[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1) for d in np.split(drawn, 30)])
    counts = np.bincount(nearest // 2, minlength=21)
    assert sorted(counts) == [0, 0] + [30] * 19  # two are held out
    assert 0.44 < (nearest % 2).mean() < 0.56
    noise = (drawn - means[nearest]) / 0.5
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert len(np.unique(noise.round(3), axis=0)) == len(noise)
    fixed = of.train_images(99)[0] / 0.25
    assert len(fixed) == 19 and all(((f - means) ** 2).sum((1, 2, 3)).argmin() % 2 == 0 for f in fixed)
    assert (of.train_images(5)[0] == source(tmp_path / "out", seed=9).train_images(5)[0]).all()


def test_pictures(cache, folder, tmp_path):
    of = source(cache)
    images, _ = of.train_images(99)
    pixels = of.to_pixels(images)
    assert pixels.shape == (19, 16, 16, 3) and pixels.dtype == np.uint8
    assert (pixels == to_uint8(RandomAutoencoder().decode(images / 0.25))).all()
    blocks = to_float(pixels).reshape(19, 2, 8, 2, 8, 3).mean((2, 4))
    encoded = np.concatenate([np.load(file)[:, 0, 0, ..., :3] for file in cache.glob("latents_*")]) / 8
    assert np.abs(blocks[:, None] - encoded).max((2, 3, 4)).min(1).max() < 0.05  # the images that went in, in blocks
    prepare(folder, tmp_path / "out", Other())
    unknown = source(tmp_path / "out")
    assert "not at hand, so pictures show the first three channels" in unknown.description
    latents_2x1x1x4 = np.array([[0, 3, -3, 9], [1.5, 30, -30, 9]], np.float32).reshape(2, 1, 1, 4)
    assert unknown.to_pixels(latents_2x1x1x4).reshape(2, 3).tolist() == [[128, 255, 0], [191, 255, 0]]


def test_latents_of_another_autoencoder(cache, folder, tmp_path, monkeypatch):
    prepare(folder, tmp_path / "out", Other())
    with pytest.raises(
        UserError, match=r"of the autoencoder 'other' \(fingerprint abc\), but .* asks for 'random' \(fing"
    ):
        source(tmp_path / "out", autoencoder="random")
    with pytest.raises(UserError, match="the autoencoder 'randm' is unknown, and no folder; did you mean 'random'"):
        source(cache, autoencoder="randm")
    other_numbers = {"random": lambda: RandomAutoencoder(seed=5)}  # of the same name
    monkeypatch.setattr(autoencoders, "AUTOENCODERS", other_numbers)
    with pytest.raises(UserError, match="holds latents of the autoencoder 'random'"):
        source(cache, autoencoder="random")
    assert "not at hand" in source(cache).description


def test_no_cache(folder, cache, tmp_path):
    with pytest.raises(UserError, match=r"has no meta\.json: data\.name=latents reads what --mode=prepare made"):
        source(folder)
    meta = json.loads((cache / "meta.json").read_text())
    for changed, message in (
        ({"version": 1}, "of version 1"),
        ({"shards": 3}, "damaged"),
        ({"autoencoder": 0}, "damaged"),
    ):
        (tmp_path / "meta.json").write_text(json.dumps(meta | changed))
        with pytest.raises(UserError, match=message):
            source(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta)[:-9])
    with pytest.raises(UserError, match="damaged"):
        source(tmp_path)


def test_a_folder_with_a_split_of_its_own(folder, tmp_path):
    for split, names in (("train", ("hot", "cold")), ("val", ("hot",))):
        for name in names:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(3, 6):
                file = tmp_path / "images" / split / name / f"{i}.png"
                file.write_bytes((folder / name / f"{i:02d}.png").read_bytes())
    prepare(tmp_path / "images", tmp_path / "out")
    of = source(tmp_path / "out")
    assert "5 images to train on, 3 held out" in of.description and set(of.val_images(9)[1]) == {1}


def test_the_random_autoencoder():
    autoencoder = RandomAutoencoder()
    rows = autoencoder._rows_4xP
    assert np.abs(rows @ rows.T - np.eye(4)).max() < 1e-6
    images = RNG.uniform(-0.5, 0.5, (3, 16, 24, 3)).astype(np.float32)
    mean, std = autoencoder.encode(images)
    assert mean.shape == std.shape == (3, 2, 3, 4) and (std == np.float32(0.05)).all()
    blocks = images.reshape(3, 2, 8, 3, 8, 3).mean((2, 4))
    assert np.allclose(mean[..., :3], 8 * blocks, atol=1e-5)
    decoded = autoencoder.decode(mean)
    assert decoded.shape == images.shape and np.allclose(autoencoder.encode(decoded)[0], mean, atol=1e-4)
    assert np.allclose(decoded.reshape(3, 2, 8, 3, 8, 3).mean((2, 4)), blocks, atol=1e-5)
    assert np.abs(autoencoder.decode(100 * mean)).max() == 1
    assert RandomAutoencoder(1).identity != autoencoder.identity == RandomAutoencoder().identity


def test_the_scale_suits_photographs():
    from sklearn.datasets import load_sample_images

    photos = to_float(np.stack([photo[:424, :640] for photo in load_sample_images().images]))
    latents_BxhxwxC = RandomAutoencoder().encode(photos)[0] * RandomAutoencoder.scale
    assert 0.7 < latents_BxhxwxC.std() < 1.4
