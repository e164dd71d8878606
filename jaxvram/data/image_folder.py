"""Folders of images, one folder a class: which files there are, how each is cut, what to do with bad ones."""

import collections
import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from jaxvram.data.images import ArraySource, ImageDataConfig, hold_out, to_float
from jaxvram.data.order import SPLITS
from jaxvram.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
VAL_FOLDERS = ("val", "valid", "validation", "test")  # beside a folder `train`: the split that the set comes with
KEPT_BYTES = 1 << 30  # a split whose crops fit is decoded once, and not once an epoch


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a folder that can be opened and are large enough, in the order of their names."""

    folder: Path
    files: list[Path]
    labels_N: np.ndarray  # int32, places in class_names; 0 where there are none
    class_names: tuple[str, ...]
    first_val: int | None  # from this file on they are held out, if the folder says which
    skipped: list[str]  # 'cat/1.png: unreadable (...)', of the files left out
    all_files: list[Path]  # the bad ones too
    sizes_Nx2: np.ndarray  # int32, height and width in pixels, upright
    shapes_Nx2: np.ndarray  # int32, height and width that each is cut to: the square, unless said otherwise


def load_folder(cfg: ImageDataConfig, seed: int) -> ArraySource:
    """The source of data.name='folder'. UserError: no images there, or none that is of use."""
    found = listing(Path(cfg.path).expanduser(), cfg.image_size)
    order = hold_out(found.labels_N, cfg.val_fraction, found.first_val)
    parts = {
        split: ImageFiles([found.files[i] for i in order[split]], found.labels_N[order[split]], cfg.image_size)
        for split in SPLITS
    }
    shape = (cfg.image_size, cfg.image_size, 3)
    return ArraySource(parts, shape, found.class_names, cfg, seed, str(found.folder), found.skipped)


class ImageFiles:
    """One split: files that are read, cropped and resized when asked for.

    A file that turns out to be damaged is left out from then on: whoever asks for it gets the next good one of the
    split, with that one's label, so that the batch remains a function of its number and of the files.
    """

    def __init__(self, files: list[Path], labels_N: np.ndarray, image_size: int):
        self._files, self._labels, self._size = files, labels_N, image_size
        self.broken: dict[int, str] = {}  # place -> 'file: reason'
        shape = (len(files), image_size, image_size, 3)
        fits = np.prod(shape, dtype=np.int64) <= KEPT_BYTES
        self._kept = np.empty(shape, np.uint8) if fits else None  # takes memory as it is filled
        self._is_kept = np.zeros(len(files), bool)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index_B) -> tuple[np.ndarray, np.ndarray]:
        read = list(threads().map(self._good, [int(i) for i in index_B]))
        pixels = np.stack([crop for _, crop in read]) if read else np.zeros((0, self._size, self._size, 3), np.uint8)
        return to_float(pixels), self._labels[[place for place, _ in read]].astype(np.int32)

    def _good(self, index: int) -> tuple[int, np.ndarray]:
        """(place, crop) of the first good file from `index` on, round the end."""
        for step in range(len(self)):
            place = (index + step) % len(self)
            if place not in self.broken and (crop := self._crop(place)) is not None:
                return place, crop
        raise UserError(f"every image of the split is damaged, beginning with {self.broken[index]}")

    def _crop(self, place: int) -> np.ndarray | None:
        if self._is_kept[place]:
            return self._kept[place]
        crop = try_crop(self._files[place], (self._size, self._size))
        if isinstance(crop, str):
            self.broken[place] = f"{self._files[place]}: {crop}"
            return None
        if self._kept is not None:
            self._kept[place] = crop
            self._is_kept[place] = True  # last: another thread may look at any moment
        return crop


def listing(folder: Path, image_size: int) -> Listing:
    """The images below `folder`, from their headers: a class for each folder in it, or none if the images lie bare.

    `folder/train` and `folder/val` (or test), each with the same folders of classes, are the two splits.

    Raises:
      UserError: no images, or only bad ones.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that holds a folder of images for each class")
    pairs, first_val = [], None  # (class, file)
    for root in _roots(folder):
        first_val = len(pairs) if pairs else None
        pairs += [(name, file) for name, inside in _classes(root) for file in inside]
    if not pairs:
        raise UserError(f"{folder} holds no images ({', '.join(s[1:] for s in SUFFIXES)}) and no folders of images")
    names = tuple(sorted({name for name, _ in pairs if name}))
    class_of = {name: i for i, name in enumerate(names or ("",))}
    if first_val is not None and (new := {n for n, _ in pairs[first_val:]} - {n for n, _ in pairs[:first_val]}):
        raise UserError(f"{folder}: there is a held-out class {min(new)!r} and nothing of it to train on")
    files = [file for _, file in pairs]
    looks = _looks(files)
    faults = [look if isinstance(look, str) else _fault(look, image_size) for look in looks]
    if names:
        faults = ["lies in no folder of a class" if not pair[0] else f for pair, f in zip(pairs, faults, strict=True)]
    skipped = [f"{file.relative_to(folder).as_posix()}: {f}" for file, f in zip(files, faults, strict=True) if f]
    good = [i for i, fault in enumerate(faults) if fault is None]
    if not good:
        raise UserError(f"none of the {len(files):,} images in {folder} is of use: {'; '.join(skipped[:3])}")
    return Listing(
        folder=folder,
        files=[files[i] for i in good],
        labels_N=np.array([class_of[pairs[i][0]] for i in good], np.int32),
        class_names=names,
        first_val=None if first_val is None else sum(i < first_val for i in good),
        skipped=skipped,
        all_files=files,
        sizes_Nx2=np.array([looks[i] for i in good], np.int32),
        shapes_Nx2=np.full((len(good), 2), image_size, np.int32),
    )


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _roots(folder: Path) -> list[Path]:
    """[folder], or its folders `train` and the first of VAL_FOLDERS if it has nothing beside such."""
    inside = {entry.name for entry in _folders(folder)}
    val = [name for name in VAL_FOLDERS if name in inside]
    if "train" in inside and val and inside <= {"train", *VAL_FOLDERS}:
        return [folder / "train", folder / val[0]]
    return [folder]


def _classes(root: Path) -> list[tuple[str, list[Path]]]:
    """(class, its files at any depth), sorted; the files that lie in `root` itself have the class ''."""
    is_image = lambda file: file.suffix.lower() in SUFFIXES and file.name[0] != "." and file.is_file()
    bare = ("", sorted(filter(is_image, root.iterdir())))
    return [bare, *((entry.name, sorted(filter(is_image, entry.rglob("*")))) for entry in _folders(root))]


def _looks(files: list[Path]) -> list[tuple[int, int] | str]:
    """Height and width of each file, from its header, or why it is of no use."""
    looks = []
    with tqdm(total=len(files), unit="image", desc="look at images", delay=2, disable=None) as bar:
        for i in range(0, len(files), 4096):  # a million futures at a time would take a gigabyte
            looks += threads().map(_look, files[i : i + 4096])
            bar.update(len(looks) - i)
    return looks


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Pillow decodes and resizes outside of Python's lock."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), "images")


def _look(file: Path) -> tuple[int, int] | str:
    try:
        with Image.open(file) as image:
            lies = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size if lies else image.size[::-1]
    except Exception as error:  # a damaged file can raise nearly anything
        return f"unreadable ({type(error).__name__})"


def _fault(size: tuple[int, int], image_size: int) -> str | None:
    height, width = size
    return f"only {width}x{height} pixels" if 2 * min(width, height) < image_size else None


def try_crop(file: Path, shape: tuple[int, int]) -> np.ndarray | str:
    """The centre of an image, uint8 (*shape, 3), upright as its EXIF says; or why it cannot be had."""
    try:
        with Image.open(file) as image:
            return np.asarray(centre_crop(_rgb(ImageOps.exif_transpose(image)), shape))
    except Exception as error:  # a damaged file can raise nearly anything
        return f"{type(error).__name__}: {error}"


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue: on white where it is transparent, the upper eight of sixteen bits of grey."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """The middle of an image at (height, width) pixels, as the ADM papers cut squares from ImageNet: halve with a box
    filter while both sides have twice as many or more, scale bicubically to cover, and cut off what stands out."""
    H, W = shape
    while image.height >= 2 * H and image.width >= 2 * W:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(H / image.height, W / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - W) // 2, (image.height - H) // 2
    return image.crop((left, top, left + W, top + H))


class Crops:
    """The crops of `found` from file `start` on, one ahead, so that it knows where the next shard of them begins."""

    def __init__(self, found: Listing, start: int, ahead: int):
        self.skipped: list[str] = []  # of the files passed, those that could not be decoded
        self._found = self._decoded(found, start, ahead)
        self.next, self._crop = next(self._found)  # the next good file's place; the number of files at the end

    def take(self, count: int) -> tuple[list[int], list[np.ndarray]]:
        """(places, crops) of the next `count` good files of one shape, or of fewer where they end."""
        places, crops = [], []
        while len(crops) < count and self._crop is not None and (not crops or self._crop.shape == crops[0].shape):
            places.append(self.next)
            crops.append(self._crop)
            self.next, self._crop = next(self._found)
        return places, crops

    def _decoded(self, found: Listing, start: int, ahead: int):
        waiting, todo = collections.deque(), iter(range(start, len(found.files)))
        while True:
            for place in todo:
                shape = tuple(map(int, found.shapes_Nx2[place]))
                waiting.append((place, threads().submit(try_crop, found.files[place], shape)))
                if len(waiting) > ahead:
                    break
            if not waiting:
                break
            place, future = waiting.popleft()
            crop = future.result()
            if isinstance(crop, str):
                self.skipped.append(f"{found.files[place].relative_to(found.folder).as_posix()}: {crop}")
            else:
                yield place, crop
        yield len(found.files), None
