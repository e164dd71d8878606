import numpy as np
import pytest
from PIL import Image

from jaxvram.data import image_folder
from jaxvram.data.image_folder import centre_crop, listing, try_crop
from jaxvram.data.images import ImageDataConfig, load, to_uint8
from jaxvram.errors import UserError

RNG = np.random.default_rng(0)


def picture(width=24, height=20, channels=3):
    """Smooth noise, so that resizing keeps something of it."""
    coarse = RNG.integers(0, 256, (4, 4, channels), dtype=np.uint8).squeeze()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def fill(folder, suffixes):
    """Three classes of ten images of various sizes."""
    for name in ("cat", "dog", "ant"):
        (folder / name / "deeper").mkdir(parents=True)
        for i in range(10):
            place = folder / name / ("deeper" if i == 3 else ".")
            picture(20 + i, 30 - i).save(place / f"{i}.{suffixes[i % len(suffixes)]}")


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "set", ("png", "JPG", "webp", "bmp", "ppm"))
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "cat" / "._0.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / "set" / "empty").mkdir()
    return tmp_path / "set"


@pytest.fixture
def pngs(tmp_path):
    fill(tmp_path / "pngs", ("png",))
    return tmp_path / "pngs"


def source(folder, seed=0, **fields):
    return load(ImageDataConfig(name="folder", path=str(folder), **{"image_size": 16} | fields), seed)


def damage(png):
    """Keep the header, which says size and mode, and lose half of the rest."""
    raw = png.read_bytes()
    png.write_bytes(raw[: len(raw) // 2])


def test_classes_and_files(folder):
    of = source(folder)
    assert of.class_names == ("ant", "cat", "dog") and of.shape == (16, 16, 3) and of.skipped == []
    assert "27 images to train on, 3 held out, 16x16x3, 3 classes" in of.description and "skipped" not in of.description
    images, labels = of.train_images(99)
    assert images.shape == (27, 16, 16, 3) and labels.dtype == np.int32 and np.bincount(labels).tolist() == [9, 9, 9]
    expected = {}
    for label, name in enumerate(of.class_names):
        for file in (folder / name).rglob("[0-9]*.*"):
            expected[np.asarray(centre_crop(Image.open(file).convert("RGB"), (16, 16))).tobytes()] = label
    assert len(expected) == 30
    for some_images, some_labels in ((images, labels), of.val_images(99)):
        assert [expected[pixels.tobytes()] for pixels in to_uint8(some_images)] == some_labels.tolist()


def test_a_batch_is_a_function_of_its_number_also_when_images_are_kept(folder, monkeypatch):
    of = source(folder, seed=2, flip=True)
    first, again = of.batch("train", 1, 40), of.batch("train", 1, 40)  # decoded, then kept
    monkeypatch.setattr(image_folder, "KEPT_BYTES", 0)
    decoded = source(folder, seed=2, flip=True).batch("train", 1, 40)
    assert all((first[key] == again[key]).all() and (first[key] == decoded[key]).all() for key in first)
    part = source(folder, seed=2, flip=True).batch("train", 1, 40, slice(3, 30, 4))
    assert all((first[key][3:30:4] == part[key]).all() for key in first)
    seen = np.concatenate([source(folder, seed=2).batch("train", n, 9)["images"] for n in range(3)])
    assert len({image.tobytes() for image in seen}) == 27


def test_crop_by_other_means():
    """Halving and cutting in plain numpy, where the sizes need no bicubic step."""
    pixels = RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    half = lambda x: np.floor(x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, 3).mean((1, 3)) + 0.5)
    expected = half(half(pixels))[:, 4:20]
    got = np.asarray(centre_crop(Image.fromarray(pixels), (16, 16)), float)
    # Pillow rounds once more, between the two directions
    assert got.shape == (16, 16, 3) and np.abs(got - expected).max() <= 2 and np.abs(got - expected).mean() < 1


@pytest.mark.parametrize(
    ("width", "height", "halved", "scaled", "corner"),
    [
        (100, 70, (50, 35), (29, 20), (4, 0)),  # 70 -> 35, which is below 2 * 20, then 50 * 20 / 35 = 28.6
        (33, 95, (33, 95), (20, 58), (0, 19)),  # 33 is below 2 * 20
        (161, 83, (40, 20), (40, 20), (10, 0)),  # 83 -> 41 -> 20
        (12, 30, (12, 30), (20, 50), (0, 15)),  # enlarged
    ],
)
def test_crop_steps(width, height, halved, scaled, corner):
    image = picture(width, height)
    steps = image
    while steps.size != halved:
        steps = steps.resize((steps.width // 2, steps.height // 2), Image.BOX)
    steps = np.asarray(steps.resize(scaled, Image.BICUBIC))
    x, y = corner
    assert (np.asarray(centre_crop(image, (20, 20))) == steps[y : y + 20, x : x + 20]).all()


def test_the_middle_of_another_shape():
    y, x = np.mgrid[:64, :192]
    image = Image.fromarray(np.stack([4 * y, x, 0 * x], -1).astype(np.uint8))
    for shape in ((32, 64), (60, 20), (64, 192), (16, 48)):
        crop = np.asarray(centre_crop(image, shape), np.float32)
        assert crop.shape == (*shape, 3)
        scale = max(shape[0] / 64, shape[1] / 192)
        assert np.allclose(crop.mean((0, 1))[:2], [4 * 31.5, 95.5], atol=3)  # the middle
        span = crop[0, -1, 1] - crop[0, 0, 1]
        assert np.isclose(span, (shape[1] - 1) / scale, atol=4)  # as wide as it was
    assert np.array_equal(centre_crop(image, (64, 192)), image)


def crop_of(image, tmp_path, suffix="png", **options):
    image.save(tmp_path / f"image.{suffix}", **options)
    return try_crop(tmp_path / f"image.{suffix}", (16, 16))


def test_every_mode_becomes_rgb(tmp_path):
    grey = picture(16, 16, channels=1)
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=-1)
    assert (crop_of(grey, tmp_path) == expected).all()
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert (crop_of(sixteen, tmp_path) == expected).all()
    assert (crop_of(grey.convert("P"), tmp_path) == expected).all()
    assert np.abs(crop_of(grey.convert("CMYK"), tmp_path, "jpg", quality=100).astype(int) - expected).max() < 12
    colours = picture(16, 16)
    see_through = colours.copy()
    see_through.putalpha(Image.fromarray(np.repeat(np.uint8([[0] * 8 + [255] * 8]), 16, axis=0)))
    for image, options in ((see_through, {}), (see_through.quantize(256), {})):
        got = crop_of(image, tmp_path, **options)
        assert (got[:, :8] == 255).all() and np.abs(got[:, 8:].astype(int) - np.asarray(colours)[:, 8:]).max() < 60


def test_exif_turns_the_image_upright(tmp_path):
    image = picture(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = np.rot90(crop_of(image, tmp_path), -1)
    assert (crop_of(image, tmp_path, exif=exif) == turned).all() and (turned != np.asarray(image)).any()


def test_bad_files_are_left_out_and_named(folder):
    (folder / "cat" / "0.png").write_bytes(b"not a PNG")
    (folder / "cat" / "1.JPG").write_bytes(b"")
    picture(7, 40).save(folder / "dog" / "2.webp")
    picture(8, 8).save(folder / "dog" / "0.png")  # half of 16: still of use
    picture().save(folder / "stray.png")
    of = source(folder)
    assert len(of.skipped) == 4 and "24 images to train on, 3 held out" in of.description
    assert "4 file(s) skipped: stray.png: lies in no folder of a class; cat/0.png: unreadable" in of.description
    assert "dog/2.webp: only 7x40 pixels" in of.skipped
    assert np.bincount(of.train_images(99)[1]).tolist() != [9, 9, 9]


def test_a_file_that_fails_later_gives_way_to_the_next_good_one(pngs):
    whole = source(pngs)
    images, labels = whole.train_images(27)
    files = whole._parts["train"]._files
    for place in (4, 5, 26):
        damage(files[place])
    of = source(pngs)
    assert of.skipped == []  # the headers are fine
    got, got_labels = of.train_images(27)
    replaced = np.arange(27)
    replaced[[4, 5, 26]] = 6, 6, 0  # 5 is bad as well; behind the last comes the first
    assert (got == images[replaced]).all() and (got_labels == labels[replaced]).all()
    assert len(of.skipped) == 3
    assert all(any(str(files[place]) in fault for fault in of.skipped) for place in (4, 5, 26))
    fresh = source(pngs)  # what was found before has no say in what a batch is
    for n in (3, 0):
        ours, theirs = of.batch("train", n, 8), fresh.batch("train", n, 8)
        assert all((ours[key] == theirs[key]).all() for key in ours)


def test_all_files_bad(pngs):
    files = [*pngs.rglob("*.png")]
    for file in files:
        damage(file)
    of = source(pngs)
    for _ in range(2):
        with pytest.raises(UserError, match=r"every image of the split is damaged, beginning with .*png: OSError"):
            of.batch("train", 0, 4)
    for file in files[1:]:
        file.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"0 images to train on and 1 held out is too few; .*29 file\(s\) skipped: ant/"
    ):
        source(pngs)
    files[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 30 images in .*pngs is of use: ant/0\.png: unreadable"):
        source(pngs)
    (pngs / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        source(pngs / "empty")
    (pngs / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        source(pngs / "file")


def test_bare_images_have_no_class(folder):
    (folder / "cat" / "deeper" / "3.bmp").unlink()
    of = source(folder / "cat")
    assert of.num_classes == 0 and of.class_names == ()
    assert "no labels" in of.description and not of.batch("train", 0, 8)["labels"].any()


def test_train_and_val_folders(folder, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    folder.rename(both / "train")
    (both / "val" / "dog").mkdir(parents=True)
    for i in range(4):
        picture().save(both / "val" / "dog" / f"{i}.png")
    (both / "val" / "dog" / "0.png").write_bytes(b"")
    of = source(both)
    assert "30 images to train on, 3 held out, 16x16x3, 3 classes" in of.description
    assert set(of.val_images(9)[1]) == {2} and of.class_names == ("ant", "cat", "dog")
    assert listing(both, 16).first_val == 30
    (both / "val" / "cow").mkdir()
    picture().save(both / "val" / "cow" / "0.png")
    with pytest.raises(UserError, match="held-out class 'cow' and nothing of it to train on"):
        source(both)
    (both / "bus").mkdir()  # then train and val are classes like any other
    picture().save(both / "bus" / "0.png")
    assert source(both).class_names == ("bus", "train", "val")
