"""What an autoencoder learns: to give an image back from latents that stay near a normal distribution; with a critic or not.

  error = |x - x'| or (x - x')^2, the mean over an image's H W C numbers;  x' = decode(mean + std eps)
  loss  = error + kl_weight KL(N(mean, std^2) | N(0, 1)) / (H W C)         [+ lambda disc_weight g  from disc_start on]

as in latent diffusion (Rombach et al. 2022, arXiv:2112.10752), whose sums over an image are divided by H W C here. The
critic D says of each patch how real it is: it learns (relu(1 - D(x)) + relu(1 + D(x'))) / 2, the autoencoder
g = -D(x'). lambda, at most 1e4, is |grad error| / (|grad g| + 1e-4) by the kernel of the decoder's last convolution
(Esser et al. 2021, arXiv:2012.09841, equation 7), in the units of sums over an image.

Both learn in one step: what is D's in the loss reaches D's weights alone, g the autoencoder's alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram import models
from jaxvram.data import images
from jaxvram.errors import UserError, nearest
from jaxvram.tasks.discriminator import Discriminator
from jaxvram.tasks.samples import Samples, grid_png, npz

ERRORS = {"l1": jnp.abs, "l2": jnp.square}
LARGEST_WEIGHT = 1e4
COLUMNS = 8  # of images that are shown
MEASURED = 1024  # images whose latents say what scale gives them unit variance


@dataclasses.dataclass(frozen=True)
class AutoencodingConfig:
    reconstruction: str = "l1"  # l1 | l2
    kl_weight: float = 1e-6  # of the divergence of an image's latents, beside the sum of the error over its numbers
    disc_weight: float = 0.0  # of the discriminator's say; 0: there is none
    disc_start: int = 50_001  # step from which there is
    disc_width: int = 64  # channels of its first layer
    disc_layers: int = 3  # that halve the side; 3: patches of 70 pixels
    score_images: int = 0  # held-out images whose reconstructions are scored at each evaluation; 0: none

    def __post_init__(self):
        if self.reconstruction not in ERRORS:
            which = f"task.reconstruction={self.reconstruction!r}"
            raise UserError(f"{which} is unknown{nearest(self.reconstruction, ERRORS)}")
        if min(self.kl_weight, self.disc_weight, self.disc_start, self.score_images) < 0:
            raise UserError("task: kl_weight, disc_weight, disc_start and score_images must not be negative")
        if min(self.disc_width, self.disc_layers) < 1:
            raise UserError("task: disc_width and disc_layers must be at least 1")


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    num_samples: int = 16  # held-out images that are shown over their reconstructions
    batch_size: int = 16  # images at a time, also where they are scored

    def __post_init__(self):
        if min(self.num_samples, self.batch_size) < 1:
            raise UserError("sample: num_samples and batch_size must be at least 1")


class AutoencodingTask:
    """What a train loop, a plan and an export need to know of autoencoders.

    Parameters are {"autoencoder": the model's} and, with a discriminator, "discriminator".

    Args:
      model: models/autoencoder.py.
      source: images (data/images.py); None for a plan, which reads shapes alone.
    Raises:
      UserError: the data are not of the model's shape.
    """

    unit, units_per_example = "images", 1
    SECTIONS: ClassVar = {"task": AutoencodingConfig, "data": images.ImageDataConfig, "sample": ReconstructionConfig}

    @classmethod
    def of_recipe(cls, recipe, with_data: bool = True, say: Callable[[str], None] = lambda _: None) -> "AutoencodingTask":
        """The task of a recipe. Without data, for a plan: the model says what shape they have."""
        if recipe.finetune.method != "none":
            raise UserError(f"finetune.method={recipe.finetune.method} is not for autoencoders: set it to none")
        if recipe.data.name == "latents":
            raise UserError("data.name=latents are an autoencoder's results: train it on images (shapes, folder, npz)")
        source = images.load(recipe.data, recipe.train.seed) if with_data else None
        return cls(models.build(recipe.model), source, recipe.task, recipe.sample)

    def __init__(self, model, source, cfg: AutoencodingConfig, sample: ReconstructionConfig):
        self.model, self.source, self.cfg, self.sample = model, source, cfg, sample
        of_model = model.cfg
        dtypes = {"dtype": of_model.dtype, "param_dtype": of_model.param_dtype}
        self.discriminator = Discriminator(cfg.disc_width, cfg.disc_layers, **dtypes) if cfg.disc_weight else None
        if self.discriminator and of_model.image_size < self.discriminator.least_side:
            raise UserError(
                f"task.disc_layers={cfg.disc_layers} needs images of {self.discriminator.least_side} pixels, and "
                f"model.image_size={of_model.image_size}: take fewer layers"
            )
        if source is not None and source.shape != (of_model.image_size, of_model.image_size, of_model.channels):
            H, W, C = source.shape
            advice = f"set model.image_size={H} model.channels={C}" if H == W else "images must be square"
            wanted = f"{of_model.image_size} x {of_model.image_size} with {of_model.channels}"
            raise UserError(f"the data are {H} x {W} with {C} channels, the model is for {wanted}: {advice}")

    @property
    def data_identity(self) -> dict:
        """What a checkpoint's data and the data at hand must share."""
        return self.source.identity

    @property
    def reads_step(self) -> bool:
        """Does the loss change with time? It does when a discriminator comes in."""
        return self.discriminator is not None and self.cfg.disc_start > 0

    def batch_spec(self, batch_size: int):
        cfg = self.model.cfg
        shape = (batch_size, cfg.image_size, cfg.image_size, cfg.channels)
        return {
            "images": jax.ShapeDtypeStruct(shape, jnp.float32),
            "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),  # read by none
        }

    def example(self) -> tuple:
        """What the model is called with, of one image."""
        spec = self.batch_spec(1)["images"]
        return (jnp.zeros(spec.shape, spec.dtype),)

    def init(self, key):
        """Parameters from the architectures' own distributions."""
        (image,), (key, disc_key) = self.example(), jax.random.split(key)
        params = {"autoencoder": self.model.init(key, image)["params"]}
        if self.discriminator is not None:
            params["discriminator"] = self.discriminator.init(disc_key, image)["params"]
        return params

    def loss(self, params, batch, key):
        """(sum over images of error and divergence, images, sums of the parts).

        The discriminator adds gradients and metrics and nothing to the sum, which could not be compared across its start.
        """
        x, B = batch["images"], len(batch["images"])
        through = self._through(params["autoencoder"], x, key)
        error_B, kl_B = self._error(x, through.image), through.kl_B
        sums = {"reconstruction": error_B.sum(), "kl": kl_B.sum(), "psnr": psnr(x, through.image).sum()}
        total = self._total(error_B, kl_B, x).sum()
        if self.discriminator is not None:
            added, told = self._adversarial(params, x, through, batch["step"][0] if self.reads_step else None)
            total += B * (added - jax.lax.stop_gradient(added))
            sums |= {name: B * value for name, value in told.items()}
        return total, jnp.float32(B), sums

    def evaluation(self, params, batch, key):
        """{name: (sum, weight)}: error and divergence, what they make, and the peak signal-to-noise ratio in dB."""
        x, B = batch["images"], jnp.float32(len(batch["images"]))
        through = self._through(params["autoencoder"], x, key)
        error_B = self._error(x, through.image)
        found = {
            "loss": self._total(error_B, through.kl_B, x), "reconstruction": error_B, "kl": through.kl_B,
            "psnr": psnr(x, through.image),
        }  # fmt: skip
        return {name: (of_B.sum(), B) for name, of_B in found.items()}

    def _error(self, x, image):
        return ERRORS[self.cfg.reconstruction](x - image).mean((1, 2, 3))

    def _total(self, error_B, kl_B, x):
        return error_B + self.cfg.kl_weight / math.prod(x.shape[1:]) * kl_B

    def _through(self, params, x_BxHxWxC, key) -> "Through":
        apply = functools.partial(self.model.apply, {"params": params})
        mean, logvar = apply(x_BxHxWxC, method="encode")
        latent = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
        kl_B = (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)) / 2
        last = apply(latent, method="decode_to_last")
        return Through(latent, kl_B, last, apply(last, method="to_image"))

    def _adversarial(self, params, x, through: "Through", step):
        """(a number whose gradients are those of lambda disc_weight g and of D's loss, what to tell)."""
        conv = jax.lax.stop_gradient(params["autoencoder"]["conv_out"])
        given = (params["discriminator"], conv, x, jax.lax.stop_gradient(through.last), through.image)
        if step is None:
            return self._against(*given)
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(self._against, *given))
        return jax.lax.cond(step >= self.cfg.disc_start, self._against, lambda *_: nothing, *given)

    def _against(self, disc, conv, x, last, image):
        frozen, seen = jax.lax.stop_gradient((disc, image))
        numbers = math.prod(x.shape[1:])
        says = lambda disc, x: self.discriminator.apply({"params": disc}, x)
        # Backwards through D once: this gradient by the image serves for lambda, and for all weights before the image.
        g, of_g = jax.value_and_grad(lambda image: -says(frozen, image).mean())(seen)
        of_error = jax.grad(lambda image: numbers * self._error(x, image).mean())(seen)
        to_image = lambda kernel: self._to_image(conv | {"kernel": kernel}, last)
        _, by_kernel = jax.vjp(to_image, conv["kernel"])
        norm = lambda of_image: jnp.linalg.norm(by_kernel(of_image)[0].astype(jnp.float32).ravel())
        adaptive = jnp.minimum(norm(of_error) / (norm(of_g) + 1e-4), LARGEST_WEIGHT)
        to_fool = self.cfg.disc_weight / numbers * (adaptive * of_g * image).sum()
        real, fake = says(disc, x), says(disc, seen)
        hinge = (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2
        told = {"generator": g, "discriminator": hinge, "adaptive_weight": adaptive}
        return to_fool + hinge, jax.lax.stop_gradient(told)

    def _to_image(self, conv, last):
        return self.model.apply({"params": {"conv_out": conv}}, last, method="to_image")

    def there_and_back(self, params, images_BxHxWxC, key):
        """(images again, latents); latents are drawn, as a denoiser gets them. Jit it."""
        through = self._through(params["autoencoder"], images_BxHxWxC, key)
        return through.image, through.latent

    def sampling(self, params):
        """(function, arguments) of what showing compiles, for a plan."""
        spec = self.batch_spec(self.sample.batch_size)["images"]
        return self.there_and_back, (params, spec, jax.eval_shape(lambda: jax.random.key(0)))

    def check_samples(self) -> None:
        """Whatever the settings are, something can be shown."""

    def _rebuilt(self, params, images_NxHxWxC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of many images, `sample.batch_size` at a time; the last batch is filled up, so that one size compiles."""
        rows, N = min(self.sample.batch_size, len(images_NxHxWxC)), len(images_NxHxWxC)
        rebuilt, latents = [], []
        for i in range(math.ceil(N / rows)):
            batch = np.take(images_NxHxWxC, range(i * rows, (i + 1) * rows), axis=0, mode="wrap")
            image, latent = self._compiled(params, batch, jax.random.fold_in(jax.random.key(0), i))
            rebuilt.append(np.asarray(image))
            latents.append(np.asarray(latent))
        return np.concatenate(rebuilt)[:N], np.concatenate(latents)[:N]

    @functools.cached_property
    def _compiled(self):
        return jax.jit(self.there_and_back)

    def show(self, params) -> Samples:
        """Held-out images in rows, under each row their reconstructions."""
        return self._shown(params)[0]

    def show_on_request(self, params) -> Samples:
        """The same, and the reconstructions for the ADM evaluation suite."""
        samples, pixels = self._shown(params)
        return Samples(samples.text, samples.files | {".npz": npz(pixels)})

    def _shown(self, params):
        originals, _ = self.source.val_images(self.sample.num_samples)
        rebuilt, _ = self._rebuilt(params, originals)
        columns = min(COLUMNS, len(originals))
        above, below = (self.source.to_pixels(x) for x in (originals, rebuilt))
        blank = np.full((-len(above) % columns, *above.shape[1:]), 255, np.uint8)
        rows = lambda pixels: np.concatenate([pixels, blank]).reshape(-1, columns, *pixels.shape[1:])
        pairs = np.stack([rows(above), rows(below)], 1)
        text = f"{len(originals)} held-out images over their reconstructions: {np.mean(psnr(originals, rebuilt)):.1f} dB"
        return Samples(text, {".png": grid_png(pairs.reshape(-1, *above.shape[1:]), columns)}), below

    def scores(self, params) -> dict[str, float]:
        """The spread of held-out latents, and what the data's own rules, if any, still recognise after a reconstruction."""
        if not self.cfg.score_images:
            return {}
        images_NxHxWxC, labels_N = self.source.val_images(self.cfg.score_images)
        rebuilt, latents = self._rebuilt(params, images_NxHxWxC)
        found = {"latent_std": float(latents.std())}
        return found | (self.source.score(rebuilt, labels_N) if hasattr(self.source, "score") else {})

    def measured(self, params) -> dict[str, float]:
        """What an export says beside the weights: the scale that gives latents of training images unit variance."""
        images_NxHxWxC, _ = self.source.train_images(MEASURED)
        return {"scaling_factor": float(1 / self._rebuilt(params, images_NxHxWxC)[1].std())}


class Through(NamedTuple):
    """Images on their way through an autoencoder."""

    latent: jax.Array
    kl_B: jax.Array  # nats
    last: jax.Array  # what the decoder's last convolution reads
    image: jax.Array


def psnr(x_BxHxWxC, image_BxHxWxC):
    """(B,) peak signal-to-noise ratios in dB, of images in [-1, 1]."""
    error_B = jnp.square(x_BxHxWxC - jnp.clip(image_BxHxWxC, -1, 1)).mean((1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(error_B, 1e-10))
