"""Batches from a cache of latents, which data/prepare_images.py makes of pictures, with what it has of their captions."""

import json
from pathlib import Path

import numpy as np

from jaxvram.data import shapes
from jaxvram.data.autoencoders import load_autoencoder
from jaxvram.data.buckets import Turns
from jaxvram.data.captions import CaptionFiles
from jaxvram.data.features import Features, features_of, name_of
from jaxvram.data.images import ArraySource, ImageDataConfig, hold_out, to_float, to_uint8
from jaxvram.data.order import SPLITS, example_indices, generator
from jaxvram.data.prepare_images import META, VERSION, is_whole
from jaxvram.errors import UserError

_NOISE = 2**63  # streams from here on are for the noise of latents; those below draw which examples are mirrored


def load_latents(cfg: ImageDataConfig, seed: int, with_features: bool = True) -> "LatentSource":
    """The source of data.name='latents'.

    Args:
      with_features: batches hold those of their captions, where the cache has them.
    Raises:
      UserError: no cache, an unfinished or damaged one, or another autoencoder's.
    """
    folder = Path(cfg.path).expanduser()
    asked = load_autoencoder(cfg.autoencoder) if cfg.autoencoder else None
    if not (folder / META).is_file():
        raise UserError(f"{folder} has no {META}: data.name=latents reads what --mode=prepare made of images")
    try:
        meta = json.loads((folder / META).read_text())
        made, version, shards = meta["autoencoder"], meta["version"], meta["shards"]
        if version != VERSION:
            raise UserError(f"{folder} is a cache of version {version}; only {VERSION} is known: prepare again")
        if asked and asked.identity != made:
            raise UserError(
                f"{folder} holds latents of the autoencoder {name_of(made)}, but data.autoencoder asks for "
                f"{name_of(asked.identity)}: prepare the images with that, or leave data.autoencoder out"
            )
        if not shards or shards[-1]["next"] != meta["files"]:
            raise UserError(f"{folder} is not finished: run --mode=prepare again, it goes on where it stopped")
        if damaged := [shard["latents"] for shard in shards if not is_whole(folder, shard)]:
            raise UserError(f"{folder / damaged[0]} or its labels are missing or damaged: run --mode=prepare again")
        if cfg.flip and meta["flips"] == 1:
            raise UserError(
                f"{folder} holds no mirrored pictures, since its captions may say where left and right are: set "
                "data.flip=False"
            )
        kind = LatentShapes if meta["made"].get("name") == "shapes" else LatentSource
        kind = LatentBuckets if "shapes" in meta else kind
        features = features_of(folder, shards) if with_features else None
        return kind(folder, meta, cfg, seed, asked or _at_hand(meta), features)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META} or a shard is damaged ({error!r}): prepare the latents again") from error


class LatentSource(ArraySource):
    """Latents drawn anew each time: (mean + std * noise) * scale, the noise a function of (seed, split, n, row).

    Batches hold "size" (float32 (B, 2): height and width of the original, in pixels) and "aspect" (float32 (B,): height /
    width of what is shown) as well; of a cache with features of captions "context" (float16 (B, S, E)) and "length" (int32
    (B,)) too.
    """

    def __init__(self, folder: Path, meta: dict, cfg: ImageDataConfig, seed: int, autoencoder, features: Features | None):
        shards, self._folder, self._size = meta["shards"], folder, meta["image_size"]
        labels_N = np.concatenate([np.load(folder / shard["labels"]) for shard in shards])
        latents = [np.load(folder / shard["latents"], mmap_mode="r") for shard in shards]
        captions = CaptionFiles([folder / shard["captions"] for shard in shards]) if meta["has_captions"] else None
        first_val = len(labels_N) - sum(shard["val"] for shard in shards) if meta["has_val"] else None
        order = hold_out(labels_N, cfg.val_fraction, first_val)
        shape, self._scale = tuple(meta["latent_shape"]), np.float32(meta["scale"])
        down, square = self._size // shape[0], [self._size, self._size]
        wanted = [(meta["flips"], 2, *(side // down for side in shard.get("shape", square)), shape[-1]) for shard in shards]
        if [shard.shape[1:] for shard in latents] != wanted or sum(map(len, latents)) != len(labels_N):
            raise ValueError("shards of another shape")
        sizes = [np.load(folder / s["sizes"]) if "sizes" in s else np.tile(square, (s["images"], 1)) for s in shards]
        sizes_Nx2 = np.concatenate(sizes).astype(np.float32)
        parts = {split: _Latents(latents, labels_N, sizes_Nx2, order[split], captions) for split in SPLITS}
        what = f"{folder}: latents of {self._size}x{self._size} images by the autoencoder {name_of(meta['autoencoder'])}"
        self._features = features
        if self._features:
            what += f", captions by the text encoder {name_of(self._features.identity)}"
        super().__init__(parts, shape, meta["class_names"], cfg, seed, what)
        self.identity |= {"autoencoder": meta["autoencoder"], "scale": meta["scale"]}
        if self._features:
            self.null = self._features.null
            self.identity |= {"text_encoder": self._features.identity, "context_length": self._features.length}
        self._autoencoder, self.downsample = autoencoder, down
        if autoencoder is None:
            self.description += "; that is not at hand, so pictures show the first three channels"

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        batch = super().batch(split, n, batch_size, rows)
        part, index_B = self._parts[split], self._index(split, n, batch_size, rows)
        height, width = batch["images"].shape[1:3]
        batch |= {"size": part.sizes(index_B), "aspect": np.full(len(index_B), height / width, np.float32)}
        if self._features:
            found = [self._features.of_picture(*place) for place in part.places(index_B)]
            batch |= {key: np.stack([one[key] for one in found]) for key in self.null}
        return batch

    def encode_prompts(self, prompts: list[str]) -> dict[str, np.ndarray]:
        return self._features.of_prompts(prompts)

    @property
    def pixel_size(self) -> tuple[int, int]:
        return self._size, self._size

    def to_pixels(self, latents_BxhxwxC) -> np.ndarray:
        """Decoded; without the autoencoder, the first three channels with -3..3 as 0..255."""
        latents = np.asarray(latents_BxhxwxC, np.float32)
        if self._autoencoder is not None:
            return to_uint8(self._autoencoder.decode(latents / self._scale))
        return to_uint8((latents if latents.shape[-1] >= 3 else latents[..., :1])[..., :3] / 3)

    def from_pixels(self, pixels_BxHxWx3: np.ndarray) -> np.ndarray:
        if self._autoencoder is None:
            raise UserError(f"the autoencoder of {self._folder} is not at hand to encode a picture: set data.autoencoder")
        return self._autoencoder.encode(to_float(pixels_BxHxWx3))[0] * self._scale

    def _examples(self, split: str, index_B, flip_B, seed: int, number_B):
        moments_Bx2xhxwxC, labels_B = self._parts[split].read(index_B, flip_B)
        shape = moments_Bx2xhxwxC.shape[2:]
        latents_BxhxwxC = np.empty((len(index_B), *shape), np.float32)
        for row, number in enumerate(number_B):
            noise = generator(seed, split, _NOISE + int(number)).standard_normal(shape, np.float32)
            mean, std = moments_Bx2xhxwxC[row]
            latents_BxhxwxC[row] = (mean + std * noise) * self._scale
        return latents_BxhxwxC, labels_B


class LatentBuckets(LatentSource):
    """Of pictures of several aspects: a batch has those of one shape, and the shapes take turns (data/buckets.py).

    `shapes` are those of all pictures as the model sees them; `shape` is the square that they are as large as.
    """

    def __init__(self, folder: Path, meta: dict, cfg: ImageDataConfig, seed: int, autoencoder, features: Features | None):
        super().__init__(folder, meta, cfg, seed, autoencoder, features)
        self.shapes = [(H // self.downsample, W // self.downsample, self.shape[-1]) for H, W in meta["shapes"]]
        self._of_shape, self._turns = {}, {}
        for split, part in self._parts.items():
            which_N = np.array([self.shapes.index(shape) for shape in part.shapes()])
            self._of_shape[split] = [np.flatnonzero(which_N == k) for k in range(len(self.shapes))]
            self._turns[split] = Turns(tuple(map(len, self._of_shape[split])))
        self.identity |= {"shapes": [list(shape) for shape in self.shapes]}
        counts = zip(self.shapes, self._turns["train"].images_K, strict=True)
        self.description += f"; in shapes of {', '.join(f'{H}x{W} ({count:,})' for (H, W, _), count in counts)}"

    def _index(self, split: str, n: int, batch_size: int, rows: slice) -> np.ndarray:
        """Each image of a shape once before any is seen twice, through all batches of that shape."""
        which, before = self._turns[split].at(n)
        of_shape = self._of_shape[split][which]
        return of_shape[example_indices("shuffled", self._seed, split, before, batch_size, rows, len(of_shape))]

    def _first(self, split: str, limit: int):
        """Of the shape that most have."""
        index_N = max(self._of_shape[split], key=len)[:limit]
        return self._examples(split, index_N, np.zeros(len(index_N), bool), 0, np.arange(len(index_N)))


class LatentShapes(LatentSource):
    """Of coloured shapes, whose rules judge what is drawn."""

    def __init__(self, folder: Path, meta: dict, cfg: ImageDataConfig, seed: int, autoencoder, features: Features | None):
        super().__init__(folder, meta, cfg, seed, autoencoder, features)
        self._held_out = tuple(meta["made"]["held_out"])

    def unseen(self, count: int) -> tuple[list[str], np.ndarray]:
        """(captions, labels) of what is held out (data/shapes.py)."""
        return shapes.unseen(self._held_out, count)

    def score(self, latents_BxhxwxC, labels_B) -> dict[str, float]:
        return shapes.score(self.to_pixels(latents_BxhxwxC), labels_B)


class _Latents:
    """Mean and standard deviation of one split, from the memory maps of all shards; captions, if there are any."""

    def __init__(self, shards, labels_M: np.ndarray, sizes_Mx2: np.ndarray, order_N: np.ndarray, captions):
        self._shards, self._labels, self._sizes, self._order = shards, labels_M, sizes_Mx2, order_N
        self._ends = np.cumsum([len(shard) for shard in shards])
        self._captions, self.has_captions = captions, captions is not None

    def __len__(self) -> int:
        return len(self._order)

    def places(self, index_B) -> list[tuple[int, int]]:
        """(shard, row in it) of each."""
        at_B = self._order[index_B]
        shard_B = np.searchsorted(self._ends, at_B, side="right")
        first_S = self._ends - [len(shard) for shard in self._shards]
        return [(int(shard), int(at - first_S[shard])) for at, shard in zip(at_B, shard_B, strict=True)]

    def read(self, index_B, flip_B) -> tuple[np.ndarray, np.ndarray]:
        """(float32 (B, 2, h, w, c), int32 (B,)) of examples of one shape."""
        places = self.places(index_B)
        moments = np.empty((len(index_B), *self._shards[places[0][0] if places else 0].shape[2:]), np.float32)
        for i, ((shard, row), flip) in enumerate(zip(places, flip_B, strict=True)):
            moments[i] = self._shards[shard][row, int(flip)]
        return moments, self._labels[self._order[index_B]].astype(np.int32)

    def sizes(self, index_B) -> np.ndarray:
        """Height and width of the originals, float32 (B, 2)."""
        return self._sizes[self._order[index_B]]

    def shapes(self) -> list[tuple[int, int, int]]:
        """(h, w, c) of each example."""
        return [self._shards[shard].shape[3:] for shard, _ in self.places(np.arange(len(self)))]

    def captions(self, index_B) -> list[str]:
        return [self._captions.read(*place) for place in self.places(index_B)]


def _at_hand(meta: dict):
    """The autoencoder that made a cache, or None."""
    try:
        made = load_autoencoder(meta["autoencoder_path"])
    except UserError:
        return None
    return made if made.identity == meta["autoencoder"] else None
