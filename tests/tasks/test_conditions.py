"""Denoisers that read texts: what they are given, what is dropped, what guidance leads away from, what prompts become."""

import dataclasses
import io
from typing import ClassVar

import jax
import numpy as np
import pytest
import quick
from diffusion_tasks import KEY, Stub, stub_task, watched
from PIL import Image

from jaxvram.errors import UserError
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask

pytestmark = pytest.mark.usefixtures("quick_compile")
S, E = 3, 2


def features(text: str) -> np.ndarray:
    return np.full((S, E), len(text), np.float16)


class Captioned:
    """Grey pictures, each with a caption; features are the caption's length, over and over."""

    shape, num_classes, class_names, downsample, pixel_size = (2, 2, 1), 0, (), 8, (2, 2)
    null: ClassVar = {"context": features(""), "length": np.int32(1)}

    def __init__(self):
        self.encoded = []

    def captions(self, split, n, batch_size, rows=slice(None)):
        return [f"{split} {'x' * i}" for i in range(batch_size)][rows]

    def encode_prompts(self, prompts):
        self.encoded.append(prompts)
        return {"context": np.stack([*map(features, prompts)]), "length": np.int32([len(p) for p in prompts])}

    def to_pixels(self, images):
        return np.repeat(np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8), 3, axis=-1)

    def from_pixels(self, pixels):
        return pixels[..., :1].astype(np.float32) / 255


def reader(say=lambda params, x, t_B, condition: 0 * x, **cfg):
    return Stub(say, **{"num_classes": 0, "context_dim": E, "context_length": S} | cfg)


def task_of(model=None, source=None, task=None, **sample):
    cfg = DiffusionSampleConfig(**{"sampler": "ddim", "steps": 2, "num_samples": 4} | sample)
    return DiffusionTask(model or reader(), source or Captioned(), DiffusionConfig(**(task or {})), cfg)


def batch_of(B, **more):
    context = np.stack([features("x" * (i + 1)) for i in range(B)])
    return {"images": np.zeros((B, 2, 2, 1), np.float32), "context": context, "length": np.full(B, 2, np.int32), **more}


def test_a_batch_is_as_announced():
    spec = task_of().batch_spec(4)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), spec) == jax.tree.map(lambda x: (x.shape, x.dtype), batch_of(4))
    of_tokens = task_of(reader(text_layers=1)).batch_spec(4)
    assert set(of_tokens) == {"images", "tokens", "length"} and of_tokens["tokens"].shape == (4, S)
    with_sizes = task_of(reader(micro_conditions=True)).batch_spec(4)
    assert with_sizes["size"].shape == (4, 2) and with_sizes["aspect"].shape == (4,)


def test_texts_are_dropped_in_training_alone():
    """A dropped one is the empty text with its own length; a picture's size stays."""
    B, model = 2000, reader(micro_conditions=True)
    task = task_of(model, task={"label_dropout": 0.25})
    batch = batch_of(B, size=np.ones((B, 2), np.float32), aspect=np.ones(B, np.float32))
    _, asked = watched(task, lambda: (task.loss({}, batch, KEY), task.evaluation({}, batch, KEY)))
    learnt, held_out = (condition for _, _, condition in asked)
    dropped_B = learnt["length_B"] == 1
    assert abs(dropped_B.mean() - 0.25) < 0.04
    assert (learnt["context_BxSxE"][dropped_B] == 0).all()
    assert (learnt["context_BxSxE"][~dropped_B] == batch["context"][~dropped_B]).all()
    assert (learnt["size_Bx2"] == 1).all() and (learnt["aspect_B"] == 1).all()
    np.testing.assert_array_equal(held_out["context_BxSxE"], batch["context"])


def by_length(params, x, t_B, condition):
    return x + condition["context_BxSxE"].mean((1, 2), dtype=np.float32)[:, None, None, None]


@pytest.mark.parametrize(("negative", "away_from"), [("", 0), ("ugly", 4)])
def test_guidance_leads_away_from_the_empty_or_the_negative_text(negative, away_from):
    task = task_of(reader(by_length), guidance=3.0, negative_prompt=negative, prompt="a cat")
    condition, names = task.conditions.asked(2)
    assert names == ["a cat", "a cat"]
    said, _ = task.denoiser({}, condition)(np.zeros((2, 2, 2, 1), np.float32), np.zeros(2))
    np.testing.assert_allclose(said, away_from + 3 * (5 - away_from), rtol=1e-6)


def test_prompts():
    """In turn, each encoded once, before any weights are needed; without any, captions of held-out pictures."""
    source = Captioned()
    task = task_of(source=source, prompt="a cat | a horse", num_samples=5)
    task.check_samples()
    condition, names = task._asked
    assert names == ["a cat", "a horse", "a cat", "a horse", "a cat"] and source.encoded == [["a cat", "a horse"]]
    assert condition["length_B"].tolist() == [5, 7, 5, 7, 5]
    assert task_of(num_samples=2).conditions.asked(2)[1] == ["val ", "val x"]
    sized, _ = task_of(reader(micro_conditions=True)).conditions.asked(2)
    assert sized["size_Bx2"].tolist() == [[16, 16]] * 2 and sized["aspect_B"].tolist() == [1, 1]


def test_a_grid_has_its_prompts_above():
    task = task_of(prompt="a cat | a horse", num_samples=4)
    task._draw = lambda params, condition, key, init: np.zeros((4, 2, 2, 1))
    samples = task.show({})
    assert samples.text.endswith("a cat, a horse")
    picture = np.asarray(Image.open(io.BytesIO(samples.files[".png"])))
    above = picture.shape[0] - (2 * 66 - 2)
    assert above > 0 and (picture[:above] < 128).any() and (picture[above:, :64] [:64] == 0).all()


def test_an_image_to_start_from(tmp_path):
    """It is read, scaled to the model's size, and where a denoiser that foresees it ends."""
    Image.new("RGB", (6, 4), (255, 255, 255)).save(tmp_path / "white.png")
    say = lambda params, x, t_B, condition: 0 * x + 1
    task = task_of(
        reader(say), task={"prediction": "x0"}, steps=8, strength=0.5, init_image=str(tmp_path / "white.png"), prompt="x"
    )
    task.check_samples()
    np.testing.assert_array_equal(task._init, np.ones((1, 2, 2, 1)))
    images = quick.jit(task.draw)({}, task._asked[0], KEY, task._init)
    np.testing.assert_allclose(images, 1, atol=1e-5)
    with pytest.raises(UserError, match="could not read the picture"):
        task_of(init_image=str(tmp_path / "none.png")).check_samples()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="could not read the picture"):
        task_of(init_image=str(tmp_path / "text.png")).check_samples()


@pytest.mark.parametrize(
    ("model", "sample", "message"),
    [
        (reader(), {"classes": "cat"}, "this one reads text: set sample.prompt"),
        (Stub(), {"prompt": "a cat"}, "sample.prompt is for models that read text"),
        (Stub(), {"negative_prompt": "a cat"}, "sample.prompt is for models that read text"),
    ],
)
def test_what_does_not_go_together(model, sample, message):
    with pytest.raises(UserError, match=message):
        task_of(model, **sample)


def test_data_without_captions():
    source = type("Bare", (), {"shape": (2, 2, 1), "num_classes": 0})()
    with pytest.raises(UserError, match=r"reads features of texts .*, and the data have none: --mode=prepare"):
        task_of(source=source)


def test_data_of_another_text_encoder():
    with pytest.raises(UserError, match=r"gives 3 tokens of 2 .* set model.context_length=3 model.context_dim=2"):
        task_of(reader(context_dim=4))


def test_scores_of_what_is_held_out():
    """The data say which texts nobody trained on, and judge the pictures; encoded with the prompts."""
    source = Captioned()
    source.unseen = lambda count: (["a", "bb"] * (count // 2), np.arange(count))
    source.score = lambda images, labels_N: {"right": float((images[:, 0, 0, 0] == [1, 2, 1, 2]).mean()), "n": len(labels_N)}
    task = task_of(source=source, task={"score_samples": 4}, prompt="x")
    task._draw = lambda params, condition, key, init: condition["length_B"][:, None, None, None] * np.ones((1, 2, 2, 1))
    assert task.scores({}) == {"right": 1.0, "n": 4}
    assert source.encoded == [["x"], ["a", "bb"]]
    assert task_of(task={"score_samples": 4}).scores({}) == {}


def test_a_plan_needs_no_data():
    task = DiffusionTask(
        reader(), None, DiffusionConfig(), DiffusionSampleConfig("ddim", 2, guidance=2.0, prompt="a", negative_prompt="b")
    )
    function, args = task.sampling({})
    assert jax.eval_shape(function, *args).shape == (16, 2, 2, 1)
    assert dataclasses.asdict(stub_task().sample)["prompt"] == ""
