"""What a task shows a reader: words for the terminal, and files."""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jaxvram.errors import UserError

LINE = 12  # pixels from one line of a title to the next


@dataclasses.dataclass(frozen=True)
class Samples:
    text: str
    files: dict[str, bytes]  # by suffix: '.txt', '.png', '.npz'

    @classmethod
    def of_texts(cls, texts: list[str]) -> "Samples":
        text = f"\n{'-' * 80}\n".join(texts)
        return cls(text, {".txt": (text + "\n").encode()})


def grid_png(images_NxHxWx3: np.ndarray, columns: int, least_side: int = 64, titles: Sequence[str] = ()) -> bytes:
    """uint8 images in rows of `columns`, enlarged without smoothing until they are `least_side` high.

    Args:
      titles: (none) as many as columns: once, above them; as many as images: above each.
    """
    N, H, W, _ = images_NxHxWx3.shape
    zoom, gap = max(1, -(-least_side // H)), 2
    images = images_NxHxWx3.repeat(zoom, 1).repeat(zoom, 2)
    side = W * zoom + gap
    wrapped = [_wrapped(title, side - 4) for title in titles]
    of_text = max((LINE * len(lines) + gap for lines in wrapped), default=0)
    top, of_row = (of_text, 0) if len(titles) == columns else (0, of_text)
    rows, h = -(-N // columns), H * zoom + gap + of_row
    canvas = Image.new("RGB", (columns * side - gap, top + rows * h - gap), "white")
    for i, image in enumerate(images):
        canvas.paste(Image.fromarray(image), (i % columns * side, top + i // columns * h + of_row))
    pen = ImageDraw.Draw(canvas)
    for i, lines in enumerate(wrapped[:N]):
        pen.multiline_text((i % columns * side, i // columns * h), "\n".join(lines), "black", _font(), spacing=0)
    out = io.BytesIO()
    canvas.save(out, format="PNG")
    return out.getvalue()


@functools.cache
def _font() -> ImageFont.ImageFont:
    return ImageFont.load_default(LINE - 2)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many pixels, broken between words where that can be."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if not lines[-1] or _font().getlength(longer) <= width else [*lines, word]
    return lines


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """A picture from a file, uint8 (height, width, 3): scaled to cover that, and its middle.

    Raises:
      UserError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(pathlib.Path(path).expanduser()) as image:
            return np.asarray(ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height)))
    except (OSError, ValueError) as error:
        raise UserError(f"could not read the picture {path}: {getattr(error, 'strerror', None) or error}") from error


def npz(images_NxHxWx3: np.ndarray) -> bytes:
    """The layout that ADM's evaluation suite reads: uint8 (N, H, W, 3) as arr_0."""
    out = io.BytesIO()
    np.savez(out, arr_0=images_NxHxWx3)
    return out.getvalue()
