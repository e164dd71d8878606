"""What is prepared: pictures in a fixed order, of a folder or drawn here, each with its class and perhaps a caption."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxvram.data import buckets
from jaxvram.data.image_folder import Crops, Listing, listing
from jaxvram.errors import UserError

DRAWN = ("shapes", "emoji")  # inputs that need no files
LISTED = 3  # files in a message
METADATA = "metadata.jsonl"  # of Hugging Face's image folders: a line a picture, with "file_name" and "text"


@dataclasses.dataclass(frozen=True)
class Pictures:
    """`labels_N`, `captions` and whether an example is held out are told by its place; `reader(start, ahead)` has
    `take(count) -> (places, crops)`, `next` and `skipped`, as `Crops` of data/image_folder.py has them."""

    name: str
    labels_N: np.ndarray
    class_names: tuple[str, ...]
    captions: Sequence[str] | None
    first_val: int | None  # from this place on they are held out; None: whoever reads the cache chooses
    stamp: str  # of what they are: another stamp, other pictures
    reader: object
    skipped: tuple[str, ...] = ()
    sizes_Nx2: np.ndarray | None = None  # int32, height and width before they were cut; None: they are not told
    shapes_Nx2: np.ndarray | None = None  # int32, height and width, of one shape as long as there are any; None: squares
    made: dict = dataclasses.field(default_factory=dict)  # of drawn ones, what tells how to judge samples

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def flips(self) -> int:
        """2: each also mirrored. A caption may say where left and right are, so then there is only the picture itself."""
        return 1 if self.captions is not None else 2

    def shape_changes(self, place: int, then: int) -> bool:
        """Has the picture at `then`, if there is one, another shape than that at `place`?"""
        of = self.shapes_Nx2
        return of is not None and then < len(self) and bool((of[place] != of[then]).any())


def find(
    source: str, image_size: int, count: int = 0, held_out_pairs: int = 0, held_out_captions: int = 0, font: str = "",
    aspects: int = 0, multiple: int = 1,
) -> Pictures:  # fmt: skip
    """The pictures of a folder, or `count` shapes, or all emoji.

    Args:
      aspects: (0) so many shapes, as large as the square, that a folder's pictures are nearest to; 0: squares alone.
      multiple: (1) of which the sides of those are multiples.
    Raises:
      UserError: no pictures, captions that are missing, empty or damaged, or an option that means nothing to `source`.
    """
    if (held_out_pairs or held_out_captions) and source != "shapes":
        raise UserError("--held_out_pairs and --held_out_captions are for --input=shapes")
    if count and source != "shapes":
        raise UserError("--count is for --input=shapes, which are drawn without end")
    if font and source != "emoji":
        raise UserError("--font is for --input=emoji")
    if aspects and source in DRAWN:
        raise UserError(f"--aspects is for folders of pictures; {source} are drawn as squares: leave it out")
    if source == "shapes":
        return _shapes(image_size, count or 20_000, held_out_pairs, held_out_captions)
    if source == "emoji":
        return _emoji(image_size, font)
    if aspects < 0:
        raise UserError(f"--aspects={aspects} must be 1 or more")
    if not aspects:
        return _of_folder(listing(Path(source).expanduser(), image_size))
    of = buckets.shapes(image_size, buckets.step_of(image_size, multiple))
    found = in_buckets(listing(Path(source).expanduser(), 1), of, aspects)
    return dataclasses.replace(_of_folder(found), sizes_Nx2=found.sizes_Nx2, shapes_Nx2=found.shapes_Nx2)


def in_buckets(found: Listing, of: list[tuple[int, int]], count: int) -> Listing:
    """The same with each picture in the nearest of the `count` best of these shapes, and in the order of those.

    Pictures that are smaller than their bucket are left out: enlarged, they would teach a model to blur.

    Raises:
      UserError: all are.
    """
    aspects_N = found.sizes_Nx2[:, 0] / found.sizes_Nx2[:, 1]
    home_N = buckets.nearest(of, aspects_N)
    fits_N = [buckets.fault(size, of[k]) is None for size, k in zip(found.sizes_Nx2, home_N, strict=True)]
    chosen = buckets.choose(of, aspects_N[fits_N] if any(fits_N) else aspects_N, count)
    bucket_N = buckets.nearest(chosen, aspects_N)
    faults = [buckets.fault(size, chosen[k]) for size, k in zip(found.sizes_Nx2, bucket_N, strict=True)]
    name = lambda i: found.files[i].relative_to(found.folder).as_posix()
    skipped = [*found.skipped, *(f"{name(i)}: {fault}" for i, fault in enumerate(faults) if fault)]
    good = [i for i, fault in enumerate(faults) if fault is None]
    if not good:
        raise UserError(f"none of the {len(faults):,} images in {found.folder} is of use: {'; '.join(skipped[:3])}")
    first_val = len(faults) if found.first_val is None else found.first_val
    order = sorted(good, key=lambda i: (i >= first_val, bucket_N[i], i))
    return dataclasses.replace(
        found, files=[found.files[i] for i in order], labels_N=found.labels_N[order], sizes_Nx2=found.sizes_Nx2[order],
        shapes_Nx2=np.array(chosen, np.int32)[bucket_N[order]], skipped=skipped,
        first_val=None if found.first_val is None else sum(i < first_val for i in good),
    )  # fmt: skip


def _of_folder(found: Listing) -> Pictures:
    captions = captions_of(found)
    stats = [(file.relative_to(found.folder).as_posix(), file.stat()) for file in found.all_files]
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    if captions is not None:
        stamps.append(hashlib.sha256(json.dumps(captions).encode()).hexdigest())
    return Pictures(
        name=str(found.folder), labels_N=found.labels_N, class_names=tuple(found.class_names), captions=captions,
        first_val=found.first_val, stamp=hashlib.sha256(json.dumps(stamps).encode()).hexdigest(),
        reader=lambda start, ahead: Crops(found, start, ahead), skipped=tuple(found.skipped),
    )  # fmt: skip


def captions_of(found: Listing) -> list[str] | None:
    """Of each picture, from NAME.txt beside NAME.jpg or from metadata.jsonl; None where there are neither.

    Raises:
      UserError: some have none, or an empty one, or a file is damaged.
    """
    said = _metadata(found.folder)
    if not said and not any(file.with_suffix(".txt").is_file() for file in found.files):
        return None
    captions, missing, empty = [], [], []
    for file in found.files:
        beside = file.with_suffix(".txt")
        caption = said.get(file.resolve()) if said else _read(beside) if beside.is_file() else None
        captions.append((caption or "").strip())
        if not captions[-1]:
            (missing if caption is None else empty).append(file.relative_to(found.folder).as_posix())
    for what, files in (("have no caption", missing), ("have an empty caption", empty)):
        if files:
            some = ", ".join(files[:LISTED]) + (", ..." if len(files) > LISTED else "")
            where = f"a line in {METADATA}" if said else "a .txt of the same name beside each"
            raise UserError(f"{len(files):,} of {len(captions):,} pictures in {found.folder} {what} ({some}): write {where}")
    return captions


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error


def _metadata(folder: Path) -> dict[Path, str]:
    """Picture -> caption, of every metadata.jsonl in the folder."""
    said = {}
    for file in sorted(folder.rglob(METADATA)):
        for number, line in enumerate(_read(file).split("\n"), 1):  # JSON may hold other ends of lines
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if not isinstance(entry["text"], str):
                    raise TypeError("text is no string")
                said[(file.parent / entry["file_name"]).resolve()] = entry["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{file}, line {number} is no {{"file_name": ..., "text": ...}}: {error!r}') from error
    return said


class _Drawn:
    """A reader of pictures that are drawn, `draw(first, count) -> uint8 (count, H, W, 3)`."""

    def __init__(self, draw, total: int, start: int):
        self._draw, self._total, self.next, self.skipped = draw, total, start, []

    def take(self, count: int):
        places = list(range(self.next, min(self.next + count, self._total)))
        self.next += len(places)
        return places, list(self._draw(places[0], len(places))) if places else []


def _shapes(size: int, count: int, pairs: int, captions: int) -> Pictures:
    """Nine tenths of them for training, without what is held out; the last tenth shows all."""
    from jaxvram.data.shapes import ShapesSource, held_out

    without = held_out(pairs, captions)
    of, train = ShapesSource(size, 0, without), count - count // 10
    if train == count or count < 1:
        raise UserError(f"--count={count} is too few: take 10 or more")
    # A batch of one is example n of its split.
    parts = [("train", 0, train), ("val", train, count - train)]
    texts = [c for split, _, n in parts for c in of.captions(split, 0, n)]
    labels = [of.labels(split, n) for split, _, n in parts]

    def draw(first: int, number: int):
        return np.concatenate(
            [
                of.to_pixels(of.examples(split, np.arange(max(first, begin), min(first + number, begin + n)) - begin))
                for split, begin, n in parts
            ]
        )

    made = {"name": "shapes", "held_out": list(without)}
    return Pictures(
        f"{count:,} shapes", np.concatenate(labels), of.class_names, texts, train, f"shapes {count} {without}",
        lambda start, ahead: _Drawn(draw, count, start), made=made,
    )  # fmt: skip


def _emoji(size: int, font: str) -> Pictures:
    from jaxvram.data.emoji import drawn, font_file

    pictures, names = drawn(font_file(font), size)
    stamp = hashlib.sha256(pictures.tobytes()).hexdigest()
    return Pictures(
        "emoji", np.zeros(len(names), np.int32), (), names, None, stamp,
        lambda start, ahead: _Drawn(lambda first, n: pictures[first : first + n], len(names), start),
    )  # fmt: skip


