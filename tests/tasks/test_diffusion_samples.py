"""Samples of the diffusion task: of which classes, drawn in batches, shown as a grid, planned for and scored."""

import dataclasses
import functools
import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from diffusion_tasks import CFG, KEY, Stub, grown, source, task_of
from PIL import Image

from jaxvram.errors import UserError
from jaxvram.models.dit import DiT
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask
from jaxvram.tasks.judge import Judge

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
    ("classes", "labels"),
    [("", [0, 1, 2, 0, 1]), ("cat", [2] * 5), ("2, ant", [2, 0, 2, 0, 2]), ("1,1,bee,0", [1, 1, 1, 0, 1])],
)
def test_classes_by_name_and_number(classes, labels):
    task = task_of({}, source(), classes=classes)
    task.check_samples()
    (condition, names), words = task.conditions.asked(5), ("ant", "bee", "cat")
    assert condition["labels_B"].tolist() == labels and condition["labels_B"].dtype == np.int32
    assert names == [words[label] for label in labels]


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [
        ({}, "cot", r"'cot' is no class; numbers are 0 to 2; did you mean 'cat'\? \(valid: ant, bee, cat\)"),
        ({}, "ant, 3", "'3' is no class"),
        ({}, "-1", "'-1' is no class"),
        ({"num_classes": 0}, "ant", "the model has no classes"),
    ],
)
def test_unknown_classes(model, classes, message):
    with pytest.raises(UserError, match=message):
        task_of(model, source(), classes=classes).check_samples()


def numbered_task(**sample):
    """A task of which the images tell their label and their key, and the list of batches drawn."""
    task, batches = task_of({}, source(), **sample), []

    def draw(params, condition, key, init):
        labels_B = condition["labels_B"]
        batches.append(labels_B.tolist())
        random = np.random.RandomState(np.asarray(jax.random.key_data(key))).uniform(size=(len(labels_B), 8, 8, 4))
        random[:, 0, 0, 0] = labels_B
        return random

    task._draw = draw
    return task, batches


@pytest.mark.parametrize(
    ("count", "batch_size", "batches"),
    [(5, 2, [[0, 1], [2, 0], [1, 1]]), (5, 4, [[0, 1, 2, 0], [1, 1, 1, 1]]), (4, 64, [[0, 1, 2, 0]]), (1, 1, [[0]])],
)
def test_samples_are_drawn_in_batches_of_one_size(count, batch_size, batches):
    """The last is filled up, and what fills it is thrown away."""
    task, drawn = numbered_task(batch_size=batch_size)
    images = task._images({}, task.conditions.asked(count)[0], seed=0)
    assert drawn == batches and images.shape == (count, 8, 8, 4)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1][:count]
    assert len({image[1:].tobytes() for image in images}) == count  # no two batches take the same draws


def png_of(samples):
    return Image.open(io.BytesIO(samples.files[".png"]))


@functools.cache
def shown(seed):
    """(text, picture, pixels) of 5 samples, 2 at a time, of a grey model."""
    cfg = dataclasses.replace(CFG, channels=1)
    sample = DiffusionSampleConfig("ddpm", 3, guidance=2.0, num_samples=5, batch_size=2, seed=seed, classes="cat,0")
    task = DiffusionTask(DiT(cfg), source(1), DiffusionConfig(), sample)
    task._draw = quick.jit(task.draw)
    samples = task.show_on_request(grown(cfg))
    assert task._draw._cache_size() == 1
    with np.load(io.BytesIO(samples.files[".npz"])) as file:
        assert file.files == ["arr_0"]
        return samples.text, png_of(samples), file["arr_0"]


def test_what_is_shown():
    """A grid with a column for each class asked for, and all images as ADM's evaluation suite reads them."""
    text, picture, pixels = shown(0)
    assert text == "5 images by ddpm, 3 steps, guidance 2: cat, ant"
    assert pixels.shape == (5, 8, 8, 3) and pixels.dtype == np.uint8
    side = 64  # eight times as large, so that a person sees them; 2 white pixels between
    assert picture.size == (2 * side + 2, 3 * side + 2 * 2) and picture.mode == "RGB"
    grid = np.asarray(picture)
    for i, image in enumerate(pixels):
        y, x = i // 2 * (side + 2), i % 2 * (side + 2)
        np.testing.assert_array_equal(grid[y : y + side : 8, x : x + side : 8], image)
    assert (grid[side : side + 2] == 255).all() and (grid[-side:, side + 2 :] == 255).all()


def test_the_seed_decides():
    first, again, other = shown(0), shown.__wrapped__(0), shown(1)
    np.testing.assert_array_equal(first[2], again[2])
    assert (first[2] != other[2]).mean() > 0.1


def test_a_grid_without_classes_is_nearly_square():
    sample = DiffusionSampleConfig(num_samples=7)
    task = DiffusionTask(Stub(num_classes=0), source(1, size=2), DiffusionConfig(), sample)
    task._draw = lambda params, condition, *_: jnp.zeros((len(condition["labels_B"]), 2, 2, 1))
    samples = task.show({})
    assert set(samples.files) == {".png"} and samples.text == "7 images by ddpm, 250 steps, guidance 1"
    assert png_of(samples).size == (3 * 66 - 2, 3 * 66 - 2)


def test_sampling_for_a_plan():
    """Without data, by shapes alone; as many rows as a run compiles for."""
    for sample, rows in (
        ({"num_samples": 5, "batch_size": 64}, 9), ({"num_samples": 16, "batch_size": 64}, 16),
        ({"num_samples": 16, "batch_size": 4}, 4),
    ):  # fmt: skip
        task = task_of({"remat": "full"}, None, {"score_samples": 9}, **sample)
        params = jax.eval_shape(task.init, KEY)
        function, args = task.sampling(params)
        out = jax.eval_shape(function, *args)
        assert out.shape == (rows, 8, 8, 4) and out.dtype == jnp.float32


def test_scores(monkeypatch):
    """Every class in turn, whatever is to be shown, by the judge, trained once, and by the data's own rules."""
    trained, judged = [], []
    scores = lambda images, labels_N: judged.append(labels_N.tolist()) or {"agreement": 0.5}
    judge = types.SimpleNamespace(scores=scores)
    monkeypatch.setattr(Judge, "trained_on", lambda source: trained.append(source) or judge)
    task, _ = numbered_task(classes="cat")
    assert task.scores({}) == {} and not trained
    task.cfg = DiffusionConfig(score_samples=4)
    assert task.scores({}) == task.scores({}) == {"agreement": 0.5}
    assert judged == [[0, 1, 2, 0]] * 2 and trained == [task.source]
    task.source.score = lambda images, labels_N: {"colour": float(images[1, 0, 0, 0])}
    assert task.scores({}) == {"agreement": 0.5, "colour": 1.0}
