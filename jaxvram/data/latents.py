"""Latents of an autoencoder, made once from a folder of images, and batches from them.

A cache is a folder of meta.json and of shards: latents_000000.npy, float16 (N, 2, 2, h, w, c), of which the second axis
is (as it is, mirrored) and the third (mean, standard deviation); labels_000000.npy, int32 (N,).

What an autoencoder is, data/autoencoders.py says.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxvram.data.autoencoders import AUTOENCODERS
from jaxvram.data.image_folder import Crops, Listing, listing
from jaxvram.data.images import ArraySource, ImageDataConfig, hold_out, to_float, to_uint8
from jaxvram.data.order import SPLITS, generator
from jaxvram.errors import UserError, nearest

META, VERSION = "meta.json", 1
_NOISE = 2**63  # streams from here on are for the noise of latents; those below draw which examples are mirrored


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare_latents` leaves behind."""

    folder: Path
    images: int
    shards: int
    skipped: tuple[str, ...]  # 'cat/1.png: why', of the files that could not be used


def prepare_latents(
    input_folder, out_dir, autoencoder, image_size: int, batch_size: int = 32, shard_size: int = 4096
) -> Prepared:
    """Encode a folder of images (a class for each folder in it) into a cache of latents in `out_dir`.

    Killed at any moment and started again, it keeps the finished shards of `shard_size` images and goes on behind them.

    Raises:
      UserError: no images of use, or `out_dir` holds latents of other images, settings or another autoencoder.
    """
    down = autoencoder.downsample
    if image_size < down or image_size % down:
        raise UserError(f"image_size={image_size} must be a multiple of the autoencoder's {down} pixels")
    if batch_size < 1 or shard_size < 1:
        raise UserError(f"batch_size={batch_size} and shard_size={shard_size} must be positive")
    out_dir = Path(out_dir).expanduser()
    found = listing(Path(input_folder).expanduser(), image_size)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        progress = _Progress(out_dir, found, autoencoder, image_size, shard_size)
        crops = Crops(found, image_size, progress.next(), 2 * batch_size)
        with tqdm(total=len(found.files), initial=progress.next(), unit="image", desc="encode", disable=None) as bar:
            while progress.next() < len(found.files):
                _write_shard(progress, crops, autoencoder, batch_size, shard_size, bar)
    except OSError as error:
        raise UserError(f"could not prepare {out_dir}: {error.strerror or error} ({error.filename})") from error
    late = [fault for shard in progress.shards for fault in shard["skipped"]]
    images = sum(shard["images"] for shard in progress.shards)
    return Prepared(out_dir, images, len(progress.shards), (*found.skipped, *late))


def _write_shard(progress: "_Progress", crops: Crops, autoencoder, batch_size: int, shard_size: int, bar):
    places, latents = [], []
    while len(places) < shard_size:
        new_places, batch = crops.take(min(batch_size, shard_size - len(places)))
        if not batch:
            break
        images_BxSxSx3 = to_float(np.stack(batch))
        both = [autoencoder.encode(images) for images in (images_BxSxSx3, images_BxSxSx3[:, :, ::-1])]
        moments_Bx2x2xhxwxC = np.stack([np.stack([*map(np.asarray, pair)], 1) for pair in both], 1)
        if not np.abs(moments_Bx2x2xhxwxC).max() <= np.finfo(np.float16).max:  # nor NaN
            raise UserError(f"the autoencoder {autoencoder.identity['name']!r} gave latents that float16 cannot hold")
        # a latent is a few units large, and its own standard deviation is far above float16's rounding
        latents.append(moments_Bx2x2xhxwxC.astype(np.float16))
        places += new_places
        bar.update(crops.next - bar.n)
    if not places:
        raise UserError(f"no image in {progress.found.folder} can be decoded: {'; '.join(crops.skipped[:3])}")
    progress.add(np.concatenate(latents), places, crops)


class _Progress:
    """meta.json: what was asked for, and the finished shards with the place in the folder at which the next begins."""

    def __init__(self, out_dir: Path, found: Listing, autoencoder, image_size: int, shard_size: int):
        self.out_dir, self.found, self.shards = out_dir, found, []
        stats = [(file.relative_to(found.folder).as_posix(), file.stat()) for file in found.all_files]
        stamps = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        side = image_size // autoencoder.downsample
        self.meta = {
            "version": VERSION,
            "autoencoder": autoencoder.identity,
            "scale": autoencoder.scale,
            "image_size": image_size,
            "latent_shape": [side, side, autoencoder.channels],
            "class_names": list(found.class_names),
            "has_val": found.first_val is not None,
            "files_sha256": hashlib.sha256(stamps.encode()).hexdigest(),
            "files": len(found.files),
            "shard_size": shard_size,
        }
        if (out_dir / META).is_file():
            self._resume()
        elif any(out_dir.glob("latents_*.npy")):
            raise UserError(f"{out_dir} holds latents but no {META}: choose another folder")
        self._save()

    def _resume(self):
        try:
            before = json.loads((self.out_dir / META).read_text())
            whole = list(itertools.takewhile(lambda shard: _is_whole(self.out_dir, shard), before.pop("shards")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.out_dir / META} is damaged: delete {self.out_dir}, or choose another") from error
        if before != self.meta:
            changed = [key for key in self.meta if before.get(key) != self.meta[key]]
            raise UserError(
                f"{self.out_dir} was prepared from other images or settings ({', '.join(changed)} differ): choose "
                "another folder, or delete it"
            )
        self.shards = whole

    def next(self) -> int:
        """The file at which the next shard begins."""
        return self.shards[-1]["next"] if self.shards else 0

    def add(self, latents_Nx2x2xhxwxC: np.ndarray, places: list[int], crops: Crops):
        number, first_val = len(self.shards), self.found.first_val
        name = f"{number:06d}.npy"
        _save_array(self.out_dir / f"latents_{name}", latents_Nx2x2xhxwxC)
        _save_array(self.out_dir / f"labels_{name}", self.found.labels_N[places])
        shard = {
            "latents": f"latents_{name}",
            "labels": f"labels_{name}",
            "images": len(places),
            "val": 0 if first_val is None else sum(place >= first_val for place in places),
            "bytes": [(self.out_dir / f"{kind}_{name}").stat().st_size for kind in ("latents", "labels")],
            "next": crops.next,
            "skipped": crops.skipped[:],
        }
        crops.skipped.clear()
        self.shards.append(shard)
        self._save()

    def _save(self):
        part = self.out_dir / (META + ".part")
        part.write_text(json.dumps(self.meta | {"shards": self.shards}, indent=1))
        os.replace(part, self.out_dir / META)


def _is_whole(folder: Path, shard: dict) -> bool:
    files = [folder / shard["latents"], folder / shard["labels"]]
    return all(f.is_file() and f.stat().st_size == size for f, size in zip(files, shard["bytes"], strict=True))


def _save_array(file: Path, array: np.ndarray):
    """Under its own name only when whole and on the disk."""
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as out:
        np.save(out, array)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


def load_latents(cfg: ImageDataConfig, seed: int) -> "LatentSource":
    """The source of data.name='latents'. UserError: no cache, an unfinished or damaged one, or another autoencoder's."""
    folder = Path(cfg.path).expanduser()
    if cfg.autoencoder and cfg.autoencoder not in AUTOENCODERS:
        raise UserError(f"data.autoencoder={cfg.autoencoder!r} is unknown{nearest(cfg.autoencoder, AUTOENCODERS)}")
    if not (folder / META).is_file():
        raise UserError(f"{folder} has no {META}: data.name=latents reads what --mode=prepare made of images")
    try:
        meta = json.loads((folder / META).read_text())
        made, version, shards = meta["autoencoder"], meta["version"], meta["shards"]
        if version != VERSION:
            raise UserError(f"{folder} is a cache of version {version}; only {VERSION} is known: prepare again")
        if cfg.autoencoder and (asked := AUTOENCODERS[cfg.autoencoder]().identity) != made:
            raise UserError(
                f"{folder} holds latents of the autoencoder {_name(made)}, but data.autoencoder asks for "
                f"{_name(asked)}: prepare the images with that, or leave data.autoencoder out"
            )
        if not shards or shards[-1]["next"] != meta["files"]:
            raise UserError(f"{folder} is not finished: run --mode=prepare again, it goes on where it stopped")
        if damaged := [shard["latents"] for shard in shards if not _is_whole(folder, shard)]:
            raise UserError(f"{folder / damaged[0]} or its labels are missing or damaged: run --mode=prepare again")
        return LatentSource(folder, meta, cfg, seed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META} or a shard is damaged ({error!r}): prepare the latents again") from error


class LatentSource(ArraySource):
    """Latents drawn anew each time: (mean + std * noise) * scale, the noise a function of (seed, split, n, row)."""

    def __init__(self, folder: Path, meta: dict, cfg: ImageDataConfig, seed: int):
        shards = meta["shards"]
        labels_N = np.concatenate([np.load(folder / shard["labels"]) for shard in shards])
        latents = [np.load(folder / shard["latents"], mmap_mode="r") for shard in shards]
        first_val = len(labels_N) - sum(shard["val"] for shard in shards) if meta["has_val"] else None
        order = hold_out(labels_N, cfg.val_fraction, first_val)
        shape, self._scale = tuple(meta["latent_shape"]), np.float32(meta["scale"])
        parts = {split: _Latents(latents, labels_N, order[split]) for split in SPLITS}
        if any(shard.shape[1:] != (2, 2, *shape) for shard in latents) or sum(map(len, latents)) != len(labels_N):
            raise ValueError("shards of another shape")
        size = meta["image_size"]
        what = f"{folder}: latents of {size}x{size} images by the autoencoder {_name(meta['autoencoder'])}"
        super().__init__(parts, shape, meta["class_names"], cfg, seed, what)
        self.identity |= {"autoencoder": meta["autoencoder"], "scale": meta["scale"]}
        self._autoencoder = _at_hand(meta["autoencoder"])
        if self._autoencoder is None:
            self.description += "; that is not at hand, so pictures show the first three channels"

    def to_pixels(self, latents_BxhxwxC) -> np.ndarray:
        """Decoded; without the autoencoder, the first three channels with -3..3 as 0..255."""
        latents = np.asarray(latents_BxhxwxC, np.float32)
        if self._autoencoder is not None:
            return to_uint8(self._autoencoder.decode(latents / self._scale))
        return to_uint8((latents if latents.shape[-1] >= 3 else latents[..., :1])[..., :3] / 3)

    def _examples(self, split: str, index_B, flip_B, seed: int, number_B):
        moments_Bx2xhxwxC, labels_B = self._parts[split].read(index_B, flip_B)
        latents_BxhxwxC = np.empty((len(index_B), *self.shape), np.float32)
        for row, number in enumerate(number_B):
            noise = generator(seed, split, _NOISE + int(number)).standard_normal(self.shape, np.float32)
            mean, std = moments_Bx2xhxwxC[row]
            latents_BxhxwxC[row] = (mean + std * noise) * self._scale
        return latents_BxhxwxC, labels_B


class _Latents:
    """Mean and standard deviation of one split, from the memory maps of all shards."""

    def __init__(self, shards: list[np.ndarray], labels_M: np.ndarray, order_N: np.ndarray):
        self._shards, self._labels, self._order = shards, labels_M, order_N
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return len(self._order)

    def read(self, index_B, flip_B) -> tuple[np.ndarray, np.ndarray]:
        """(float32 (B, 2, h, w, c), int32 (B,))."""
        at_B = self._order[index_B]
        shard_B = np.searchsorted(self._ends, at_B, side="right")
        moments = np.empty((len(at_B), *self._shards[0].shape[2:]), np.float32)
        for row, (at, shard, flip) in enumerate(zip(at_B, shard_B, flip_B, strict=True)):
            moments[row] = self._shards[shard][at - self._ends[shard], int(flip)]  # counted from the shard's end
        return moments, self._labels[at_B].astype(np.int32)


def _name(identity: dict) -> str:
    return f"{identity['name']!r} (fingerprint {identity['fingerprint']})"


def _at_hand(identity: dict):
    """The autoencoder of this identity, or None."""
    made = AUTOENCODERS[identity["name"]]() if identity["name"] in AUTOENCODERS else None
    return made if made is not None and made.identity == identity else None
