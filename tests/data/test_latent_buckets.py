"""A folder of pictures of many proportions: cut to a few shapes, cached, and read in batches of one shape each."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxvram.data.autoencoders import RandomAutoencoder
from jaxvram.data.features import prepare_features
from jaxvram.data.images import ImageDataConfig, load
from jaxvram.data.prepare_images import prepare_latents
from jaxvram.errors import UserError

TALL, BROAD, SQUARE = (80, 48), (48, 80), (64, 64)  # the shapes nearest to 3:2, 2:3 and 1:1, of 64 pixels squared
SIZES = {"tall": (120, 80), "broad": (50, 83), "square": (90, 88)}  # height, width
SHAPES = {"tall": TALL, "broad": BROAD, "square": SQUARE}
COUNTS = {"tall": 11, "broad": 6, "square": 3}


def kind_of(i):
    return [kind for turn in range(20) for kind in COUNTS if turn < COUNTS[kind]][i]


def colour(i):
    return (10 * (i % 20) + 20, 40 + 60 * (i // 20), 200 - 9 * (i % 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures of one colour each, mixed, that are called so; and one that is too small for its shape."""
    top = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        Image.new("RGB", SIZES[kind_of(i)][::-1], colour(i)).save(top / f"{i:02d}.png")
        (top / f"{i:02d}.txt").write_text(f"number {i}, {kind_of(i)}")
    Image.new("RGB", (45, 70)).save(top / "small.png")
    (top / "small.txt").write_text("small")
    return top


def prepare(folder, out, autoencoder=None, aspects=3, **settings):
    settings = {"batch_size": 2, "shard_size": 4} | settings
    return prepare_latents(folder, out, autoencoder or RandomAutoencoder(), 64, aspects=aspects, **settings)


class OfLengths:
    """Features of a caption: its number, as often as it has letters."""

    length, width = 20, 2

    def __init__(self):
        self.identity = {"name": "lengths", "fingerprint": "1"}

    def check(self, captions):
        pass

    def encode(self, captions):
        rows = [float(c.split()[1].strip(",")) if c else -1 for c in captions]
        return np.tile(np.float16(rows)[:, None, None], (1, 20, 2)), np.int32([len(c) or 1 for c in captions])


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    prepare(folder, out)
    prepare_features(out, OfLengths(), "nowhere")
    return out


def source(cache, seed=0, **fields):
    return load(ImageDataConfig(name="latents", path=str(cache), **{"val_fraction": 0.2} | fields), seed)


def numbers(of, batch):
    """Which picture each is, by its colour."""
    pixels = of.to_pixels(batch["images"]).mean((1, 2))
    return np.abs(pixels[:, None] - np.array([colour(i) for i in range(20)])).sum(-1).argmin(1)


def test_what_is_written(folder, cache, tmp_path):
    done = prepare(folder, tmp_path / "out")
    assert done.skipped == ("small.png: only 45x70 pixels, and its bucket has 48x80",)
    assert done.shapes == {BROAD: 6, SQUARE: 3, TALL: 11} and done.images == 20 and done.shards == 2 + 1 + 3
    shards = json.loads((tmp_path / "out" / "meta.json").read_text())["shards"]
    for i, shard in enumerate(shards):
        latents = np.load(tmp_path / "out" / shard["latents"])
        assert latents.shape[1:] == (1, 2, *(side // 8 for side in shard["shape"]), 4)
        kinds = {c.split()[2] for c in json.loads((tmp_path / "out" / shard["captions"]).read_text())}
        (kind,) = kinds  # one shape
        sizes = np.load(tmp_path / "out" / f"sizes_{i:06d}.npy")
        assert sizes.dtype == np.int32 and sizes.tolist() == [list(SIZES[kind])] * shard["images"]


def test_the_best_of_few_shapes(folder, tmp_path):
    """Of two, the squares are cut to one that is left; of one, all but those that are too small for it."""
    assert prepare(folder, tmp_path / "two", aspects=2).shapes == {BROAD: 6, TALL: 11 + 3}
    done = prepare(folder, tmp_path / "many", aspects=30)
    assert done.shapes == {BROAD: 6, SQUARE: 3, TALL: 11}  # none wants another
    with pytest.raises(UserError, match="--aspects=-1 must be 1 or more"):
        prepare(folder, tmp_path / "out", aspects=-1)
    with pytest.raises(UserError, match="--aspects is for folders of pictures; shapes are drawn as squares"):
        prepare("shapes", tmp_path / "out")


def test_a_folder_of_which_nothing_is_left(folder, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (45, 70)).save(tmp_path / "in" / "small.png")
    with pytest.raises(
        UserError, match=r"none of the 1 images .* is of use: small\.png: only 45x70 pixels, and its buck"
    ):
        prepare(tmp_path / "in", tmp_path / "out")


def test_a_picture_that_lies_on_its_side(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        exif = Image.Exif()
        exif[0x0112] = 6  # turn it by 90 degrees
        Image.new("RGB", (90, 60), "red").save(tmp_path / "in" / f"{i}.jpg", exif=exif)
    assert prepare(tmp_path / "in", tmp_path / "out").shapes == {TALL: 4}
    assert np.load(tmp_path / "out" / "sizes_000000.npy").tolist() == [[90, 60]] * 4


def test_a_folder_with_a_split_of_its_own(tmp_path):
    """The two shapes of each split; what is held out stays so, however they are sorted."""
    for split, count in (("train", 6), ("val", 4)):
        (tmp_path / "in" / split).mkdir(parents=True)
        for i in range(count):
            kind, number = ("tall", "broad")[i % 2], i + (0 if split == "train" else 10)
            Image.new("RGB", SIZES[kind][::-1], colour(number)).save(tmp_path / "in" / split / f"{i}.png")
    done = prepare(tmp_path / "in", tmp_path / "out", aspects=2)
    assert done.shapes == {BROAD: 5, TALL: 5} and done.shards == 4
    of = source(tmp_path / "out")
    for split, expected in (("train", {*range(6)}), ("val", {*range(10, 14)})):
        batches = [of.batch(split, n, 2) for n in range(6)]
        assert {int(i) for batch in batches for i in numbers(of, batch)} == expected
        shapes = [batch["images"].shape for batch in batches]
        assert len(set(shapes)) == 2 and shapes.count(shapes[0]) == 3
    flipped = source(tmp_path / "out", flip=True)  # without captions there are mirrored ones
    assert flipped.batch("train", 0, 3)["images"].shape[1:] in of.shapes


class Dies(RandomAutoencoder):
    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def encode(self, images):
        if self.left == 0:
            raise RuntimeError("killed")
        self.left -= 1
        return super().encode(images)


def test_killed_and_started_again(folder, cache, tmp_path):
    for batches in (1, 3, 2, 5):
        with pytest.raises(RuntimeError, match="killed"):
            prepare(folder, tmp_path, Dies(batches))
    prepare(folder, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (cache / file.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 6 * 4 + 1
    for aspects in (0, 2):
        with pytest.raises(UserError, match=r"other images or settings \(.*shapes differ"):
            prepare(folder, tmp_path, aspects=aspects)


def test_batches_of_one_shape(cache):
    of = source(cache, seed=3)
    assert of.shape == (8, 8, 4) and of.shapes == [(6, 10, 4), (8, 8, 4), (10, 6, 4)]
    assert of.description.endswith("in shapes of 6x10 (5), 8x8 (2), 10x6 (9)")
    for split in ("train", "val"):
        for n in range(9):
            batch, captions = of.batch(split, n, 3), of.captions(split, n, 3)
            assert batch["images"].shape[0] == 3 and batch["images"].shape[1:] in of.shapes
            kinds = {c.split()[2] for c in captions}
            (kind,), (h, w) = kinds, batch["images"].shape[1:3]  # of one shape alone
            assert (8 * h, 8 * w) == SHAPES[kind]
            assert batch["size"].tolist() == [[*SIZES[kind]]] * 3 and batch["size"].dtype == np.float32
            assert np.allclose(batch["aspect"], h / w) and batch["aspect"].dtype == np.float32
            seen = numbers(of, batch)
            assert [f"number {i}," in c for i, c in zip(seen, captions, strict=True)] == [True] * 3
            assert batch["context"][:, 0, 0].tolist() == seen.tolist()
            assert batch["length"].tolist() == [len(c) for c in captions]


def test_a_batch_is_a_function_of_seed_split_n_and_row(cache):
    for split in ("train", "val"):
        for n in (0, 3, 10**7):
            whole = source(cache, seed=5).batch(split, n, 7)
            for rows in (slice(2, 5), slice(1, None, 3)):
                part = source(cache, seed=5).batch(split, n, 7, rows)
                assert all((part[key] == whole[key][rows]).all() for key in whole)
    draw = lambda seed, split: np.concatenate(
        [numbers(of := source(cache, seed), of.batch(split, n, 3)) for n in range(9)]
    )
    assert (draw(5, "train") != draw(6, "train")).any() and (draw(5, "val") == draw(6, "val")).all()


def test_every_image_once_an_epoch_as_nearly_as_may_be(cache):
    """In as many epochs as a batch has images, exactly as often; in each epoch, shapes in proportion."""
    of, B = source(cache, seed=1), 4
    train = 16
    seen = np.array([numbers(of, of.batch("train", n, B)) for n in range(train)])
    counts = np.bincount(seen.ravel(), minlength=20)
    assert sorted(counts) == [0] * 4 + [B] * train
    for epoch in np.split(seen, B):  # 4 batches: 9/16, 5/16 and 2/16 of them, by turns
        kinds = [kind_of(i) for i in epoch[:, 0]]
        assert 2 <= kinds.count("tall") <= 3 and 1 <= kinds.count("broad") <= 2 and kinds.count("square") <= 1
    talls = [i for batch in seen for i in batch if kind_of(i) == "tall"]
    assert all(len(set(talls[i : i + 9])) == 9 for i in range(0, len(talls), 9))  # each tall one before any again


def test_first_images_are_of_one_shape(cache):
    of = source(cache)
    images, _ = of.train_images(99)
    assert images.shape == (9, 10, 6, 4) and of.train_images(2)[0].shape == (2, 10, 6, 4)


def test_a_cache_of_squares_tells_their_size(folder, tmp_path):
    prepare(folder, tmp_path, aspects=0)
    batch = source(tmp_path).batch("train", 0, 3)
    assert batch["size"].tolist() == [[64, 64]] * 3 and batch["aspect"].tolist() == [1, 1, 1]
    assert not hasattr(source(tmp_path), "shapes")
