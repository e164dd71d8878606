import time

import numpy as np
import pytest

from jaxvram.data import shapes
from jaxvram.data.images import ImageDataConfig, load, to_uint8
from jaxvram.errors import UserError


def source(size=32, seed=0, **fields):
    return load(ImageDataConfig(name="shapes", image_size=size, **fields), seed)


def noisy(images, std):
    return images + std * np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)


def test_what_a_source_says_of_itself():
    of = source(24)
    assert of.shape == (24, 24, 3) and of.example_size == 24 * 24 * 3 and of.num_classes == 16
    assert of.class_names[0] == "red circle" and len(set(of.class_names)) == 16
    assert "24x24x3, 16 classes" in of.description and of.identity == source(24, 5).identity != source(32).identity


def test_an_example_is_a_function_of_seed_split_and_number():
    of = source(16)
    whole = of.batch("train", 3, 100)
    assert whole["images"].dtype == np.float32 and whole["labels"].dtype == np.int32
    for rows in (slice(20, 60), slice(3, None, 17), slice(9, 9)):
        part = source(16).batch("train", 3, 100, rows)
        assert all((whole[key][rows] == part[key]).all() for key in whole)
        assert of.captions("train", 3, 100, rows) == of.captions("train", 3, 100)[rows]
    halves = [of.batch("train", n, 50)["images"] for n in (6, 7)]
    assert (np.concatenate(halves) == whole["images"]).all()
    different = [
        source(16, seed).batch(*where, 100) for seed, *where in ((1, "train", 3), (0, "train", 4), (0, "val", 3))
    ]
    assert all((other["labels"] != whole["labels"]).any() for other in different)
    assert (source(16, 8).batch("val", 3, 100)["images"] == different[-1]["images"]).all()
    assert (of.train_images(9)[0] == source(16, 8).train_images(9)[0]).all() and len(of.val_images(7)[1]) == 7


def test_everything_is_drawn_equally_often_and_whole():
    of = source(16)
    images, labels = of.train_images(6400)
    assert np.abs(np.bincount(labels, minlength=16) - 400).max() < 100
    assert np.abs(np.bincount(of.positions("train", 0, 6400), minlength=9) - 711).max() < 150
    assert images.min() >= -1 and images.max() <= 1
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    strength = np.linalg.norm(shapes._PALETTE_Kx3, axis=-1)[labels // 4][:, None]
    assert (
        np.linalg.norm(border - shapes._BACKGROUND_3, axis=-1) / strength
    ).max() < 0.75  # tips alone, nothing cut off


@pytest.mark.parametrize("shape", range(4))
def test_coverage_equals_counting_sub_pixels(shape):
    """An independent drawing: 16 x 16 points a pixel, in or out of the polygon or circle."""
    size, (x, y), extent = 24, (11.3, 12.8), 5.2
    fine = (np.arange(16 * size) + 0.5) / 16
    dx, dy = fine[None, :] - x, fine[:, None] - y
    base = 1.1 * extent
    inside = (
        dx**2 + dy**2 < extent**2,
        (abs(dx) < 0.88 * extent) & (abs(dy) < 0.88 * extent),
        (dy < base / 3**0.5) & (3**0.5 * abs(dx) < dy + 2 * base / 3**0.5),
        (abs(dx) < extent) & (abs(dy) < extent / 3) | (abs(dx) < extent / 3) & (abs(dy) < extent),
    )[shape]
    counted = inside.reshape(size, 16, size, 16).mean((1, 3))
    drawn = shapes.coverage([shape], [(x, y)], [extent], size)[0]
    assert np.abs(drawn - counted).max() < 0.2 and np.abs(drawn - counted).mean() < 0.005
    assert drawn.sum() == pytest.approx(shapes._AREA[shape] * extent**2, rel=0.02)
    middle = np.arange(size) + 0.5
    assert drawn.sum(0) @ middle / drawn.sum() == pytest.approx(x, abs=0.05)
    assert drawn.sum(1) @ middle / drawn.sum() == pytest.approx(y, abs=0.05)


def test_labels_and_captions_say_what_is_drawn():
    of = source(64)
    images, labels = of.batch("train", 0, 300).values()
    captions = of.captions("train", 0, 300)
    pixels = of.to_pixels(images)
    for picture, label, text in zip(pixels, labels, captions, strict=True):
        assert of.class_names[label] in text
        ys, xs = np.nonzero(np.abs(picture.astype(int) - shapes.BACKGROUND).max(-1) > 60)
        middle = picture[int(ys.mean()), int(xs.mean())]
        assert tuple(middle) == shapes.COLOURS[text.split()[1]]
        row, column = (("top", "", "bottom")[int(3 * ys.mean() / 64)], ("left", "", "right")[int(3 * xs.mean() / 64)])
        assert text.endswith(f"the {(row + ' ' + column).strip() or 'centre'}")
    assert "a red circle in the centre" == shapes.caption(0, 0, 4)
    assert "a blue cross at the bottom left" == shapes.caption(2, 3, 6)


@pytest.mark.parametrize("size", [16, 24, 32, 64])
def test_the_recogniser_is_right(size):
    of, count = source(size, seed=2), 640 if size == 64 else 1600
    images, labels = of.batch("train", 1, count).values()
    positions = of.positions("train", 1, count)
    for seen, floor in ((images, 0.995), (to_uint8(images), 0.995), (noisy(images, 0.1), 0.95)):
        right = of.score(seen, labels, positions)
        assert set(right) == {"colour", "shape", "colour_and_shape", "position"}
        assert min(right.values()) >= floor, right
    assert set(of.score(images, labels)) == {"colour", "shape", "colour_and_shape"}


def test_the_recogniser_tells_wrong_from_right():
    images, labels = source(32).train_images(400)
    colour_off, shape_off = (labels + 4) % 16, labels // 4 * 4 + (labels + 1) % 4
    assert shapes.score(images, colour_off) == {"colour": 0, "shape": 1, "colour_and_shape": 0}
    assert shapes.score(images, shape_off) == {"colour": 1, "shape": 0, "colour_and_shape": 0}
    half = np.where(np.arange(400) < 100, colour_off, labels)
    assert shapes.score(images, half)["colour_and_shape"] == 0.75
    assert shapes.recognise(images[:0])["shape"].shape == (0,)


@pytest.mark.parametrize("size", [16, 32])
def test_what_is_no_single_shape_counts_as_wrong(size):
    rng = np.random.default_rng(0)
    clean, labels = source(size).train_images(256)
    red = np.zeros((32, size, size, 3), np.uint8) + np.array(shapes.COLOURS["red"], np.uint8)
    white = np.where(
        shapes.coverage(labels % 4, np.full((256, 2), size / 2), np.full(256, size / 5), size) > 0.5, 1, -0.7
    )
    for images in (
        rng.standard_normal((256, size, size, 3)),
        rng.integers(0, 256, (256, size, size, 3), dtype=np.uint8),
        noisy(np.full_like(clean, shapes._BACKGROUND_3), 0.3),
        np.full_like(clean, shapes._BACKGROUND_3),
        np.full_like(clean, np.nan),
        red,
        np.repeat(white[..., None], 3, axis=-1),  # a shape, in no colour of ours
    ):
        seen = shapes.recognise(images)
        assert seen["confidence"].max() < shapes.CONFIDENT
        assert set(shapes.score(images, seen["colour"] * 4 + seen["shape"]).values()) == {0}
    two = np.maximum(clean, np.roll(clean[::-1], size // 2, axis=1))  # two shapes in one picture
    assert shapes.score(two, labels)["shape"] < 0.2
    split = clean.copy()
    split[:, :, : size // 2] = clean[(labels != labels[0]).argmax(), :, : size // 2]
    assert shapes.score(split, labels)["colour_and_shape"] < 0.5


def test_drawing_is_fast():
    of = source(32)
    times = []
    for n in range(10):
        start = time.perf_counter()
        of.batch("train", n, 64)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01


def test_pairs_held_out_of_training():
    """Their colours and shapes are trained on in other pairs; evaluation has all pairs, and they are what is asked for."""
    of = source(16, 3, held_out_pairs=4)
    held = {0, 5, 10, 15}  # red circle, green square, blue triangle, yellow cross
    train, val = (of.batch(split, 0, 600)["labels"] for split in ("train", "val"))
    assert set(train) == set(range(16)) - held and set(val) == set(range(16))
    assert min(np.bincount(train)[sorted(set(train))]) > 20
    captions, labels = of.unseen(40)
    assert set(labels) == held and captions[:2] == ["a red circle at the top left", "a green square at the top left"]
    assert {caption.split(" the ")[1] for caption in captions} == set(shapes.POSITIONS)
    recognised = [f"a {shapes.CLASS_NAMES[label]} " for label in labels]
    assert all(caption.startswith(start) for caption, start in zip(captions, recognised, strict=True))
    shown = of.captions("train", 0, 600)
    assert all(f" {shapes.CLASS_NAMES[label]} " in caption for label, caption in zip(train, shown, strict=True))
    assert of.identity != source(16, 3).identity
    assert set(source(16, 3).unseen(144)[1]) == set(range(16))
    for field, most in (("pairs", 8), ("captions", 72)):
        with pytest.raises(UserError, match=f"held_out_{field}={most + 1} is not in 0 to {most}"):
            source(16, 3, **{f"held_out_{field}": most + 1})


def test_captions_held_out_of_training():
    """Colour, shape and position of which any two are seen together in training, and the three never."""
    of = source(16, 3, held_out_captions=32)
    asked, labels = of.unseen(32)
    assert len(set(asked)) == 32 and set(labels) == set(range(16))
    train = set(of.captions("train", 0, 4000))
    assert len(train) == 144 - 32 and not train & set(asked)
    assert set(of.captions("val", 0, 4000)) == train | set(asked)
    batch = of.batch("train", 0, 50)
    seen = shapes.recognise(batch["images"])
    said = [shapes.caption(*c) for c in zip(seen["colour"], seen["shape"], seen["position"], strict=True)]
    assert sum(a == b for a, b in zip(said, of.captions("train", 0, 50), strict=True)) >= 48
