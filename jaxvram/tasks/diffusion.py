"""Diffusion: what a denoiser learns, what is measured, and the images it shows. One task for every denoiser.

A denoiser is a Linen module `model(x_BxHxWxC, t_B, labels_B) -> (B, H, W, C or 2 C)` with `cfg.image_size`, `.channels`,
`.num_classes`, `.learn_sigma`; class number `num_classes` means "none".
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram import models
from jaxvram.data import images
from jaxvram.errors import UserError, nearest
from jaxvram.sample import diffusion as samplers
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.sample.noise import Noise, over_image
from jaxvram.tasks.judge import Judge
from jaxvram.tasks.samples import Samples, grid_png, npz
from jaxvram.tasks.variational import bound_in_bits

BUCKETS = 10  # of timesteps, in which the validation loss is told
SAMPLINGS = ("uniform", "logit_normal")
MINSNR_OF = {  # weight of the plain loss, of the SNR and gamma (Hang et al. 2023, arXiv:2303.09556)
    "epsilon": lambda snr, gamma: jnp.minimum(snr, gamma) / snr,
    "v": lambda snr, gamma: jnp.minimum(snr, gamma) / (snr + 1),
    "x0": lambda snr, gamma: jnp.minimum(snr, gamma),
}


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    schedule: str = "linear"  # linear | scaled_linear | cosine | flow
    prediction: str = "epsilon"  # epsilon | v | x0; velocity for flow
    timesteps: int = 1000  # T
    zero_terminal_snr: bool = False  # the last timestep is noise alone; with v and x0
    timestep_sampling: str = "uniform"  # uniform | logit_normal (more from the middle: Esser et al. 2024)
    min_snr_gamma: float = 0.0  # 5 is usual; 0: every timestep weighs the same
    label_dropout: float = 0.1  # share of labels replaced by "none", for guidance
    score_samples: int = 0  # samples scored at each evaluation; 0: none

    def __post_init__(self):
        if self.timestep_sampling not in SAMPLINGS:
            which = f"task.timestep_sampling={self.timestep_sampling!r}"
            raise UserError(f"{which} is unknown{nearest(self.timestep_sampling, SAMPLINGS)}")
        if not 0 <= self.label_dropout < 1 or min(self.min_snr_gamma, self.score_samples) < 0:
            raise UserError("task: label_dropout must be in [0, 1), min_snr_gamma and score_samples not negative")
        if self.min_snr_gamma and self.prediction not in MINSNR_OF:
            raise UserError(f"task.min_snr_gamma has no meaning with task.prediction={self.prediction}: set it to 0")

    @property
    def noise(self) -> Noise:
        return Noise(self.schedule, self.prediction, self.timesteps, self.zero_terminal_snr)


class DiffusionTask:
    """What a train loop, a plan and a sampler need to know of diffusion.

    Args:
      model: a denoiser.
      source: images (data/images.py); None for a plan, which reads shapes alone.
    Raises:
      UserError: the data are not of the model's shape or classes, or settings that do not go together.
    """

    unit, units_per_example = "images", 1
    SECTIONS: ClassVar = {"task": DiffusionConfig, "data": images.ImageDataConfig, "sample": DiffusionSampleConfig}

    @classmethod
    def of_recipe(cls, recipe, with_data: bool = True, say: Callable[[str], None] = lambda _: None) -> "DiffusionTask":
        """The task of a recipe. Without data, for a plan: the model says what shape they have."""
        if recipe.finetune.method != "none":
            raise UserError(f"finetune.method={recipe.finetune.method} is for language models: set it to none")
        source = images.load(recipe.data, recipe.train.seed) if with_data else None
        return cls(models.build(recipe.model), source, recipe.task, recipe.sample)

    def __init__(self, model, source, cfg: DiffusionConfig, sample: DiffusionSampleConfig):
        self.model, self.source, self.cfg, self.sample = model, source, cfg, sample
        self.noise = cfg.noise
        of_model = model.cfg
        if of_model.learn_sigma and self.noise.is_flow:
            raise UserError("model.learn_sigma=True has no meaning with task.schedule=flow: set it to False")
        if sample.guidance != 1 and not (of_model.num_classes and cfg.label_dropout):
            why = "the model has no classes" if not of_model.num_classes else "task.label_dropout=0 teaches no 'no class'"
            raise UserError(f"sample.guidance={sample.guidance} has nothing to measure from: {why}; set it to 1")
        samplers.check(self.noise, sample)
        if source is not None:
            self._check_source(source)
        self._judge = None

    def _check_source(self, source) -> None:
        cfg = self.model.cfg
        shape = (cfg.image_size, cfg.image_size, cfg.channels)
        if source.shape != shape:
            H, W, C = source.shape
            advice = f"set model.image_size={H} model.channels={C}" if H == W else "images must be square"
            raise UserError(f"the data are {H} x {W} with {C} channels, the model is for {shape}: {advice}")
        if cfg.num_classes not in (0, source.num_classes):
            raise UserError(
                f"the data have {source.num_classes} classes, the model model.num_classes={cfg.num_classes}: set it to "
                f"{source.num_classes}, or to 0 for a model that ignores classes"
            )

    @property
    def data_identity(self) -> dict:
        """What a checkpoint's data and the data at hand must share."""
        return self.source.identity

    def batch_spec(self, batch_size: int):
        cfg = self.model.cfg
        images = jax.ShapeDtypeStruct((batch_size, cfg.image_size, cfg.image_size, cfg.channels), jnp.float32)
        return {"images": images, "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def init(self, key):
        """Parameters from the architecture's own distributions."""
        spec = self.batch_spec(1)
        images, labels = (jnp.zeros(s.shape, s.dtype) for s in (spec["images"], spec["labels"]))
        return self.model.init(key, images, jnp.zeros(1), self._given(labels))["params"]

    def _given(self, labels_B):
        return labels_B if self.model.cfg.num_classes else None

    def loss(self, params, batch, key):
        """(sum over images of the mean loss a number, images, sums of its parts)."""
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        labels_B = batch["labels"]
        drops_B = jax.random.bernoulli(drop_key, self.cfg.label_dropout, labels_B.shape)
        labels_B = jnp.where(drops_B, self.model.cfg.num_classes, labels_B)
        t_B = self._timesteps(jax.random.uniform(t_key, labels_B.shape), spread=True)
        eps_BxHxWxC = jax.random.normal(noise_key, batch["images"].shape)
        parts = self.losses(params, batch["images"], labels_B, t_B, eps_BxHxWxC)
        total_B = sum(parts.values())
        sums = {name: part_B.sum() for name, part_B in parts.items()} if len(parts) > 1 else {}
        return total_B.sum(), jnp.float32(total_B.size), sums

    def evaluation(self, params, batch, key):
        """{name: (sum, weight)}: the loss, its parts, and the loss of each tenth of the timesteps; nothing is dropped.

        Row i of a batch of B gets a timestep from the i-th of B equal parts: the whole range, with little variance.
        """
        B = batch["labels"].shape[0]
        within_key, noise_key = jax.random.split(key)
        u_B = (jnp.arange(B) + jax.random.uniform(within_key, (B,))) / B
        eps_BxHxWxC = jax.random.normal(noise_key, batch["images"].shape)
        parts = self.losses(params, batch["images"], batch["labels"], self._timesteps(u_B, spread=False), eps_BxHxWxC)
        total_B = sum(parts.values())
        found = {"loss": (total_B.sum(), jnp.float32(B))}
        found |= {name: (part_B.sum(), jnp.float32(B)) for name, part_B in parts.items() if len(parts) > 1}
        bucket_B = jnp.minimum(u_B * BUCKETS, BUCKETS - 1).astype(jnp.int32)
        width = self.cfg.timesteps // BUCKETS
        for i in range(BUCKETS):
            name = f"loss_t{i * width:03d}"
            found[name] = (jnp.where(bucket_B == i, total_B, 0).sum(), (bucket_B == i).sum().astype(jnp.float32))
        return found

    def _timesteps(self, u_B, spread: bool):
        """Timesteps from numbers uniform in [0, 1); `spread`: as the recipe distributes them."""
        if spread and self.cfg.timestep_sampling == "logit_normal":
            u_B = jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u_B, 1e-6, 1 - 1e-6)))
        if self.noise.is_flow:
            return u_B * self.cfg.timesteps
        return jnp.minimum((u_B * self.cfg.timesteps).astype(jnp.int32), self.cfg.timesteps - 1)

    def losses(self, params, x0_BxHxWxC, labels_B, t_B, eps_BxHxWxC) -> dict:
        """{part: (B,)}: mse of the prediction, weighted; with learn_sigma the variational bound in bits as well."""
        x_t = self.noise.add(x0_BxHxWxC, eps_BxHxWxC, t_B)
        said, fraction = self._predict(params, x_t, t_B, labels_B)
        mse_B = jnp.square(said - self.noise.target(x0_BxHxWxC, eps_BxHxWxC, t_B)).mean((1, 2, 3))
        if self.cfg.min_snr_gamma:
            mse_B *= MINSNR_OF[self.cfg.prediction](jnp.maximum(self.noise.snr(t_B), 1e-8), self.cfg.min_snr_gamma)
        if fraction is None:
            return {"mse": mse_B}
        alpha, sigma = map(over_image, self.noise.alpha_sigma(t_B))
        x0_foreseen, _ = self.noise.x0_and_eps(x_t, jax.lax.stop_gradient(said), alpha, sigma)
        bound_B = bound_in_bits(self.noise, x0_BxHxWxC, x_t, t_B, x0_foreseen, fraction)
        return {"mse": mse_B, "bound": bound_B}

    def _predict(self, params, x_t, t_B, labels_B):
        """(prediction, variance's place between its bounds or None)."""
        said = self.model.apply({"params": params}, x_t, t_B, self._given(labels_B))
        if not self.model.cfg.learn_sigma:
            return said, None
        said, place = jnp.split(said, 2, axis=-1)
        return said, (place + 1) / 2

    def denoiser(self, params, labels_B):
        """`(x, t_B) -> (prediction, fraction)` of these classes, guided as config.sample asks: what a sampler takes."""
        if self.sample.guidance == 1:
            return lambda x, t_B: self._predict(params, x, t_B, labels_B)
        none_B = jnp.full_like(labels_B, self.model.cfg.num_classes)
        both_labels = jnp.concatenate([labels_B, none_B])

        def guided(x, t_B):
            said, fraction = self._predict(params, jnp.concatenate([x, x]), jnp.concatenate([t_B, t_B]), both_labels)
            conditional, unconditional = jnp.split(said, 2)
            towards = unconditional + self.sample.guidance * (conditional - unconditional)
            if self.sample.guidance_channels == "first3":
                towards = jnp.concatenate([towards[..., :3], conditional[..., 3:]], axis=-1)
            return towards, None if fraction is None else jnp.split(fraction, 2)[0]

        return guided

    def draw(self, params, labels_B, key):
        """Images of these classes, as the model sees images; jit it."""
        noise_key, key = jax.random.split(key)
        cfg = self.model.cfg
        x_BxHxWxC = jax.random.normal(noise_key, (labels_B.shape[0], cfg.image_size, cfg.image_size, cfg.channels))
        return samplers.sample(self.denoiser(params, labels_B), self.noise, x_BxHxWxC, key, self.sample)

    def sampling(self, params):
        """(function, arguments) of what sampling compiles, for a plan."""
        rows = min(self.sample.batch_size, max(self.sample.num_samples, self.cfg.score_samples))
        labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return self.draw, (params, labels, jax.eval_shape(lambda: jax.random.key(0)))

    def _images(self, params, labels_N: np.ndarray, seed: int) -> np.ndarray:
        """Images of these classes, `sample.batch_size` at a time; the last batch is filled up, so that one size compiles."""
        rows = min(self.sample.batch_size, len(labels_N))
        draw, images = self._compiled(), []
        for i in range(math.ceil(len(labels_N) / rows)):
            labels_B = np.resize(labels_N[i * rows : (i + 1) * rows], rows).astype(np.int32)
            images.append(np.asarray(draw(params, labels_B, jax.random.fold_in(jax.random.key(seed), i))))
        return np.concatenate(images)[: len(labels_N)]

    def _compiled(self):
        if not hasattr(self, "_draw"):
            self._draw = jax.jit(self.draw)
        return self._draw

    def _labels(self, count: int) -> np.ndarray:
        """The classes asked for, again and again until there are `count`."""
        num_classes = self.model.cfg.num_classes
        if not num_classes:
            if self.sample.classes:
                raise UserError("sample.classes is set, and the model has no classes")
            return np.zeros(count, np.int32)
        names = list(self.source.class_names) if self.source is not None else []
        numbers = []
        for word in (w.strip() for w in self.sample.classes.split(",") if w.strip()):
            number = names.index(word) if word in names else int(word) if word.isdecimal() else -1
            if not 0 <= number < num_classes:
                hint = nearest(word, names) if len(names) <= 50 else ""
                raise UserError(f"sample.classes: {word!r} is no class; numbers are 0 to {num_classes - 1}{hint}")
            numbers.append(number)
        return np.resize(numbers or np.arange(num_classes), count).astype(np.int32)

    def check_samples(self) -> None:
        """Raises the UserError that `show` would meet only after the first hundreds of steps."""
        self._labels(1)

    def show(self, params) -> Samples:
        """A grid, a row for as many samples as there are classes, or nearly square."""
        return self._shown(params)[0]

    def show_on_request(self, params) -> Samples:
        """The grid, and all images for the ADM evaluation suite."""
        samples, pixels = self._shown(params)
        return Samples(samples.text, samples.files | {".npz": npz(pixels)})

    def _shown(self, params):
        labels_N = self._labels(self.sample.num_samples)
        pixels = self.source.to_pixels(self._images(params, labels_N, self.sample.seed))
        period = len(set(labels_N.tolist()))
        columns = period if 1 < period <= 16 else math.ceil(math.sqrt(len(labels_N)))
        names, shown = self.source.class_names, pixels[:256]
        of = [names[i] if names else str(i) for i in labels_N[: min(period, 20)]] if self.model.cfg.num_classes else []
        how = f"{self.sample.sampler}, {self.sample.steps} steps, guidance {self.sample.guidance:g}"
        text = f"{len(labels_N)} images by {how}" + (f": {', '.join(of)}" if of else "")
        return Samples(text, {".png": grid_png(shown, columns)}), pixels

    def scores(self, params) -> dict[str, float]:
        """How right `score_samples` samples are: by the data's own rules, and by a small classifier trained on the data."""
        if not self.cfg.score_samples or not self.model.cfg.num_classes:
            return {}
        labels_N = np.resize(np.arange(self.model.cfg.num_classes), self.cfg.score_samples)
        images = self._images(params, labels_N, seed=self.sample.seed + 1)
        if self._judge is None:
            self._judge = Judge.trained_on(self.source)
        found = self._judge.scores(images, labels_N)
        return found | (self.source.score(images, labels_N) if hasattr(self.source, "score") else {})
