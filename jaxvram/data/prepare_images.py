"""Pictures to latents, once, and their captions to features: two passes, each with its encoder alone on the card.

A cache is a folder of meta.json and of shards: latents_000000.npy, float16 (N, F, 2, h, w, c), of which the second axis is
(as it is, mirrored), or as it is alone where there are captions, and the third (mean, standard deviation);
labels_000000.npy, int32 (N,); captions_000000.json, a list of N texts. Of pictures of several aspects (data/buckets.py) a
shard has one shape, and sizes_000000.npy, int32 (N, 2), says how high and wide the originals are, in pixels. The second
pass adds text.json and shards of features (data/features.py). What an autoencoder is, data/autoencoders.py says.
"""

import dataclasses
import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxvram.data.captions import to_lines
from jaxvram.data.images import to_float
from jaxvram.data.pictures import Pictures, find
from jaxvram.errors import UserError

META, TEXT, VERSION = "meta.json", "text.json", 2
PATCH = 2  # latents a side, of the models that take pictures of several aspects


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare_latents` leaves behind."""

    folder: Path
    images: int
    shards: int
    skipped: tuple[str, ...]  # 'cat/1.png: why', of the files that could not be used
    shapes: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)  # (height, width) -> images, if several


def prepare_latents(
    source, out_dir, autoencoder, image_size: int, batch_size: int = 32, shard_size: int = 4096, **options
) -> Prepared:
    """Encode pictures into a cache of latents in `out_dir`.

    Killed at any moment and started again, it keeps the finished shards of `shard_size` images and goes on behind them.

    Args:
      source: a folder of images, a folder for each class in it if there are classes; 'shapes'; or 'emoji'.
      options: of data/pictures.py's `find`.
    Raises:
      UserError: no images of use, faulty captions, or `out_dir` holds latents of other images, settings or another
        autoencoder.
    """
    down = autoencoder.downsample
    if image_size < down or image_size % down:
        raise UserError(f"image_size={image_size} must be a multiple of the autoencoder's {down} pixels")
    if batch_size < 1 or shard_size < 1:
        raise UserError(f"batch_size={batch_size} and shard_size={shard_size} must be positive")
    out_dir = Path(out_dir).expanduser()
    pictures = find(str(source), image_size, multiple=PATCH * down, **options)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        progress = _Progress(out_dir, pictures, autoencoder, image_size, shard_size)
        reader = pictures.reader(progress.next(), 2 * batch_size)
        with tqdm(total=len(pictures), initial=progress.next(), unit="image", desc="encode", disable=None) as bar:
            while progress.next() < len(pictures):
                _write_shard(progress, reader, autoencoder, batch_size, shard_size, bar)
    except OSError as error:
        raise UserError(f"could not prepare {out_dir}: {error.strerror or error} ({error.filename})") from error
    late = [fault for shard in progress.shards for fault in shard["skipped"]]
    images = sum(shard["images"] for shard in progress.shards)
    skipped = (*pictures.skipped, *late)
    return Prepared(out_dir, images, len(progress.shards), skipped, progress.shapes())


def _write_shard(progress: "_Progress", reader, autoencoder, batch_size: int, shard_size: int, bar):
    places, latents = [], []
    while len(places) < shard_size and not (places and progress.pictures.shape_changes(places[-1], reader.next)):
        new_places, batch = reader.take(min(batch_size, shard_size - len(places)))
        if not batch:
            break
        images_BxHxWx3 = to_float(np.stack(batch))
        seen = [images_BxHxWx3, images_BxHxWx3[:, :, ::-1]][: progress.pictures.flips]
        both = [autoencoder.encode(images) for images in seen]
        moments_BxFx2xhxwxC = np.stack([np.stack([*map(np.asarray, pair)], 1) for pair in both], 1)
        if not np.abs(moments_BxFx2xhxwxC).max() <= np.finfo(np.float16).max:  # nor NaN
            raise UserError(f"the autoencoder {autoencoder.identity['name']!r} gave latents that float16 cannot hold")
        # a latent is a few units large, and its own standard deviation is far above float16's rounding
        latents.append(moments_BxFx2xhxwxC.astype(np.float16))
        places += new_places
        bar.update(reader.next - bar.n)
    if not places:
        raise UserError(f"no image in {progress.pictures.name} can be decoded: {'; '.join(reader.skipped[:3])}")
    progress.add(np.concatenate(latents), places, reader)


class _Progress:
    """meta.json: what was asked for, and the finished shards with the place at which the next begins."""

    def __init__(self, out_dir: Path, pictures: Pictures, autoencoder, image_size: int, shard_size: int):
        self.out_dir, self.pictures, self.shards = out_dir, pictures, []
        side = image_size // autoencoder.downsample
        self.meta = {
            "version": VERSION,
            "autoencoder": autoencoder.identity,
            "autoencoder_path": autoencoder.path,
            "scale": autoencoder.scale,
            "image_size": image_size,
            "latent_shape": [side, side, autoencoder.channels],
            "flips": pictures.flips,
            "class_names": list(pictures.class_names),
            "has_captions": pictures.captions is not None,
            "has_val": pictures.first_val is not None,
            "files_sha256": pictures.stamp,
            "files": len(pictures),
            "made": pictures.made,
            "shard_size": shard_size,
        }
        if pictures.shapes_Nx2 is not None:
            self.meta["shapes"] = np.unique(pictures.shapes_Nx2, axis=0).tolist()
        if (out_dir / META).is_file():
            self._resume()
        elif any(out_dir.glob("latents_*.npy")):
            raise UserError(f"{out_dir} holds latents but no {META}: choose another folder")
        else:
            (out_dir / TEXT).unlink(missing_ok=True)  # features of what was here before
        self._save()

    def _resume(self):
        try:
            before = json.loads((self.out_dir / META).read_text())
            whole = list(itertools.takewhile(lambda shard: is_whole(self.out_dir, shard), before.pop("shards")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.out_dir / META} is damaged: delete {self.out_dir}, or choose another") from error
        # where the autoencoder lies may change; what it is may not
        keys = dict.fromkeys([*self.meta, *before])
        changed = [key for key in keys if before.get(key) != self.meta.get(key) and key != "autoencoder_path"]
        if changed:
            raise UserError(
                f"{self.out_dir} was prepared from other images or settings ({', '.join(changed)} differ): choose "
                "another folder, or delete it"
            )
        self.shards = whole

    def next(self) -> int:
        """The file at which the next shard begins."""
        return self.shards[-1]["next"] if self.shards else 0

    def shapes(self) -> dict[tuple[int, int], int]:
        """(height, width) -> pictures so far, if there are several shapes."""
        counts = {tuple(shape): 0 for shape in self.meta.get("shapes", ())}
        for shard in self.shards:
            if "shape" in shard:
                counts[tuple(shard["shape"])] += shard["images"]
        return counts

    def add(self, latents_NxFx2xhxwxC: np.ndarray, places: list[int], reader):
        number, first_val = f"{len(self.shards):06d}", self.pictures.first_val
        files = {"latents": f"latents_{number}.npy", "labels": f"labels_{number}.npy"}
        save_array(self.out_dir / files["latents"], latents_NxFx2xhxwxC)
        save_array(self.out_dir / files["labels"], self.pictures.labels_N[places])
        if self.pictures.captions is not None:
            files["captions"] = f"captions_{number}.json"
            save(self.out_dir / files["captions"], to_lines([self.pictures.captions[place] for place in places]))
        of_shape = {}
        if self.pictures.shapes_Nx2 is not None:
            files["sizes"], of_shape = f"sizes_{number}.npy", {"shape": self.pictures.shapes_Nx2[places[0]].tolist()}
            save_array(self.out_dir / files["sizes"], self.pictures.sizes_Nx2[places])
        shard = files | of_shape | {
            "images": len(places),
            "val": 0 if first_val is None else sum(place >= first_val for place in places),
            "bytes": [(self.out_dir / file).stat().st_size for file in files.values()],
            "next": reader.next,
            "skipped": reader.skipped[:],
        }
        reader.skipped.clear()
        self.shards.append(shard)
        self._save()

    def _save(self):
        part = self.out_dir / (META + ".part")
        part.write_text(json.dumps(self.meta | {"shards": self.shards}, indent=1))
        os.replace(part, self.out_dir / META)


def is_whole(folder: Path, shard: dict) -> bool:
    files = [folder / shard[kind] for kind in ("latents", "labels", "captions", "sizes") if kind in shard]
    return all(f.is_file() and f.stat().st_size == size for f, size in zip(files, shard["bytes"], strict=True))


def save_array(file: Path, array: np.ndarray):
    buffer = io.BytesIO()
    np.save(buffer, array)
    save(file, buffer.getbuffer())


def save(file: Path, content):
    """Under its own name only when whole and on the disk."""
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)
