"""What a task shows a reader: words for the terminal, and files."""

import dataclasses
import io

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Samples:
    text: str
    files: dict[str, bytes]  # by suffix: '.txt', '.png', '.npz'

    @classmethod
    def of_texts(cls, texts: list[str]) -> "Samples":
        text = f"\n{'-' * 80}\n".join(texts)
        return cls(text, {".txt": (text + "\n").encode()})


def grid_png(images_NxHxWx3: np.ndarray, columns: int, least_side: int = 64) -> bytes:
    """uint8 images in rows of `columns`, enlarged without smoothing until they are `least_side` high."""
    N, H, W, _ = images_NxHxWx3.shape
    zoom, gap = max(1, -(-least_side // H)), 2
    images = images_NxHxWx3.repeat(zoom, 1).repeat(zoom, 2)
    rows, (h, w) = -(-N // columns), (H * zoom + gap, W * zoom + gap)
    canvas = np.full((rows * h - gap, columns * w - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * h, i % columns * w
        canvas[y : y + h - gap, x : x + w - gap] = image
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, format="PNG")
    return out.getvalue()


def npz(images_NxHxWx3: np.ndarray) -> bytes:
    """The layout that ADM's evaluation suite reads: uint8 (N, H, W, 3) as arr_0."""
    out = io.BytesIO()
    np.savez(out, arr_0=images_NxHxWx3)
    return out.getvalue()
