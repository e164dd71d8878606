"""Pictures in their own proportions: a few shapes of about one area, and batches that hold one shape each.

An aspect is height / width. The shapes of an area base^2, in the way of PixArt-alpha (Chen et al. 2023, arXiv:2310.00426)
and SDXL before it (Podell et al. 2023, arXiv:2307.01952), are all (H, W) with

  H and W multiples of `step`,   1/4 <= H / W <= 4,   0.9 base^2 <= H W <= base^2.

With step = base / 16 these are 41. PixArt's tables have 40 for 256, 512 and 1024 pixels: they are the same but for one,
21 x 11 steps (an aspect of 1.91, 1344 x 704 at 1024), of which they have 11 x 21 only. So no shape has more patches than
the square: what fits on a card as squares fits in any of them.

Each shape is compiled once, which is why a user says how many there shall be: those in which the images lose least.
"""

import dataclasses
import functools

import numpy as np

from jaxvram.errors import UserError

NARROWEST, WIDEST = 0.25, 4.0  # height / width
LEAST_AREA = 0.9  # of base^2
STEPS = 16  # in `base`, unless a model's patches are larger


def step_of(base: int, multiple: int = 1) -> int:
    """The least multiple of `multiple` that is a 16th of `base` or more. UserError: no square of `base` in such steps."""
    step = -(-base // (STEPS * multiple)) * multiple
    if base < 1 or base % step:
        raise UserError(f"an image size of {base} must be a multiple of {step} to have shapes of other aspects")
    return step


def shapes(base: int, step: int) -> list[tuple[int, int]]:
    """All (height, width) about as large as the square of `base`, from the broadest to the tallest."""
    side, area = range(step, 4 * base + 1, step), base**2
    fits = lambda H, W: NARROWEST * W <= H <= WIDEST * W and LEAST_AREA * area <= H * W <= area
    return sorted(((H, W) for H in side for W in side if fits(H, W)), key=lambda shape: shape[0] / shape[1])


def shape_at(base: int, aspect: float, multiple: int = 1) -> tuple[int, int]:
    """The shape nearest to this aspect, its sides multiples of `multiple`."""
    if aspect == 1:
        return base, base
    of = shapes(base, step_of(base, multiple))
    return of[nearest(of, [aspect])[0]]


def nearest(of: list[tuple[int, int]], aspects_N) -> np.ndarray:
    """Which of these shapes each aspect is nearest to, int64 (N,)."""
    return _distances(of, aspects_N).argmin(1)


def _distances(of: list[tuple[int, int]], aspects_N) -> np.ndarray:
    """(N, shapes): by how many times each is too tall or too broad, its logarithm: 1:2 and 2:1 are treated alike."""
    log_K = np.log([H / W for H, W in of])
    return np.abs(np.log(np.asarray(aspects_N, np.float64))[:, None] - log_K)


def choose(of: list[tuple[int, int]], aspects_N, count: int) -> list[tuple[int, int]]:
    """The `count` shapes to which images of these aspects are nearest in all, or fewer if no image is nearest to more.

    Exact: cost_K[k] is the least sum of distances of the images below shape k when k is chosen; an image between two
    neighbours goes to the nearer, so the next chosen adds what lies between.
    """
    aspects_U, images_U = np.unique(np.asarray(aspects_N, np.float64), return_counts=True)
    distance_UxK, log_U = _distances(of, aspects_U), np.log(aspects_U)
    ends_K = np.array([-np.inf, *np.log([H / W for H, W in of]), np.inf])
    K = len(of)
    between = np.full((K + 2, K + 2), np.inf)  # of shapes counted from 1; 0 and K + 1 are the open ends
    for i in range(K + 1):
        for j in range(i + 1, K + 2):
            here_U = (log_U >= ends_K[i]) & (log_U < ends_K[j])
            chosen = [k - 1 for k in (i, j) if 1 <= k <= K]
            if chosen:
                between[i, j] = images_U[here_U] @ distance_UxK[here_U][:, chosen].min(1)
    cost_K, before = between[0, 1:-1], []
    for _ in range(min(count, len(np.unique(distance_UxK.argmin(1)))) - 1):
        total_KxK = cost_K[:, None] + between[1:-1, 1:-1]
        before.append(total_KxK.argmin(0))
        cost_K = total_KxK.min(0)
    chosen = [int((cost_K + between[1:-1, -1]).argmin())]
    for before_K in reversed(before):
        chosen.append(int(before_K[chosen[-1]]))
    return [of[k] for k in reversed(chosen)]


def fault(size: tuple[int, int], shape: tuple[int, int]) -> str | None:
    """Why an image of (height, width) is of no use for its bucket of that shape, or None."""
    (height, width), (H, W) = size, shape
    if height < H or width < W:
        return f"only {width}x{height} pixels, and its bucket has {W}x{H}"
    return None


@dataclasses.dataclass(frozen=True)
class Turns:
    """Which bucket batch n is of: in proportion to their images, and evenly spread.

    The j-th of N_k turns of bucket k is due at (j + 1/2) / N_k, and all turns are taken in the order in which they are due.
    So after n batches it has had n N_k / N, give or take 1/2 + K N_k / (2 N), where N is the sum and K the number of
    buckets. After N batches it begins anew: each image has then been in as many places as a batch has.
    """

    images_K: tuple[int, ...]  # of each bucket; 0: it has no turns

    @functools.cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, which of its turns), each of sum(N_k)."""
        bucket_N = np.repeat(np.arange(len(self.images_K)), self.images_K)
        turn_N = np.concatenate([np.arange(count) for count in self.images_K])
        due_N = (turn_N + 0.5) / np.repeat(self.images_K, self.images_K)
        order_N = np.argsort(due_N, kind="stable")
        return bucket_N[order_N], turn_N[order_N]

    def at(self, n: int) -> tuple[int, int]:
        """(the bucket of batch n, how many batches of it came before)."""
        bucket_N, turn_N = self._order
        rounds, place = divmod(n, len(bucket_N))
        bucket = int(bucket_N[place])
        return bucket, rounds * self.images_K[bucket] + int(turn_N[place])
