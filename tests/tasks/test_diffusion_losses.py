"""What the diffusion task learns: losses, their weights, timesteps, dropped labels; and what evaluation tells of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from diffusion_tasks import KEY, Stub, batch_of, stub_task, watched

from jaxvram.sample.noise import over_image
from jaxvram.tasks.diffusion import DiffusionConfig
from jaxvram.train.step import loss_and_gradients

pytestmark = pytest.mark.usefixtures("quick_compile")
COMBINATIONS = [
    *((s, p, False) for s in ("linear", "scaled_linear", "cosine") for p in ("epsilon", "v", "x0")),
    *((s, p, True) for s in ("linear", "cosine") for p in ("v", "x0")),
    ("flow", "velocity", False),
]  # fmt: skip


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
        losses.append(task.losses({}, images, {"labels_B": np.zeros(5, np.int32)}, t_B, images[::-1])["mse"])
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
