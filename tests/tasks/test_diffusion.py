"""The diffusion task of a DiT: it learns, is guided, and refuses what does not go together."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import quick
from diffusion_tasks import CFG, KEY, Stub, grown, source, stub_task, task_of

from jaxvram.data.images import ImageDataConfig
from jaxvram.errors import UserError
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.dit import DiT
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.sample.noise import Noise
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask
from jaxvram.train.step import loss_and_gradients

pytestmark = pytest.mark.usefixtures("quick_compile")


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
    return quick.jit(lambda params: task.denoiser(params, {"labels_B": labels_B})(x, t_B))(grown())


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
    assert task.denoiser({}, {"labels_B": np.int32([0])})(np.ones((1, 2, 2, 1)), np.zeros(1))[1] is None


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


def test_the_task_of_a_recipe():
    recipe = types.SimpleNamespace(
        model=dataclasses.replace(CFG, channels=1, num_classes=10, learn_sigma=False), task=DiffusionConfig(),
        data=ImageDataConfig("digits"), sample=DiffusionSampleConfig(), train=types.SimpleNamespace(seed=0),
        finetune=FinetuneConfig(),
    )  # fmt: skip
    task = DiffusionTask.of_recipe(recipe)
    assert task.source.num_classes == 10 and isinstance(task.model, DiT)
    assert DiffusionTask.of_recipe(recipe, with_data=False).source is None


def test_the_noise_of_a_task_is_that_of_its_settings():
    cfg = DiffusionConfig("cosine", "v", 400, True)
    assert stub_task(**dataclasses.asdict(cfg)).noise == Noise("cosine", "v", 400, True)
