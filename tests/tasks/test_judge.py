"""The distance of features against scipy's matrix root, and a judge that can be trusted with digits."""

import types

import jax
import numpy as np
import pytest
import quick

from jaxvram.data.images import ImageDataConfig, load
from jaxvram.tasks import judge
from jaxvram.tasks.judge import FEATURES, Classifier, Judge, frechet, normal


def features(seed, N=300, shift=0.0):
    random = np.random.RandomState(seed)
    return random.normal(0, 1, (N, 12)) @ random.normal(0, 1, (12, 12)) + shift


def test_frechet_is_the_formula_with_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    few = (features(4, N=5), features(5, N=8))
    for a, b in ((features(0), features(1)), (features(2, shift=3.0), features(3)), few):
        (mean_1, covariance_1), (mean_2, covariance_2) = normal(a), normal(b)
        np.testing.assert_allclose(covariance_1, (a - a.mean(0)).T @ (a - a.mean(0)) / (len(a) - 1), atol=1e-12)
        # of the few features of a singular covariance scipy's root is good to half of fp64's digits
        root = linalg.sqrtm(covariance_1 @ covariance_2).real
        want = ((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1 + covariance_2 - 2 * root)
        assert frechet(mean_1, covariance_1, mean_2, covariance_2) == pytest.approx(want, rel=1e-5)


def test_frechet_of_the_same_is_nothing_and_of_both_ways_the_same():
    one, other = normal(features(0)), normal(features(1))
    scale = np.trace(one[1])
    assert abs(frechet(*one, *one)) < 1e-12 * scale
    assert frechet(*one, *other) == pytest.approx(frechet(*other, *one), rel=1e-10)
    moved = normal(features(0) + 0.5)  # by 0.5 in each of 12
    assert frechet(*one, *moved) == pytest.approx(12 * 0.25, rel=1e-9)
    assert frechet(np.zeros(2), np.diag([4.0, 9.0]), np.zeros(2), np.diag([1.0, 1.0])) == pytest.approx(1 + 4)


def test_dead_features_do_no_harm():
    """ReLUs that never fire have no variance: roots of rounded zeros are not NaN."""
    dead = features(0).astype(np.float32)
    dead[:, 3:7] = 0
    found = frechet(*normal(dead), *normal(dead[::-1]))
    assert np.isfinite(found) and abs(found) < 1e-4


@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 16, 3), (32, 32, 4), (256, 256, 3), (6, 6, 1), (9, 9, 2)])
def test_any_size_is_judged(shape):
    """With few features from 16 places, however large the image is."""
    images = jax.ShapeDtypeStruct((5, *shape), np.float32)
    (logits, features), variables = jax.eval_shape(Classifier(7).init_with_output, jax.random.key(0), images)
    assert logits.shape == (5, 7) and features.shape == (5, FEATURES)
    assert sum(x.size for x in jax.tree.leaves(variables)) < 250_000


def test_scores(monkeypatch):
    """What a table shows; of the held-out images themselves, the judge's own accuracy and no distance."""
    monkeypatch.setattr(judge, "STEPS", 3)
    monkeypatch.setattr(jax, "jit", quick.jit)
    random = np.random.RandomState(0)
    images, labels = random.uniform(-1, 1, (70, 4, 4, 1)).astype(np.float32), np.arange(70, dtype=np.int32) % 2
    some = lambda limit: (images[:limit], labels[:limit])
    source = types.SimpleNamespace(num_classes=2, train_images=some, val_images=some)
    made, again = Judge.trained_on(source), Judge.trained_on(source)
    scores = made.scores(images, labels)
    assert set(scores) == {"class_agreement", "judge_accuracy", "frechet_classifier"}
    assert scores["class_agreement"] == scores["judge_accuracy"] == made.accuracy > 0
    assert abs(scores["frechet_classifier"]) < 1e-4
    assert made.scores(images, 1 - labels)["class_agreement"] == pytest.approx(1 - made.accuracy)
    np.testing.assert_array_equal(again.mean_F, made.mean_F)  # the same judge each time


@pytest.mark.slow
def test_a_judge_of_digits(monkeypatch):
    """Right on 95 of 100 held-out digits; noise is no digit to it, one digit for all ten agrees with one in ten."""
    monkeypatch.setattr(judge, "STEPS", 100)  # a sixth of what it takes in a run
    source = load(ImageDataConfig("digits"), seed=0)
    made = Judge.trained_on(source)
    assert made.accuracy > 0.95
    val_images, val_labels = source.val_images(10**6)
    train = made.scores(*source.train_images(180))
    noise = made.scores(np.random.RandomState(0).normal(0, 0.5, val_images.shape).astype(np.float32), val_labels)
    one = made.scores(np.repeat(val_images[:1], 180, 0), val_labels)
    assert train["class_agreement"] > 0.95
    assert noise["class_agreement"] < 0.3 and one["class_agreement"] < 0.15
    # other images of the same kind are near, all else is far
    far = min(noise["frechet_classifier"], one["frechet_classifier"])
    assert 0 < train["frechet_classifier"] < 0.2 * far
