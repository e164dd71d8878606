import itertools

import numpy as np
import pytest

from jaxvram.data.buckets import Turns, choose, fault, nearest, shapes, step_of
from jaxvram.errors import UserError

RNG = np.random.default_rng(0)
# Height and width in steps of a 16th of the base, as PixArt's authors publish for 256, 512 and 1024 pixels.
PIXART = [
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15), (17, 14),
    (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9), (27, 9), (28, 9),
    (29, 8), (30, 8), (31, 8), (32, 8),
]  # fmt: skip


@pytest.mark.parametrize("base", (256, 512, 1024))
def test_shapes_are_the_authors_and_one_more(base):
    step = step_of(base)
    of = shapes(base, step)
    assert step == base // 16 and len(PIXART) == 40
    assert set(of) - {(H * step, W * step) for H, W in PIXART} == {(21 * step, 11 * step)} and len(of) == 41
    aspects = [H / W for H, W in of]
    assert aspects == sorted(set(aspects)) and aspects[0] == 0.25 and aspects[-1] == 4.0
    assert {(W, H) for H, W in of} == set(of) and (base, base) in of
    assert all(H % step == W % step == 0 and 0.9 * base**2 <= H * W <= base**2 for H, W in of)


def test_shapes_of_an_autoencoders_and_a_models_patches():
    assert step_of(256, 16) == 16 and step_of(512, 16) == 32 and step_of(32, 8) == 8 and step_of(32, 2) == 2
    assert shapes(32, 8) == [(16, 64), (24, 40), (32, 32), (40, 24), (64, 16)]
    assert [(8 * H, 8 * W) for H, W in shapes(32, 2)] == shapes(256, 16)  # latents and pixels
    with pytest.raises(UserError, match="an image size of 40 must be a multiple of 16"):
        step_of(40, 16)


def test_nearest_treats_portrait_and_landscape_alike():
    of = shapes(512, 32)
    assert [of[k] for k in nearest(of, [1.0, 480 / 640, 640 / 480, 0.01, 100])] == [
        (512, 512), (448, 576), (576, 448), (256, 1024), (1024, 256),
    ]  # fmt: skip
    aspects = np.exp(RNG.uniform(-1.5, 1.5, 100))
    assert [of[k] for k in nearest(of, 1 / aspects)] == [of[k][::-1] for k in nearest(of, aspects)]


def lost(aspects, chosen):
    return np.abs(np.log(aspects)[:, None] - np.log([H / W for H, W in chosen])).min(1).sum()


@pytest.mark.parametrize("count", (1, 2, 3))
def test_choose_is_the_best_of_all_choices(count):
    of = shapes(64, 8)
    for spread in (0.2, 0.6, 1.5):
        aspects = np.exp(RNG.normal(0.3, spread, 25))
        best = min(
            lost(aspects, some) for some in itertools.combinations(of, min(count, len(set(nearest(of, aspects)))))
        )
        chosen = choose(of, aspects, count)
        assert chosen == sorted(chosen, key=lambda shape: shape[0] / shape[1])
        assert len(chosen) == len(set(chosen)) <= count and np.isclose(lost(aspects, chosen), best)


def test_choose_no_more_than_images_want():
    of = shapes(256, 16)
    assert choose(of, [1.5] * 6 + [2 / 3] * 3, 9) == [(208, 304), (304, 208)]
    assert choose(of, [1.5] * 6 + [2 / 3] * 3, 1) == [(304, 208)]


def test_an_image_smaller_than_its_bucket():
    assert fault((64, 96), (64, 96)) is None
    assert fault((63, 200), (64, 96)) == "only 200x63 pixels, and its bucket has 96x64"
    assert fault((200, 95), (64, 96)) == "only 95x200 pixels, and its bucket has 96x64"


@pytest.mark.parametrize("images", ((50, 30, 1), (7,), (4, 4), (0, 5, 0, 3), (100, 1, 1, 1, 1, 1)))
def test_turns_in_proportion_at_any_moment(images):
    turns, total = Turns(images), sum(images)
    seen = np.zeros(len(images), int)
    for n in range(2 * total + 3):
        if n % total == 0:
            assert np.array_equal(seen, n // total * np.array(images))  # each image equally often
        bucket, before = turns.at(n)
        assert before == seen[bucket]
        seen[bucket] += 1
        share = np.array(images) / total
        assert (np.abs(seen - (n + 1) * share) <= 0.5 + len(images) * share / 2 + 1e-9).all()
    far = 10**9 * total + 5
    assert turns.at(far) == (turns.at(5)[0], 10**9 * images[turns.at(5)[0]] + turns.at(5)[1])
