import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxvram.data.images import ImageDataConfig, hold_out, load, to_float, to_uint8, uniforms
from jaxvram.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 6, 4, 3), dtype=np.uint8)
LABELS = np.arange(50) % 3


def npz(folder, name="set.npz", **arrays):
    np.savez(folder / name, **arrays)
    return ImageDataConfig(name="npz", path=str(folder / name))


def digest(batch):
    return hashlib.sha256(batch["images"].tobytes() + batch["labels"].tobytes()).hexdigest()


def places(pixels_BxHxWxC):
    """Which of IMAGES, or of their mirror images (from 50 on), each is."""
    known = {image.tobytes(): i for i, image in enumerate([*IMAGES, *IMAGES[:, :, ::-1]])}
    return np.array([known[image.tobytes()] for image in pixels_BxHxWxC])


def test_digits():
    source = load(ImageDataConfig(name="digits"), seed=0)
    assert source.shape == (8, 8, 1) and source.example_size == 64 and source.num_classes == 10
    assert source.class_names == tuple("0123456789")
    assert "1,617 images to train on, 180 held out, 8x8x1, 10 classes" in source.description
    images, labels = source.train_images(10**6)
    assert images.shape == (1617, 8, 8, 1) and images.dtype == np.float32 and labels.dtype == np.int32
    assert images.min() == -1 and images.max() == 1 and len(np.unique(images)) == 17
    from sklearn.datasets import load_digits

    theirs = load_digits()
    known = {image.tobytes(): target for image, target in zip(theirs.images, theirs.target, strict=True)}
    val_images, val_labels = source.val_images(10**6)
    for some_images, some_labels in ((images, labels), (val_images, val_labels)):
        assert [known[((i[..., 0] + 1) * 8).astype(float).tobytes()] for i in some_images] == some_labels.tolist()
    train = {image.tobytes() for image in images}
    assert len(val_images) == 180 and not any(image.tobytes() in train for image in val_images)
    assert set(np.bincount(val_labels)) <= {17, 18, 19}  # as many of each digit
    assert len(set(source.train_images(100)[1].tolist())) == 10  # the fixed order mixes the classes


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        load(ImageDataConfig(name="digits"), seed=0)


def test_an_epoch_sees_every_image_once(tmp_path):
    source = load(npz(tmp_path, images=IMAGES, labels=LABELS), seed=3)
    order = [
        np.concatenate([places(to_uint8(source.batch("train", 9 * epoch + n, 5)["images"])) for n in range(9)])
        for epoch in range(2)
    ]
    assert [sorted(o) for o in order] == [sorted(places(to_uint8(source.train_images(99)[0])))] * 2
    assert len(order[0]) == 45 and (order[0] != order[1]).any()
    val = np.concatenate([source.batch("val", n, 5)["images"] for n in range(2)])
    assert (val[:5] == source.val_images(5)[0]).all() and len({*places(to_uint8(val[:5]))}) == 5
    assert (val[5:] == val[:5]).all()  # five held out: round again
    batch = source.batch("train", 2, 40)
    assert (LABELS[places(to_uint8(batch["images"]))] == batch["labels"]).all()


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_a_function_of_seed_split_n_and_row(tmp_path, flip):
    cfg = dataclasses.replace(npz(tmp_path, images=IMAGES, labels=LABELS), flip=flip, val_fraction=0.3)
    source, other = load(cfg, seed=3), load(cfg, seed=4)
    for split in ("train", "val"):
        whole = source.batch(split, 7, 20)
        for rows in (slice(4, 12), slice(1, None, 3), slice(19, 20), slice(5, 5)):
            part = load(cfg, seed=3).batch(split, 7, 20, rows)
            assert all((whole[key][rows] == part[key]).all() for key in whole)
            assert part["images"].shape[1:] == (6, 4, 3) and part["images"].dtype == np.float32
        assert digest(whole) != digest(source.batch(split, 8, 20))
    assert digest(source.batch("train", 7, 20)) != digest(other.batch("train", 7, 20))
    assert digest(source.batch("val", 7, 20)) == digest(other.batch("val", 7, 20))


def test_half_of_the_training_images_are_mirrored(tmp_path):
    cfg = npz(tmp_path, images=IMAGES)
    source, plain = load(dataclasses.replace(cfg, flip=True), seed=1), load(cfg, seed=1)
    seen = np.concatenate([places(to_uint8(source.batch("train", n, 50)["images"])) for n in range(10)])
    as_it_is = np.concatenate([places(to_uint8(plain.batch("train", n, 50)["images"])) for n in range(10)])
    assert (seen % 50 == as_it_is).all() and 0.44 < (seen >= 50).mean() < 0.56
    assert len({tuple(seen[as_it_is == i] >= 50) for i in set(as_it_is)}) > 30  # not each image always the same way
    for fixed in (source.batch("val", 0, 5)["images"], source.train_images(50)[0], source.val_images(5)[0]):
        assert (places(to_uint8(fixed)) < 50).all()


def test_batches_are_the_same_in_another_process():
    code = (
        "import hashlib, sys\nfrom jaxvram.data.images import *\n"
        "for name in ('digits', 'shapes'):\n"
        "    for split in ('train', 'val'):\n"
        "        batch = load(ImageDataConfig(name), 5).batch(split, 3, 70)\n"
        "        print(hashlib.sha256(batch['images'].tobytes() + batch['labels'].tobytes()).hexdigest())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    theirs = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    ours = [
        digest(load(ImageDataConfig(name), 5).batch(split, 3, 70))
        for name in ("digits", "shapes")
        for split in ("train", "val")
    ]
    assert theirs.stdout.split() == ours and len({*ours}) == 4


def test_uniforms_belong_to_an_example_and_to_nothing_else():
    number_B = np.arange(50, 250)
    drawn = uniforms(1, "train", number_B, 3)
    assert drawn.shape == (200, 3) and len(np.unique(drawn)) == 600 and 0.45 < drawn.mean() < 0.55
    some = np.array([3, 190, 77])
    assert (uniforms(1, "train", number_B[some], 3) == drawn[some]).all()
    assert (uniforms(2, "train", number_B, 3) != drawn).all() and (uniforms(1, "val", number_B, 3) != drawn).all()


def test_hold_out():
    labels = np.repeat(np.arange(4), [100, 50, 10, 40])
    order = hold_out(labels, 0.1)
    assert sorted(np.concatenate([*order.values()])) == [*range(200)]
    assert len(hold_out(np.zeros(3, int), 0.1)["val"]) == 1
    assert np.bincount(labels[order["val"]]).tolist() == [10, 5, 1, 4]
    assert (np.diff(labels[order["val"]]) < 0).any()  # mixed, so that few batches see many classes
    assert all((order[split] == hold_out(labels, 0.1)[split]).all() for split in order)
    given = hold_out(labels, 0.1, first_val=150)
    assert sorted(given["val"]) == [*range(150, 200)] and sorted(given["train"]) == [*range(150)]


def test_pixels_there_and_back(tmp_path):
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = to_float(every)
    assert floats.dtype == np.float32 and floats.min() == -1 and floats.max() == 1
    assert (to_uint8(floats) == np.repeat(every, 3, axis=-1)).all()
    odd = np.array([-7, -1, 0.999, 5, np.nan, np.inf], np.float32).reshape(1, 2, 3, 1)
    assert to_uint8(odd)[0, ..., 0].ravel().tolist() == [0, 0, 255, 255, 128, 255]
    source = load(npz(tmp_path, images=IMAGES), seed=0)
    assert source.to_pixels(source.train_images(3)[0]).shape == (3, 6, 4, 3)


def test_npz_of_every_kind(tmp_path):
    plain = load(npz(tmp_path, images=IMAGES, labels=LABELS), seed=0)
    assert plain.shape == (6, 4, 3) and plain.num_classes == 3 and plain.class_names == ("0", "1", "2")
    assert plain.identity["shape"] == [6, 4, 3] and json.loads(json.dumps(plain.identity)) == plain.identity
    adm = load(npz(tmp_path, arr_0=IMAGES, arr_1=LABELS[:, None]), seed=0)
    scaled = load(npz(tmp_path, images=to_float(IMAGES).astype(np.float64), labels=LABELS), seed=0)
    assert digest(adm.batch("train", 0, 8)) == digest(plain.batch("train", 0, 8)) == digest(scaled.batch("train", 0, 8))
    bare = load(npz(tmp_path, images=IMAGES[..., 0]), seed=0)
    assert bare.shape == (6, 4, 1) and bare.num_classes == 0 and "no labels" in bare.description
    assert not bare.batch("train", 0, 8)["labels"].any() and bare.identity != plain.identity
    keras = {"x_train": IMAGES[:30], "y_train": LABELS[:30], "x_test": IMAGES[30:], "y_test": LABELS[30:]}
    split = load(npz(tmp_path, **keras), seed=0)
    assert sorted(places(to_uint8(split.val_images(99)[0]))) == [*range(30, 50)]
    assert sorted(places(to_uint8(split.train_images(99)[0]))) == [*range(30)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, r"holds pictures uint8 \(50, 6, 4, 3\); name the images 'images'"),
        ({"images": IMAGES.astype(np.int64)}, r"must be uint8, or floats in \[-1, 1\] \(it holds images int64"),
        ({"images": IMAGES / 255.0}, r"these lie in \[0, 1\]"),
        ({"images": IMAGES.astype(np.float32)}, r"these lie in \[0, 255\]"),
        ({"images": np.full((4, 8, 8), np.nan)}, r"lie in \[nan, nan\]"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, "the channels come last"),
        ({"images": IMAGES[0, 0]}, r"must have the shape \(N, H, W\)"),
        ({"images": IMAGES, "labels": LABELS[:-1]}, "must be 50 class numbers"),
        ({"images": IMAGES, "labels": LABELS - 1}, "must be 50 class numbers"),
        ({"images": IMAGES, "labels": LABELS / 2}, "must be 50 class numbers"),
        ({"x_train": IMAGES, "x_test": IMAGES[:, :2]}, "differ in size"),
        ({"x_train": IMAGES, "x_test": IMAGES, "y_test": LABELS}, "have no labels"),
        ({"images": IMAGES[:1]}, "0 images to train on and 1 held out is too few"),
        ({"images": np.array([{}], object)}, "could not read"),
    ],
)
def test_npz_that_will_not_do(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        load(npz(tmp_path, **arrays), seed=0)


def test_files_that_are_no_npz(tmp_path):
    file = tmp_path / "set.npz"
    for content in (b"", b"PK\x03\x04 and no more", IMAGES.tobytes()):
        file.write_bytes(content)
        with pytest.raises(UserError, match="could not read"):
            load(ImageDataConfig(name="npz", path=str(file)), seed=0)
    np.save(tmp_path / "set.npy", IMAGES)
    with pytest.raises(UserError, match=r"it is no \.npz file; write one with np\.savez"):
        load(ImageDataConfig(name="npz", path=str(tmp_path / "set.npy")), seed=0)
    with pytest.raises(UserError, match=r"does not exist; did you mean 'set\.npz'"):
        load(ImageDataConfig(name="npz", path=str(tmp_path / "sett.npz")), seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "digit"}, "data.name='digit' is unknown; did you mean 'digits'"),
        ({"name": "digits", "flip": True}, "data.flip=True means nothing to data.name=digits, only to folder, npz"),
        ({"name": "shapes", "path": "x"}, "data.path=x means nothing to data.name=shapes"),
        ({"name": "digits", "image_size": 64}, "data.image_size=64 means nothing to data.name=digits"),
        ({"name": "npz", "path": "x", "autoencoder": "random"}, "only to latents"),
        ({"name": "folder"}, "data.name=folder needs data.path"),
        ({"name": "digits", "val_fraction": 1.0}, "must lie between 0 and 1"),
        ({"name": "shapes", "image_size": 12}, "take 16 or more"),
        ({"name": "folder", "path": "x", "image_size": 0}, "too small"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(UserError, match=message):
        load(ImageDataConfig(**fields), seed=0)
