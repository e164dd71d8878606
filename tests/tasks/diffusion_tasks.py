"""Small diffusion tasks: of a stub that says what it is told, and of a real DiT."""

import dataclasses
import functools
import types

import jax
import numpy as np
import quick

from jaxvram.data.images import Arrays, ArraySource, ImageDataConfig
from jaxvram.models.dit import DiT, DiTConfig
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask

CLASSES = ("ant", "bee", "cat")
KEY = jax.random.key(3)
# A DiT of 8 x 8 pixels, of which no weight is zero.
CFG = DiTConfig(
    image_size=8, channels=4, patch_size=4, num_classes=3, n_layer=1, n_head=2, n_embd=16, remat="none", dtype="float32"
)


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
