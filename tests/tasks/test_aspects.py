"""Pictures that are not square: what samples are drawn as, what data a model takes, and what a plan is of."""

import io

import jax
import numpy as np
import pytest
from diffusion_tasks import Stub
from PIL import Image
from test_conditions import Captioned, E, S, task_of

from jaxvram.data.buckets import shapes, step_of
from jaxvram.errors import UserError
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask

pytestmark = pytest.mark.usefixtures("quick_compile")
FIELDS = {"num_classes": 0, "context_dim": E, "context_length": S, "image_size": 16, "patch_size": 2, "any_aspect": True}


class Sixteen(Captioned):
    shape, pixel_size = (16, 16, 1), (128, 128)


def reader(say=lambda params, x, t_B, condition: 0 * x, **cfg):
    return Stub(say, **FIELDS | cfg)


@pytest.mark.parametrize(("aspect", "H", "W"), [(1.0, 16, 16), (1.3, 18, 14), (0.25, 8, 32), (2.9, 24, 10)])
def test_samples_of_another_aspect(aspect, H, W):
    """Drawn in the nearest shape, and that is what the model is told."""
    task = task_of(reader(micro_conditions=True), Sixteen(), prompt="a|bb", aspect=aspect)
    condition, _ = task.conditions.asked(4)
    np.testing.assert_array_equal(condition["size_Bx2"], np.tile(np.float32([8 * H, 8 * W]), (4, 1)))
    np.testing.assert_array_equal(condition["aspect_B"], np.full(4, H / W, np.float32))
    fn, args = task.sampling({})
    assert jax.eval_shape(fn, *args).shape == (4, H, W, 1)  # what a plan compiles
    shown = Image.open(io.BytesIO(task.show({}).files[".png"]))
    assert (shown.width + 2) * H == pytest.approx((shown.height + 2) * W, rel=0.2)  # two by two, and what is between


def test_a_picture_to_start_from_is_cut_to_the_aspect(tmp_path):
    Image.new("RGB", (50, 50), "white").save(tmp_path / "white.png")
    task = task_of(reader(), Sixteen(), prompt="a", aspect=4.0, init_image=str(tmp_path / "white.png"))
    task.check_samples()
    assert task._init.shape == (1, 256, 64, 1)  # of a source that does not encode: pixels


@pytest.mark.parametrize(
    ("cfg", "shapes", "aspect", "message"),
    [
        ({"any_aspect": False}, [(16, 16, 1), (8, 32, 1)], 1.0, "hold pictures of 8 x 32, and the model takes squares"),
        ({}, [(16, 16, 1), (5, 50, 1)], 1.0, "5 x 50, no multiple of model.patch_size=2"),
        ({"any_aspect": False}, [(16, 16, 1)], 2.0, "sample.aspect=2.0 is for models of any aspect"),
        ({}, [], 5.0, "sample.aspect=5.0 must lie between 0.25 and 4"),
    ],
)
def test_what_does_not_go_together(cfg, shapes, aspect, message):
    source = Sixteen()
    source.shapes = shapes
    with pytest.raises(UserError, match=message):
        task_of(reader(**cfg), source, aspect=aspect)


def test_no_shape_is_larger_than_the_square_that_is_planned():
    for base, multiple in ((16, 2), (32, 2), (64, 2), (128, 2), (256, 4)):
        model = reader(image_size=base, patch_size=multiple)
        task = DiffusionTask(model, None, DiffusionConfig(), DiffusionSampleConfig("ddim", 2))
        planned = np.prod(task.batch_spec(3)["images"].shape)
        assert max(3 * H * W for H, W in shapes(base, step_of(base, multiple))) == planned
