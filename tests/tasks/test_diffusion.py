"""The diffusion task: losses, timesteps, dropped labels, guidance, samples, and what it refuses."""

import dataclasses
import functools
import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from PIL import Image

from jaxvram.data.images import Arrays, ArraySource, ImageDataConfig
from jaxvram.errors import UserError
from jaxvram.models.dit import DiT, DiTConfig
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.sample.noise import Noise, over_image
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask
from jaxvram.tasks.judge import Judge
from jaxvram.train.step import loss_and_gradients

pytestmark = pytest.mark.usefixtures("quick_compile")
CLASSES = ("ant", "bee", "cat")
KEY = jax.random.key(3)
COMBINATIONS = [
    *((s, p, False) for s in ("linear", "scaled_linear", "cosine") for p in ("epsilon", "v", "x0")),
    *((s, p, True) for s in ("linear", "cosine") for p in ("v", "x0")),
    ("flow", "velocity", False),
]  # fmt: skip


class Stub:
    """A denoiser of 2 x 2 pixels that says `say(params, x, t_B, labels_B)` and remembers what it was asked."""

    def __init__(self, say=lambda params, x, t_B, labels_B: 0 * x, **cfg):
        usual = {"image_size": 2, "channels": 1, "num_classes": 3, "learn_sigma": False}
        self.cfg = types.SimpleNamespace(**usual | cfg)
        self.say, self.asked = say, []

    def apply(self, variables, x, t_B, labels_B):
        self.asked.append((x, t_B, labels_B))
        return self.say(variables["params"], x, t_B, labels_B)


def watched(task, run):
    """(what `run()` returns, [(x, t_B, labels_B)] that the model was asked), from one small program."""

    def both():
        task.model.asked.clear()
        return run(), task.model.asked

    return jax.tree.map(np.asarray, quick.jit(both)())


def stub_task(model=None, sample=None, **cfg):
    sampler = "euler" if cfg.get("schedule") == "flow" else "ddim"
    return DiffusionTask(model or Stub(), None, DiffusionConfig(**cfg), sample or DiffusionSampleConfig(sampler, 2))


def batch_of(B, channels=1, classes=3):
    random = np.random.RandomState(B)
    images = random.uniform(-1, 1, (B, 2, 2, channels)).astype(np.float32)
    return {"images": images, "labels": random.randint(0, classes, B).astype(np.int32)}


def of_names(schedule, prediction, zero_snr):
    return {"schedule": schedule, "prediction": prediction, "zero_terminal_snr": zero_snr}


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_losses(combination):
    """Nothing for who knows the image, else finite: the mean square of what should have been said."""
    cfg, batch = of_names(*combination), batch_of(32)
    noise = DiffusionConfig(**cfg).noise

    def says_right(x0, x_t, t_B, labels_B):
        alpha, sigma = map(over_image, noise.alpha_sigma(t_B))
        return noise.target(x0, noise.eps_of(x_t, x0, alpha, sigma), t_B)

    losses = {}
    for name, say in (("right", says_right), ("nothing", lambda _, x, *rest: 0 * x)):
        loss_sum, weight, parts = stub_task(Stub(say), **cfg).loss(batch["images"], batch, KEY)
        assert weight == 32 and weight.dtype == jnp.float32 and parts == {}
        losses[name] = float(loss_sum) / 32
    assert losses["right"] < 1e-6 and 0.1 < losses["nothing"] < 3


@pytest.mark.parametrize(
    "combination",
    [*(("linear", p, False) for p in ("epsilon", "v", "x0")), *(("cosine", p, True) for p in ("v", "x0"))],
    ids=str,
)
def test_losses_with_a_learnt_variance(combination):
    """Loss and gradients are finite from the first timestep to the last; the bound teaches the variance alone."""
    cfg = of_names(*combination) | {"timesteps": 8}
    batch = batch_of(64)  # so many that each of eight timesteps is drawn
    task = stub_task(Stub(lambda said, *rest: said, learn_sigma=True), **cfg)
    plain = stub_task(Stub(lambda said, *rest: said), **cfg)
    said = np.random.RandomState(0).uniform(-1, 1, (64, 2, 2, 2)).astype(np.float32)
    total = lambda task: jax.value_and_grad(lambda said: task.loss(said, batch, KEY)[::2], has_aux=True)
    of_both = quick.jit(lambda said: (total(task)(said), total(plain)(said[..., :1])))
    ((loss, parts), gradient), ((mse, _), gradient_of_mse) = jax.tree.map(np.asarray, of_both(said))
    assert set(parts) == {"mse", "bound"} and np.isfinite(gradient).all()
    np.testing.assert_allclose(parts["mse"], mse, rtol=1e-6)
    np.testing.assert_allclose(parts["mse"] + parts["bound"], loss, rtol=1e-6)
    np.testing.assert_array_equal(gradient[..., :1], gradient_of_mse)
    assert gradient[..., 1:].any()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_min_snr_weights(prediction):
    """min(snr, gamma) / snr of epsilon, / (snr + 1) of v (diffusers' training scripts), itself of x0 (Hang et al.)."""
    gamma, t_B = 5.0, np.int32([0, 10, 100, 400, 999])
    losses, images = [], batch_of(5)["images"]
    for min_snr_gamma in (0.0, gamma):
        task = stub_task(prediction=prediction, min_snr_gamma=min_snr_gamma)
        losses.append(task.losses({}, images, np.zeros(5, np.int32), t_B, images[::-1])["mse"])
    snr_B = task.noise.alpha_bar_T[t_B] / (1 - task.noise.alpha_bar_T[t_B])
    least_B = np.stack([snr_B, gamma * np.ones(5)]).min(0)
    want_B = {"epsilon": least_B / snr_B, "v": least_B / (snr_B + 1), "x0": least_B}[prediction]
    np.testing.assert_allclose(losses[1] / losses[0], want_B, rtol=1e-5)


def test_sums_of_microbatches_are_added():
    """Each draws for itself, so they are not one batch; loss and gradient are the means over all images all the same."""
    task, batch = stub_task(Stub(lambda w, x, *rest: w * x)), batch_of(12)
    loss, gradient, _ = quick.jit(functools.partial(loss_and_gradients, task, microbatches=3))(0.7, batch, KEY)
    rows = lambda j: {name: values[j::3] for name, values in batch.items()}
    of_part = jax.value_and_grad(lambda w, j, key: task.loss(w, rows(j), key)[0])
    parts = [of_part(0.7, j, key) for j, key in enumerate(jax.random.split(KEY, 3))]
    np.testing.assert_allclose([loss, gradient], np.sum(parts, axis=0) / 12, rtol=1e-5)
    assert len({float(part) / 4 for part, _ in parts}) == 3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_labels_are_dropped_in_training_alone(dropout):
    """As often as asked for, each for itself, and become the class of none; evaluation drops none."""
    B, batch, task = 4000, batch_of(4000), stub_task(label_dropout=dropout)

    def three():
        task.loss({}, batch, KEY)
        task.loss({}, batch, jax.random.key(4))
        task.evaluation({}, batch, KEY)

    _, asked = watched(task, three)
    first, second, held_out = (labels_B for _, _, labels_B in asked)
    for labels_B in (first, second):
        dropped_B = labels_B == 3
        assert abs(dropped_B.mean() - dropout) < 4 * np.sqrt(dropout * (1 - dropout) / B) + 1e-9
        assert (labels_B[~dropped_B] == batch["labels"][~dropped_B]).all()
    assert (first != second).any() == (dropout > 0)
    np.testing.assert_array_equal(held_out, batch["labels"])


def test_a_model_without_classes_sees_no_labels():
    task = stub_task(Stub(num_classes=0))
    _, asked = watched(task, lambda: (task.loss({}, batch_of(4), KEY), task.evaluation({}, batch_of(4), KEY)))
    assert [labels_B for _, _, labels_B in asked] == [None, None]


@pytest.mark.parametrize("schedule", ["linear", "flow"])
@pytest.mark.parametrize("B", [20, 7])
def test_evaluation(schedule, B):
    """The same at each call; a timestep from each of B equal parts; the tenths' sums and weights add up to the loss."""
    cfg = of_names(schedule, "velocity" if schedule == "flow" else "epsilon", False)
    task = stub_task(timestep_sampling="logit_normal", **cfg)  # which only training follows
    evaluation = quick.jit(lambda key: task.evaluation({}, batch_of(B), key))
    found, again, other = (evaluation(key) for key in (KEY, KEY, jax.random.key(4)))
    assert found == again and found["loss"] != other["loss"]
    assert sorted(found) == ["loss", *(f"loss_t{i}00" for i in range(10))]
    _, [(_, t_B, _)] = watched(task, lambda: task.evaluation({}, batch_of(B), KEY))
    assert (np.floor(t_B / 1000 * B + (0 if schedule == "flow" else 1e-3)) == np.arange(B)).all()
    of_buckets = np.array([found[f"loss_t{i}00"] for i in range(10)])
    np.testing.assert_allclose(of_buckets.sum(0), found["loss"], rtol=1e-6)
    np.testing.assert_array_equal(of_buckets[:, 1], np.bincount((t_B // 100).astype(int), minlength=10))
    eps_mse_B = np.square(np.asarray(jax.random.normal(jax.random.split(KEY)[1], (B, 2, 2, 1)))).mean((1, 2, 3))
    if schedule == "linear":  # nothing is said, so an image's loss is the mean square of its noise
        of_each = [eps_mse_B[t_B // 100 == i].sum() for i in range(10)]
        np.testing.assert_allclose(of_buckets[:, 0], of_each, rtol=1e-5, atol=1e-6)


def test_evaluation_tells_the_parts_of_a_hybrid_loss():
    said = np.zeros((6, 2, 2, 2), np.float32)
    task = stub_task(Stub(lambda said, *rest: said, learn_sigma=True))
    found = quick.jit(lambda: task.evaluation(said, batch_of(6), KEY))()
    np.testing.assert_allclose(found["mse"][0] + found["bound"][0], found["loss"][0], rtol=1e-6)
    assert found["mse"][1] == found["bound"][1] == 6


@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_timesteps_of_training(schedule):
    """Uniform: all alike, the first and the last among them. Logit-normal: logit(t / T) is standard normal."""
    B, T = 20_000, 50
    cfg = of_names(schedule, "velocity" if schedule == "flow" else "epsilon", False) | {"timesteps": T}
    drawn = {}
    for sampling in ("uniform", "logit_normal"):
        task = stub_task(timestep_sampling=sampling, **cfg)
        _, [(_, drawn[sampling], _)] = watched(task, lambda task=task: task.loss({}, batch_of(B), KEY))
    for t_B in drawn.values():
        assert t_B.dtype == (np.float32 if schedule == "flow" else np.int32) and t_B.min() >= 0 and t_B.max() < T
    counts = np.histogram(drawn["uniform"], T, (0, T))[0]
    assert (np.abs(counts - B / T) < 4.5 * np.sqrt(B / T)).all()
    share_B = (drawn["logit_normal"] + (0 if schedule == "flow" else 0.5)) / T  # of a whole timestep its middle
    logit_B = np.log(share_B / (1 - share_B))
    # the means of 20,000 are off by 1 / 141; whole timesteps are coarse
    np.testing.assert_allclose([logit_B.mean(), logit_B.std()], [0, 1], atol=0.03)
    inside = (np.abs(logit_B) < 1).mean() if schedule == "flow" else 0.683
    assert abs(inside - 0.683) < 0.015


# A DiT of 8 x 8 pixels, of which no weight is zero.
CFG = DiTConfig(
    image_size=8, channels=4, patch_size=4, num_classes=3, n_layer=1, n_head=2, n_embd=16, remat="none", dtype="float32"
)


def source(channels=4, classes=CLASSES, size=8):
    random = np.random.RandomState(0)
    images = random.uniform(-1, 1, (20, size, size, channels)).astype(np.float32)
    half = Arrays(images, random.randint(0, max(len(classes), 1), 20), np.arange(20))
    return ArraySource({"train": half, "val": half}, images.shape[1:], classes, ImageDataConfig("npz"), 0, "toys")


def task_of(model=None, data=None, task=None, **sample):
    sample = DiffusionSampleConfig(**{"sampler": "ddim", "steps": 2} | sample)
    model = DiT(dataclasses.replace(CFG, **(model or {})))
    return DiffusionTask(model, data, DiffusionConfig(**(task or {})), sample)


@functools.cache
def grown(cfg=CFG):
    params = jax.eval_shape(DiffusionTask(DiT(cfg), None, DiffusionConfig(), DiffusionSampleConfig()).init, KEY)
    random = np.random.RandomState(1)
    return jax.tree.map(lambda p: random.normal(0, 0.3, p.shape).astype(np.float32), params)


def test_a_dit_learns():
    """From its own starting weights, compiled: a batch as announced, a finite loss, gradients where adaLN-Zero has any."""
    data = source()
    task = task_of({}, data, {"min_snr_gamma": 5.0})
    batch = data.batch("train", 0, 6)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
        lambda s: (s.shape, s.dtype), task.batch_spec(6)
    )

    def learn():
        params = task.init(KEY)
        return loss_and_gradients(task, params, batch, KEY), task.evaluation(params, batch, KEY)

    (loss, gradients, parts), found = jax.tree.map(np.asarray, quick.jit(learn)())
    assert 0 < loss < 100 and set(parts) == {"mse", "bound"} < set(found)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, found)))
    assert gradients["final"]["linear"]["kernel"].any()
    assert task.data_identity == data.identity and (task.unit, task.units_per_example) == ("images", 1)


def said_of(task, labels_B, x, t_B):
    return quick.jit(lambda params: task.denoiser(params, labels_B)(x, t_B))(grown())


def test_guidance():
    """w = 1 is the model itself; w = 3 is uncond + 3 (cond - uncond), of three channels if so asked, never of variances."""
    random = np.random.RandomState(5)
    x = random.normal(0, 1, (3, 8, 8, 4)).astype(np.float32)
    t_B, labels_B, none_B = np.float32([0, 30, 999]), np.int32([2, 0, 1]), np.int32([3, 3, 3])
    apply = quick.jit(lambda params, labels_B: DiT(CFG).apply({"params": params}, x, t_B, labels_B))
    conditional, unconditional = (np.asarray(apply(grown(), labels)) for labels in (labels_B, none_B))
    assert quick.relative_error(conditional, unconditional) > 0.1
    cond, uncond, place = conditional[..., :4], unconditional[..., :4], conditional[..., 4:]
    all_4 = uncond + 3 * (cond - uncond)
    first_3 = np.concatenate([all_4[..., :3], cond[..., 3:]], axis=-1)
    for options, want in (
        ({}, cond), ({"guidance": 0.0}, uncond), ({"guidance": 3.0}, all_4),
        ({"guidance": 3.0, "guidance_channels": "first3"}, first_3),
    ):  # fmt: skip
        said, fraction = said_of(task_of(**options), labels_B, x, t_B)
        assert quick.relative_error(said, want) < 1e-5, options
        assert quick.relative_error(fraction, (place + 1) / 2) < 1e-5, options


def test_a_model_of_fixed_variance_tells_none():
    task = stub_task(Stub(lambda params, x, *rest: x), DiffusionSampleConfig("ddim", 2, guidance=2.0))
    assert task.denoiser({}, np.int32([0]))(np.ones((1, 2, 2, 1)), np.zeros(1))[1] is None


@pytest.mark.parametrize(
    ("model", "data", "task", "sample", "message"),
    [
        ({}, {}, {"label_dropout": 0.0}, {"guidance": 2.0}, "task.label_dropout=0 teaches no 'no class'; set it to 1"),
        ({"num_classes": 0}, {}, {}, {"guidance": 2.0}, "nothing to measure from: the model has no classes"),
        ({"num_classes": 5}, {}, {}, {}, "the data have 3 classes, the model model.num_classes=5: set it to 3"),
        ({}, {"channels": 1}, {}, {}, r"8 x 8 with 1 channels.*set model.image_size=8 model.channels=1"),
        ({"image_size": 16}, {}, {}, {}, r"the model is for \(16, 16, 4\): set model.image_size=8 model.channels=4"),
        ({}, {}, {"schedule": "flow", "prediction": "velocity"}, {}, "model.learn_sigma=True has no meaning"),
        ({}, {}, {"schedule": "flow"}, {}, "go together"),
        ({}, {}, {}, {"sampler": "heun"}, "sample.sampler=heun is not for task.schedule=linear"),
        ({}, {}, {"timesteps": 10}, {"steps": 11}, "at most 10"),
        ({}, {}, {"timestep_sampling": "logitnormal"}, {}, "did you mean 'logit_normal'"),
        ({}, {}, {"label_dropout": 1.0}, {}, r"label_dropout must be in \[0, 1\)"),
        ({}, {}, {"min_snr_gamma": -1.0}, {}, "not negative"),
        ({}, {}, {"prediction": "velocity", "min_snr_gamma": 5.0}, {}, "min_snr_gamma has no meaning"),
    ],
)
def test_what_does_not_go_together(model, data, task, sample, message):
    with pytest.raises(UserError, match=message):
        task_of(model, source(**data), task, **sample)


def test_images_that_are_not_square():
    data = source()
    data.shape = (8, 6, 4)
    with pytest.raises(UserError, match="images must be square"):
        task_of({}, data)


def test_a_model_may_ignore_the_datas_classes():
    task_of({"num_classes": 0}, source())


@pytest.mark.parametrize(
    ("classes", "labels"),
    [("", [0, 1, 2, 0, 1]), ("cat", [2] * 5), ("2, ant", [2, 0, 2, 0, 2]), ("1,1,bee,0", [1, 1, 1, 0, 1])],
)
def test_classes_by_name_and_number(classes, labels):
    task = task_of({}, source(), classes=classes)
    task.check_samples()
    assert task._labels(5).tolist() == labels and task._labels(5).dtype == np.int32


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

    def draw(params, labels_B, key):
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
    images = task._images({}, task._labels(count), seed=0)
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
    task._draw = lambda params, labels_B, key: jnp.zeros((len(labels_B), 2, 2, 1))
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


def test_the_task_of_a_recipe():
    recipe = types.SimpleNamespace(
        model=dataclasses.replace(CFG, channels=1, num_classes=10, learn_sigma=False), task=DiffusionConfig(),
        data=ImageDataConfig("digits"), sample=DiffusionSampleConfig(), train=types.SimpleNamespace(seed=0),
    )  # fmt: skip
    task = DiffusionTask.of_recipe(recipe)
    assert task.source.num_classes == 10 and isinstance(task.model, DiT)
    assert DiffusionTask.of_recipe(recipe, with_data=False).source is None


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


def test_the_noise_of_a_task_is_that_of_its_settings():
    cfg = DiffusionConfig("cosine", "v", 400, True)
    assert stub_task(**dataclasses.asdict(cfg)).noise == Noise("cosine", "v", 400, True)
