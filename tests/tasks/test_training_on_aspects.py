"""From a folder of pictures of two proportions to a PixArt trained on both: one run, a compilation for each shape."""

import io
import json

import jax
import numpy as np
import pytest
import quick
from PIL import Image

from jaxvram.data.autoencoders import RandomAutoencoder
from jaxvram.data.features import prepare_features
from jaxvram.data.images import ImageDataConfig
from jaxvram.data.prepare_images import prepare_latents
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.pixart import PixArtConfig
from jaxvram.recipe import Recipe
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.loop import Loop
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.sharding import MeshConfig
from jaxvram.train.step import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compile", "no_report")
S, E = 4, 2
MODEL = PixArtConfig(
    n_layer=1, n_head=2, n_embd=12, image_size=8, learn_sigma=False, context_dim=E, context_length=S, micro_conditions=True,
    remat="none", dtype="float32",
)  # fmt: skip


class Letters:
    """Features of a caption: its first letters."""

    length, width = S, E

    def __init__(self):
        self.identity = {"name": "letters", "fingerprint": "1"}

    def check(self, captions):
        pass

    def encode(self, captions):
        letters = [[ord(c) / 128 for c in caption.ljust(S)[:S]] for caption in captions]
        return np.float16(letters)[..., None].repeat(E, -1), np.full(len(captions), S, np.int32)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    top = tmp_path_factory.mktemp("pictures")
    for i in range(15):
        size, colour = ((60, 90), "red") if i % 3 else ((100, 60), "blue")
        Image.new("RGB", size, colour).save(top / f"{i}.png")
        (top / f"{i}.txt").write_text(colour)
    cache = tmp_path_factory.mktemp("cache")
    assert len(prepare_latents(top, cache, RandomAutoencoder(), 64, aspects=2).shapes) == 2
    prepare_features(cache, Letters(), "nowhere")
    return Recipe(
        name="aspects", variant="test", model=MODEL, task=DiffusionConfig(),
        data=ImageDataConfig(name="latents", path=str(cache), val_fraction=0.3),
        optimizer=OptimizerConfig(learning_rate=1e-2, groups={"all": ParamGroup(".*")}),
        train=TrainConfig(steps=8, batch_size=4, microbatch_size=2, log_every=1), eval=EvalConfig(every=0, batches=3),
        sample=DiffusionSampleConfig("ddim", 2, num_samples=2, aspect=1.6), checkpoint=CheckpointConfig(every=0),
        finetune=FinetuneConfig(), mesh=MeshConfig(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def task(recipe):
    # no text encoder is at hand for prompts, so samples are of the empty one
    task = DiffusionTask.of_recipe(recipe)
    task.source.captions = lambda *_: [""]
    return task


def test_a_run(recipe, task, tmp_path):
    loop = Loop(recipe, task, tmp_path / "run", io.StringIO())
    last = loop.run()
    assert np.isfinite(last["loss"]) and last["step"] == 8
    assert loop.program.step._cache_size() == loop.evaluator.sums._cache_size() == 2
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in losses if "split" not in line]) == 8
    with Image.open(tmp_path / "run" / "samples" / "step_000008.png") as shown:
        assert shown.height > shown.width / 2  # two beside each other, each taller than broad


def test_a_batch_of_each_shape_equals_its_pictures_alone(task):
    """Losses and gradients, though shapes, sizes, aspects and texts differ from batch to batch."""
    params = task.init(jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.3 * np.random.RandomState(p.size).standard_normal(p.shape), params)

    @quick.jit
    def learn(params, batch, t_B, eps_BxHxWxC):
        of = lambda p: sum(task.losses(p, batch["images"], task.conditions.of_batch(batch), t_B, eps_BxHxWxC).values())
        return of(params), jax.grad(lambda p: of(p).sum())(params)

    seen = set()
    for n in range(3):
        batch, t_B = task.source.batch("train", n, 2), np.int32([100, 700])
        shape = batch["images"].shape
        if shape in seen:
            continue
        seen.add(shape)
        eps = np.random.RandomState(n).standard_normal(shape).astype(np.float32)
        losses_B, gradient = learn(params, batch, t_B, eps)
        alone = [learn(params, *jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, t_B, eps))) for i in (0, 1)]
        assert quick.relative_error(losses_B, np.concatenate([loss for loss, _ in alone])) < 1e-5
        errors = jax.tree.map(
            lambda got, *each: quick.relative_error(got, sum(each)), gradient, *(of for _, of in alone)
        )
        for attention in ("attn", "cross_attn"):
            errors["blocks"][attention]["c_k"].pop("bias")  # nought but for rounding
        assert max(jax.tree.leaves(errors)) < 1e-4  # the smallest, of where texts are looked at, has lost some digits
    assert len(seen) == 2
