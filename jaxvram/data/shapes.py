"""Coloured shapes, drawn on the fly without end, and rules that tell which shape a picture shows.

The rules know nothing of any model: they score what a trained model draws. All shapes stand upright on one dark grey,
their centre of mass well inside one of nine cells.
"""

import numpy as np

from jaxvram.data.images import identity_of, to_float, to_uint8, uniforms
from jaxvram.errors import UserError

BACKGROUND = (38, 38, 38)
COLOURS = {"red": (228, 60, 52), "green": (60, 186, 82), "blue": (64, 104, 236), "yellow": (244, 212, 64)}
SHAPES = ("circle", "square", "triangle", "cross")
CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
EXTENTS = (0.16, 0.24)  # of a shape, as a share of the picture's side
GAP = 0.02  # between a centre and the border of its cell, as a share of the picture's side
TEXTS = len(CLASS_NAMES) * len(POSITIONS)
MOST_PAIRS, MOST_CAPTIONS = 8, 72  # half of all
SMALLEST = 16  # pixels a side: a cross needs that many to look like one
CONFIDENT = (
    0.7  # below, what is recognised does not count; clean shapes reach 0.89, the wrong shape drawn over one 0.87
)
_TRIANGLE = 1.1  # half the base of a triangle of extent 1, chosen so that no shape is much smaller than the others
_SQUARE = 0.88  # half the side of a square of extent 1
_AREA = np.array([np.pi, 4 * _SQUARE**2, np.sqrt(3) * _TRIANGLE**2, 20 / 9], np.float32)  # of extent 1
_PALETTE_Kx3 = to_float(np.array([*COLOURS.values()], np.uint8)) - to_float(np.array(BACKGROUND, np.uint8))
_BACKGROUND_3 = to_float(np.array(BACKGROUND, np.uint8))
_CHUNK = 256  # pictures recognised at a time: 64 pixels a side take 4 MB for each intermediate


class ShapesSource:
    """Pictures of `image_size` pixels a side, one shape each; example k is a function of (seed, split, k) alone."""

    class_names, num_classes, has_captions = CLASS_NAMES, len(CLASS_NAMES), True

    def __init__(self, image_size: int, seed: int, held_out: tuple[int, ...] = ()):
        if image_size < SMALLEST:
            raise UserError(f"data.image_size={image_size} is too small for shapes: take {SMALLEST} or more")
        self._seed, self._held_out = seed, held_out
        self.shape, self.example_size = (image_size, image_size, 3), 3 * image_size**2
        self.identity = identity_of(self.shape, self.class_names)
        self.description = (
            f"coloured shapes, drawn without end, {image_size}x{image_size}x3, {self.num_classes} classes"
        )
        if held_out:
            self.description += f"; {len(held_out)} of {TEXTS} captions are held out"
            self.identity |= {"held_out": list(held_out)}

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        return self._draw(self._seed, split, n * batch_size + np.arange(batch_size)[rows])

    def captions(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> list[str]:
        """What stands in the batch of the same arguments: 'a red circle at the top left'."""
        drawn = _drawn(self._seed, split, n * batch_size + np.arange(batch_size)[rows], self._held_out)
        return [caption(*c) for c in zip(drawn["colour"], drawn["shape"], drawn["position"], strict=True)]

    def positions(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> np.ndarray:
        """The cells of the same batch's shapes: places in POSITIONS, int32 (B,)."""
        return _drawn(self._seed, split, n * batch_size + np.arange(batch_size)[rows], self._held_out)["position"]

    def examples(self, split: str, number_N: np.ndarray) -> np.ndarray:
        """Pictures of these numbers, as batches have them."""
        return self._draw(self._seed, split, number_N)["images"]

    def labels(self, split: str, count: int) -> np.ndarray:
        """Classes of the first examples, which are not drawn for it."""
        drawn = _drawn(self._seed, split, np.arange(count), self._held_out)
        return drawn["colour"] * len(SHAPES) + drawn["shape"]

    def unseen(self, count: int) -> tuple[list[str], np.ndarray]:
        """(captions, labels): what is held out, in turn."""
        return unseen(self._held_out, count)

    def train_images(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(self._draw(0, "train", np.arange(limit)).values())

    def val_images(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(self._draw(0, "val", np.arange(limit)).values())

    def to_pixels(self, images_BxHxWx3) -> np.ndarray:
        return to_uint8(images_BxHxWx3)

    def from_pixels(self, pixels_BxHxWx3: np.ndarray) -> np.ndarray:
        return to_float(pixels_BxHxWx3)

    @property
    def pixel_size(self) -> tuple[int, int]:
        return self.shape[:2]

    def score(self, images_BxHxWx3, labels_B, positions_B=None) -> dict[str, float]:
        return score(images_BxHxWx3, labels_B, positions_B)

    def _draw(self, seed: int, split: str, number_B: np.ndarray) -> dict[str, np.ndarray]:
        drawn, size = _drawn(seed, split, number_B, self._held_out), self.shape[0]
        cover_BxHxW = coverage(drawn["shape"], size * drawn["centre"], size * drawn["extent"], size)
        images_BxHxWx3 = cover_BxHxW[..., None] * _PALETTE_Kx3[drawn["colour"]][:, None, None]
        images_BxHxWx3 += _BACKGROUND_3
        return {"images": images_BxHxWx3, "labels": drawn["colour"] * len(SHAPES) + drawn["shape"]}


def held_out(pairs: int, captions: int) -> tuple[int, ...]:
    """Texts that no training picture may have, as numbers (colour 4 + shape) 9 + position.

    Args:
      pairs: of colour and shape, wherever they stand: along the diagonals of their table, so that no word is short of them.
      captions: colour, shape and position, of which any two are seen together elsewhere: every pair in turn, each time at
        another position.
    Raises:
      UserError: too many to learn the words from the rest.
    """
    for field, count, most in (("pairs", pairs, MOST_PAIRS), ("captions", captions, MOST_CAPTIONS)):
        if not 0 <= count <= most:
            raise UserError(f"held_out_{field}={count} is not in 0 to {most}: every word must be learnt in enough others")
    n, P = len(SHAPES), len(POSITIONS)
    diagonals = [colour * n + (colour + diagonal) % n for diagonal in range(n) for colour in range(n)][:pairs]
    texts = [pair * P + position for position in range(P) for pair in diagonals]
    return tuple(dict.fromkeys([*texts, *_mixed(captions)]))


def _mixed(count: int) -> list[int]:
    """The first of all texts in an order in which every pair comes in turn, each time at another position."""
    pairs, P = len(CLASS_NAMES), len(POSITIONS)
    return [(k % pairs) * P + (k % pairs + 4 * (k // pairs)) % P for k in range(count)]


def unseen(held_out: tuple[int, ...], count: int) -> tuple[list[str], np.ndarray]:
    """(captions, labels) of these texts in turn; of all, if none is held out."""
    label_N, position_N = np.divmod(np.resize(held_out or _mixed(TEXTS), count), len(POSITIONS))
    shown = zip(*np.divmod(label_N, len(SHAPES)), position_N, strict=True)
    return [caption(*which) for which in shown], label_N.astype(np.int32)


def _drawn(seed: int, split: str, number_B: np.ndarray, held_out: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """What each example shows: places in COLOURS, SHAPES and POSITIONS, and centre (B, 2: x, y) and extent in sides.

    No training example has a text of `held_out`.
    """
    u_BxN = uniforms(seed, split, number_B, 7)
    pick = lambda u, count: (u * count).astype(np.int32)
    column_B, row_B = pick(u_BxN[:, 2], 3), pick(u_BxN[:, 3], 3)
    colour_B, shape_B = pick(u_BxN[:, 0], len(COLOURS)), pick(u_BxN[:, 1], len(SHAPES))
    if held_out and split == "train":
        others = np.setdiff1d(np.arange(TEXTS), held_out)
        label_B, position_B = np.divmod(others[pick(u_BxN[:, 0], len(others))].astype(np.int32), len(POSITIONS))
        (colour_B, shape_B), (row_B, column_B) = np.divmod(label_B, len(SHAPES)), np.divmod(position_B, 3)
    extent_B = EXTENTS[0] + u_BxN[:, 4] * (EXTENTS[1] - EXTENTS[0])
    # A triangle's tip lies furthest from the centre; one margin for all four shapes keeps the place from telling which.
    margin_B = 2 / np.sqrt(3) * _TRIANGLE * extent_B
    centre_Bx2 = np.empty((len(number_B), 2))
    for axis, cell_B in enumerate((column_B, row_B)):
        low_B = np.maximum(cell_B / 3 + GAP, margin_B)
        high_B = np.minimum((cell_B + 1) / 3 - GAP, 1 - margin_B)
        centre_Bx2[:, axis] = low_B + u_BxN[:, 5 + axis] * (high_B - low_B)
    return {
        "colour": colour_B,
        "shape": shape_B,
        "position": 3 * row_B + column_B,
        "centre": centre_Bx2,
        "extent": extent_B,
    }


def caption(colour: int, shape: int, position: int) -> str:
    where = POSITIONS[position]
    return f"a {[*COLOURS][colour]} {SHAPES[shape]} {'in' if where == 'centre' else 'at'} the {where}"


def coverage(shape_N, centre_Nx2, extent_N, size: int) -> np.ndarray:
    """The share of each pixel that a shape covers, float32 (N, size, size): its edges are smooth.

    `shape_N` are places in SHAPES; `centre_Nx2` (x, y) is the centre of mass and `extent_N` about half the width, pixels.
    """
    middle_S = np.arange(size, dtype=np.float32) + 0.5
    x_Nx1xS = (middle_S - np.asarray(centre_Nx2, np.float32)[:, 0:1])[:, None, :]
    y_NxSx1 = (middle_S - np.asarray(centre_Nx2, np.float32)[:, 1:2])[:, :, None]
    extent_Nx1x1 = np.asarray(extent_N, np.float32)[:, None, None]
    cover_NxSxS = np.empty((len(shape_N), size, size), np.float32)
    for shape, draw in enumerate((_circle, _square, _triangle, _cross)):
        here_N = np.asarray(shape_N) == shape
        cover_NxSxS[here_N] = draw(x_Nx1xS[here_N], y_NxSx1[here_N], extent_Nx1x1[here_N])
    return cover_NxSxS


def _inside(distance):
    """Signed distance to an edge in pixels, negative inside, as the share of a pixel that is covered."""
    return np.clip(np.float32(0.5) - distance, 0, 1)


def _circle(x, y, extent):
    return _inside(np.sqrt(x * x + y * y) - extent)


def _square(x, y, extent):
    return _box(x, y, np.float32(_SQUARE) * extent, np.float32(_SQUARE) * extent)


def _triangle(x, y, extent):
    inner = np.float32(_TRIANGLE / np.sqrt(3)) * extent  # from the centre to each side; y points down
    return _inside(np.maximum(y, np.float32(np.sqrt(0.75)) * np.abs(x) - y / 2) - inner)


def _cross(x, y, extent):
    lying, standing = _box(x, y, extent, extent / 3), _box(x, y, extent / 3, extent)
    return lying + standing - lying * standing


def _box(x, y, half_width, half_height):
    return _inside(np.abs(x) - half_width) * _inside(np.abs(y) - half_height)


def recognise(images_NxSxSx3) -> dict[str, np.ndarray]:
    """Which shape each picture (uint8, or floats in [-1, 1]) shows, by rules.

    `colour`, `shape`, `position`: int32 (N,), places in COLOURS, SHAPES and POSITIONS, always the likeliest.
    `confidence`: float32 (N,) in [0, 1], the overlap (intersection over union) of what is not background with that shape
    drawn at its centre of mass and with its area; 0 where there is nothing, or in no colour of ours.
    """
    images = np.asarray(images_NxSxSx3)
    chunks = [_recognise(images[i : i + _CHUNK]) for i in range(0, len(images), _CHUNK)] or [_recognise(images)]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def _recognise(images) -> dict[str, np.ndarray]:
    size = images.shape[1]
    difference_NxSxSx3 = np.clip(np.nan_to_num(to_float(images)), -1, 1) - _BACKGROUND_3
    strength_NxSxS = np.sqrt(np.einsum("nyxc,nyxc->nyx", difference_NxSxSx3, difference_NxSxSx3))
    # The colour is that of the pixels well off the background: the weights leave the pale edges with little say.
    weight_NxSxS = np.where(strength_NxSxS > 0.6, strength_NxSxS**2, 0)
    total_N = weight_NxSxS.sum((1, 2))
    mean_Nx3 = np.einsum("nyx,nyxc->nc", weight_NxSxS, difference_NxSxSx3) / np.maximum(total_N, 1e-6)[:, None]
    distance_NxK = np.linalg.norm(mean_Nx3[:, None] - _PALETTE_Kx3, axis=-1)
    colour_N = distance_NxK.argmin(1).astype(np.int32)
    full_N = np.linalg.norm(_PALETTE_Kx3, axis=-1)[colour_N]
    # All that is not background counts, in whatever colour: a second thing in the picture lowers the overlap.
    cover_NxSxS = np.minimum(strength_NxSxS / full_N[:, None, None], 1)
    # Noise about the background: what is faint even in the mean of 3 x 3 pixels, where a shape's pale edge is not.
    around_NxSxS = np.linalg.norm(_mean_of_nine(difference_NxSxSx3), axis=-1)
    cover_NxSxS[around_NxSxS < 0.2 * full_N[:, None, None]] = 0
    area_N = np.maximum(cover_NxSxS.sum((1, 2)), 1e-6)
    middle_S = np.arange(size, dtype=np.float32) + 0.5
    centre_Nx2 = np.stack([cover_NxSxS.sum(axis) @ middle_S for axis in (1, 2)], axis=1) / area_N[:, None]
    overlap_NxK = np.stack([_overlap(cover_NxSxS, shape, centre_Nx2, area_N) for shape in range(len(SHAPES))], axis=1)
    cell_Nx2 = np.clip((3 * centre_Nx2 / size).astype(np.int32), 0, 2)
    share_N = area_N / size**2
    seen_N = (share_N > 0.02) & (share_N < 0.4) & (distance_NxK.min(1) < 0.5)  # ours cover 0.05 to 0.18
    return {
        "colour": colour_N,
        "shape": overlap_NxK.argmax(1).astype(np.int32),
        "position": 3 * cell_Nx2[:, 1] + cell_Nx2[:, 0],
        "confidence": np.where(seen_N, overlap_NxK.max(1), 0).astype(np.float32),
    }


def _overlap(cover_NxSxS, shape: int, centre_Nx2, area_N) -> np.ndarray:
    """Intersection over union, float32 (N,), with `shape` drawn at these centres and of these areas in pixels."""
    extent_N = np.sqrt(area_N / _AREA[shape])
    drawn_NxSxS = coverage(np.full(len(area_N), shape), centre_Nx2, extent_N, cover_NxSxS.shape[1])
    union_N = np.maximum(np.maximum(cover_NxSxS, drawn_NxSxS).sum((1, 2)), 1e-6)  # 0 for an empty picture
    return np.minimum(cover_NxSxS, drawn_NxSxS).sum((1, 2)) / union_N


def _mean_of_nine(images_NxSxSx3) -> np.ndarray:
    """Each pixel's mean with its eight neighbours; the border is repeated outwards."""
    padded = np.pad(images_NxSxSx3, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def score(images_NxSxSx3, labels_N, positions_N=None) -> dict[str, float]:
    """The shares of pictures that show the colour, the shape, both (and the position) asked for.

    What is recognised with less than CONFIDENT counts as wrong.
    """
    seen = recognise(images_NxSxSx3)
    wanted_colour_N, wanted_shape_N = np.divmod(np.asarray(labels_N), len(SHAPES))
    sure_N = seen["confidence"] >= CONFIDENT
    colour_N, shape_N = sure_N & (seen["colour"] == wanted_colour_N), sure_N & (seen["shape"] == wanted_shape_N)
    right = {"colour": colour_N, "shape": shape_N, "colour_and_shape": colour_N & shape_N}
    if positions_N is not None:
        right["position"] = sure_N & (seen["position"] == np.asarray(positions_N))
    return {key: float(right_N.mean()) for key, right_N in right.items()}
