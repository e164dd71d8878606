"""Diffusion: what a denoiser learns, what is measured, and the images it shows. One task for every denoiser.

A denoiser is a Linen module `model(x_BxHxWxC, t_B, condition) -> (B, H, W, C or 2 C)` with `cfg.image_size`, `.channels`,
`.num_classes`, `.learn_sigma`, and `.any_aspect` where H and W may differ from image_size; the condition is labels_B, a
text (tasks/conditions.py), or None.
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
from jaxvram.finetune.adapted import adapted
from jaxvram.sample import diffusion as samplers
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.sample.noise import Noise, over_image
from jaxvram.tasks.conditions import conditions, reads_text, sample_shape_of, takes_any_aspect
from jaxvram.tasks.judge import Judge
from jaxvram.tasks.samples import Samples, grid_png, npz, read_image
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
    label_dropout: float = 0.1  # share of labels replaced by "none", and of texts by the empty one, for guidance
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
        if recipe.finetune.method not in ("none", "lora"):
            raise UserError(f"finetune.method={recipe.finetune.method} is for language models: set it to none or lora")
        own_text = recipe.model.context_length if getattr(recipe.model, "text_layers", 0) else 0
        source = images.load(recipe.data, recipe.train.seed, own_text) if with_data else None
        return cls(adapted(models.build(recipe.model), recipe.finetune), source, recipe.task, recipe.sample)

    def __init__(self, model, source, cfg: DiffusionConfig, sample: DiffusionSampleConfig):
        self.model, self.source, self.cfg, self.sample = model, source, cfg, sample
        self.noise = cfg.noise
        of_model = model.cfg
        if of_model.learn_sigma and self.noise.is_flow:
            raise UserError("model.learn_sigma=True has no meaning with task.schedule=flow: set it to False")
        self.conditions = conditions(of_model, source, sample)
        why = self.conditions.untaught or ("" if cfg.label_dropout else "task.label_dropout=0 teaches no 'no class'")
        if sample.guidance != 1 and why:
            raise UserError(f"sample.guidance={sample.guidance} has nothing to measure from: {why}; set it to 1")
        samplers.check(self.noise, sample)
        self.sample_shape = (*sample_shape_of(of_model, sample), of_model.channels)
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
        self._check_aspects(source)
        if not reads_text(cfg) and cfg.num_classes not in (0, source.num_classes):
            raise UserError(
                f"the data have {source.num_classes} classes, the model model.num_classes={cfg.num_classes}: set it to "
                f"{source.num_classes}, or to 0 for a model that ignores classes"
            )

    def _check_aspects(self, source) -> None:
        """A source may have pictures of several `shapes`, each batch of one."""
        cfg = self.model.cfg
        others = [shape for shape in getattr(source, "shapes", ()) if shape[:2] != (cfg.image_size, cfg.image_size)]
        if others and not takes_any_aspect(cfg):
            H, W, _ = others[0]
            raise UserError(f"the data hold pictures of {H} x {W}, and the model takes squares: prepare without --aspects")
        if odd := [shape for shape in others if any(side % cfg.patch_size for side in shape[:2])]:
            H, W, _ = odd[0]
            raise UserError(f"the data hold pictures of {H} x {W}, no multiple of model.patch_size={cfg.patch_size}")

    @property
    def data_identity(self) -> dict:
        """What a checkpoint's data and the data at hand must share."""
        return self.source.identity

    def batch_spec(self, batch_size: int):
        """Of squares; pictures of other aspects are no larger (data/buckets.py)."""
        cfg = self.model.cfg
        images = jax.ShapeDtypeStruct((batch_size, cfg.image_size, cfg.image_size, cfg.channels), jnp.float32)
        return {"images": images} | self.conditions.spec(batch_size)

    def example(self) -> tuple:
        """What the model is called with, of one image."""
        batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.batch_spec(1))
        return batch["images"], jnp.zeros(1), self.conditions.given(self.conditions.of_batch(batch))

    def init(self, key):
        """Parameters from the architecture's own distributions."""
        return self.model.init(key, *self.example())["params"]

    def loss(self, params, batch, key):
        """(sum over images of the mean loss a number, images, sums of its parts)."""
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        B = batch["images"].shape[0]
        drops_B = jax.random.bernoulli(drop_key, self.cfg.label_dropout, (B,))
        condition = self.conditions.dropped(self.conditions.of_batch(batch), drops_B)
        t_B = self._timesteps(jax.random.uniform(t_key, (B,)), spread=True)
        eps_BxHxWxC = jax.random.normal(noise_key, batch["images"].shape)
        dropout_key = jax.random.fold_in(key, 3) if self._drops else None
        parts = self.losses(params, batch["images"], condition, t_B, eps_BxHxWxC, dropout_key)
        total_B = sum(parts.values())
        sums = {name: part_B.sum() for name, part_B in parts.items()} if len(parts) > 1 else {}
        return total_B.sum(), jnp.float32(total_B.size), sums

    def evaluation(self, params, batch, key):
        """{name: (sum, weight)}: the loss, its parts, and the loss of each tenth of the timesteps; nothing is dropped.

        Row i of a batch of B gets a timestep from the i-th of B equal parts: the whole range, with little variance.
        """
        B = batch["images"].shape[0]
        within_key, noise_key = jax.random.split(key)
        u_B = (jnp.arange(B) + jax.random.uniform(within_key, (B,))) / B
        eps_BxHxWxC = jax.random.normal(noise_key, batch["images"].shape)
        condition, t_B = self.conditions.of_batch(batch), self._timesteps(u_B, spread=False)
        parts = self.losses(params, batch["images"], condition, t_B, eps_BxHxWxC)
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

    def losses(self, params, x0_BxHxWxC, condition, t_B, eps_BxHxWxC, dropout_key=None) -> dict:
        """{part: (B,)}: mse of the prediction, weighted; with learn_sigma the variational bound in bits as well."""
        x_t = self.noise.add(x0_BxHxWxC, eps_BxHxWxC, t_B)
        said, fraction = self._predict(params, x_t, t_B, condition, dropout_key)
        mse_B = jnp.square(said - self.noise.target(x0_BxHxWxC, eps_BxHxWxC, t_B)).mean((1, 2, 3))
        if self.cfg.min_snr_gamma:
            mse_B *= MINSNR_OF[self.cfg.prediction](jnp.maximum(self.noise.snr(t_B), 1e-8), self.cfg.min_snr_gamma)
        if fraction is None:
            return {"mse": mse_B}
        alpha, sigma = map(over_image, self.noise.alpha_sigma(t_B))
        x0_foreseen, _ = self.noise.x0_and_eps(x_t, jax.lax.stop_gradient(said), alpha, sigma)
        bound_B = bound_in_bits(self.noise, x0_BxHxWxC, x_t, t_B, x0_foreseen, fraction)
        return {"mse": mse_B, "bound": bound_B}

    @property
    def _drops(self) -> bool:
        """Does the model, or its LoRA, drop anything in training?"""
        added = getattr(self.model, "finetune", None)
        return getattr(self.model.cfg, "dropout", 0) > 0 or (added is not None and added.dropout > 0)

    def _predict(self, params, x_t, t_B, condition, dropout_key=None):
        """(prediction, variance's place between its bounds or None); dropout only with a key."""
        how = {} if dropout_key is None else {"deterministic": False, "rngs": {"dropout": dropout_key}}
        said = self.model.apply({"params": params}, x_t, t_B, self.conditions.given(condition), **how)
        if not self.model.cfg.learn_sigma:
            return said, None
        said, place = jnp.split(said, 2, axis=-1)
        return said, (place + 1) / 2

    def denoiser(self, params, condition):
        """`(x, t_B) -> (prediction, fraction)` under this condition, guided as config.sample asks: what a sampler takes."""
        if self.sample.guidance == 1:
            return lambda x, t_B: self._predict(params, x, t_B, condition)
        twice = lambda a, b: jnp.concatenate([a, b])
        both = jax.tree.map(twice, condition, self.conditions.opposite(condition))

        def guided(x, t_B):
            said, fraction = self._predict(params, twice(x, x), twice(t_B, t_B), both)
            conditional, unconditional = jnp.split(said, 2)
            towards = unconditional + self.sample.guidance * (conditional - unconditional)
            if self.sample.guidance_channels == "first3":
                towards = jnp.concatenate([towards[..., :3], conditional[..., 3:]], axis=-1)
            return towards, None if fraction is None else jnp.split(fraction, 2)[0]

        return guided

    def draw(self, params, condition, key, init_1xHxWxC=None):
        """Images under this condition, as the model sees images; jit it. `init`: what to start from, if not from noise."""
        noise_key, key = jax.random.split(key)
        B = jax.tree.leaves(condition)[0].shape[0]
        x_BxHxWxC = jax.random.normal(noise_key, (B, *self.sample_shape))
        denoise = self.denoiser(params, condition)
        return samplers.sample(denoise, self.noise, x_BxHxWxC, key, self.sample, init_1xHxWxC)

    def sampling(self, params):
        """(function, arguments) of what sampling compiles, for a plan."""
        rows = min(self.sample.batch_size, max(self.sample.num_samples, self.cfg.score_samples))
        condition = self.conditions.of_batch(self.conditions.spec(rows))
        return self.draw, (params, condition, jax.eval_shape(lambda: jax.random.key(0)))

    def _images(self, params, condition: dict, seed: int, init=None) -> np.ndarray:
        """Images, `sample.batch_size` at a time; the last batch is filled up, so that one size compiles."""
        N = len(jax.tree.leaves(condition)[0])
        rows = min(self.sample.batch_size, N)
        draw, images = self._compiled(), []
        for i in range(math.ceil(N / rows)):
            here = np.resize(np.arange(i * rows, min((i + 1) * rows, N)), rows)
            of_batch = jax.tree.map(lambda x, here=here: x[here], condition)
            images.append(np.asarray(draw(params, of_batch, jax.random.fold_in(jax.random.key(seed), i), init)))
        return np.concatenate(images)[:N]

    def _compiled(self):
        if not hasattr(self, "_draw"):
            self._draw = jax.jit(self.draw)
        return self._draw

    def check_samples(self) -> None:
        """Raises the UserError that `show` would meet only after the first hundreds of steps.

        Prompts are encoded here: before the weights are on the card, where a text encoder has room.
        """
        self._asked, self._init = self.conditions.asked(self.sample.num_samples), self._init_image()
        if self.cfg.score_samples and self.reads_text and hasattr(self.source, "unseen"):
            prompts, labels_N = self.source.unseen(self.cfg.score_samples)
            self._unseen = self.conditions.of_prompts(prompts), labels_N

    def _init_image(self):
        """(1, H, W, C) as the model sees images, or None."""
        if not self.sample.init_image:
            return None
        (H, W), (of_H, of_W, _) = self.source.pixel_size, self.source.shape
        H, W = H * self.sample_shape[0] // of_H, W * self.sample_shape[1] // of_W
        return self.source.from_pixels(read_image(self.sample.init_image, H, W)[None])

    def show(self, params) -> Samples:
        """A grid, a column for each class or prompt asked for, or nearly square."""
        return self._shown(params)[0]

    def show_on_request(self, params) -> Samples:
        """The grid, and all images for the ADM evaluation suite."""
        samples, pixels = self._shown(params)
        return Samples(samples.text, samples.files | {".npz": npz(pixels)})

    def _shown(self, params):
        if not hasattr(self, "_asked"):
            self.check_samples()
        condition, names = self._asked
        pixels = self.source.to_pixels(self._images(params, condition, self.sample.seed, self._init))
        period = len(dict.fromkeys(names))
        columns = period if 1 < period <= 16 else math.ceil(math.sqrt(len(names)))
        of = [name for name in dict.fromkeys(names) if name][:20]
        how = f"{self.sample.sampler}, {self.sample.steps} steps, guidance {self.sample.guidance:g}"
        text = f"{len(names)} images by {how}" + (f": {', '.join(of)}" if of else "")
        titles = names[:columns] if self.reads_text and columns == period else names if self.reads_text else ()
        return Samples(text, {".png": grid_png(pixels[:256], columns, titles=titles)}), pixels

    @property
    def reads_text(self) -> bool:
        return reads_text(self.model.cfg)

    def scores(self, params) -> dict[str, float]:
        """How right `score_samples` samples are: by the data's own rules, and by a small classifier trained on the data.

        A model that reads text is asked for what the data hold out, and judged by the data's rules alone.
        """
        count = self.cfg.score_samples
        if self.reads_text:
            if not hasattr(self, "_asked"):
                self.check_samples()
            if not hasattr(self, "_unseen"):
                return {}
            condition, labels_N = self._unseen
            return self.source.score(self._images(params, condition, self.sample.seed + 1), labels_N)
        if not count or not self.model.cfg.num_classes:
            return {}
        condition = self.conditions.all_classes(count)
        labels_N, images = condition["labels_B"], self._images(params, condition, self.sample.seed + 1)
        if self._judge is None:
            self._judge = Judge.trained_on(self.source)
        found = self._judge.scores(images, labels_N)
        return found | (self.source.score(images, labels_N) if hasattr(self.source, "score") else {})
