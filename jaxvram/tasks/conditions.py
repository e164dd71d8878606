"""What a denoiser is told beside the image and its noise: nothing, a class, or a text; and what "nothing said" is.

A condition is a dict of arrays with a row an image. Of a text it is what the model reads (names as it reads them):
  context_BxSxE, length_B   features of a text encoder, of which the first `length` tokens count;
  tokens_BxS, length_B      tokens, where the model has a text encoder of its own;
  size_Bx2, aspect_B        the picture's height and width in pixels, and their ratio, where the model asks for them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.data.buckets import shape_at
from jaxvram.errors import UserError, nearest

BETWEEN_PROMPTS = "|"
OF_IMAGES = ("size_Bx2", "aspect_B")  # true of a picture whatever is said of it


def conditions(cfg, source, sample):
    """How a model of this configuration is conditioned.

    Args:
      cfg: the model's; `context_dim` (0: no text) and `num_classes` decide.
      source: of captions and names of classes; None for a plan.
      sample: a DiffusionSampleConfig.
    Raises:
      UserError: what is asked for and the model's kind don't go together.
    """
    if reads_text(cfg):
        return Texts(cfg, source, sample)
    if sample.prompt or sample.negative_prompt:
        raise UserError("sample.prompt is for models that read text; this one has model.context_dim=0")
    return Classes(cfg, source, sample)


def reads_text(cfg) -> bool:
    return getattr(cfg, "context_dim", 0) > 0


def sample_shape_of(cfg, sample) -> tuple[int, int]:
    """(H, W) of samples as the model sees them. UserError: another aspect than 1 for a model of squares."""
    if sample.aspect != 1 and not takes_any_aspect(cfg):
        raise UserError(f"sample.aspect={sample.aspect} is for models of any aspect (PixArt); this one draws squares: set 1")
    return shape_at(cfg.image_size, sample.aspect, getattr(cfg, "patch_size", 1))


def takes_any_aspect(cfg) -> bool:
    return getattr(cfg, "any_aspect", False)


class Classes:
    """A class of `num_classes`, of which the number after the last means "none"; without classes, nothing at all."""

    def __init__(self, cfg, source, sample):
        self.num_classes, self.source, self.sample = cfg.num_classes, source, sample

    @property
    def untaught(self) -> str:
        """Why there is nothing to guide away from, whatever was dropped in training; '' where there is."""
        return "" if self.num_classes else "the model has no classes"

    def spec(self, batch_size: int) -> dict:
        """Of a batch."""
        return {"labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def of_batch(self, batch: dict) -> dict:
        return {"labels_B": batch["labels"]}

    def given(self, condition: dict):
        """As the model takes it."""
        return condition["labels_B"] if self.num_classes else None

    def dropped(self, condition: dict, drops_B) -> dict:
        return {"labels_B": jnp.where(drops_B, self.num_classes, condition["labels_B"])}

    def opposite(self, condition: dict) -> dict:
        """What guidance leads away from."""
        return {"labels_B": jnp.full_like(condition["labels_B"], self.num_classes)}

    def asked(self, count: int) -> tuple[dict, list[str]]:
        """(conditions of `count` images, what each shows): the classes asked for, again and again."""
        if not self.num_classes:
            if self.sample.classes:
                raise UserError("sample.classes is set, and the model has no classes")
            return self.all_classes(count), [""] * count
        names = list(self.source.class_names) if self.source is not None else []
        numbers = []
        for word in (w.strip() for w in self.sample.classes.split(",") if w.strip()):
            number = names.index(word) if word in names else int(word) if word.isdecimal() else -1
            if not 0 <= number < self.num_classes:
                hint = nearest(word, names) if len(names) <= 50 else ""
                raise UserError(f"sample.classes: {word!r} is no class; numbers are 0 to {self.num_classes - 1}{hint}")
            numbers.append(number)
        labels_N = np.resize(numbers or np.arange(self.num_classes), count).astype(np.int32)
        return {"labels_B": labels_N}, [names[i] if names else str(i) for i in labels_N]

    def all_classes(self, count: int) -> dict:
        return {"labels_B": np.resize(np.arange(max(self.num_classes, 1)), count).astype(np.int32)}


class Texts:
    """A text; nothing said is the empty text, as the source's `null` has it."""

    untaught = ""

    def __init__(self, cfg, source, sample):
        self.cfg, self.source, self.sample = cfg, source, sample
        if sample.classes:
            raise UserError("sample.classes is for models of classes; this one reads text: set sample.prompt")
        if source is not None:
            self._check(source)

    def _check(self, source) -> None:
        if not hasattr(source, "null"):
            how = "--mode=prepare --text_encoder=... makes features of captions, which data.name=latents reads"
            raise UserError(f"the model reads features of texts (model.context_dim), and the data have none: {how}")
        if "context" in source.null and source.null["context"].shape != (self.cfg.context_length, self.cfg.context_dim):
            S, E = source.null["context"].shape
            raise UserError(
                f"the data's text encoder gives {S} tokens of {E} numbers, the model reads {self.cfg.context_length} of "
                f"{self.cfg.context_dim}: set model.context_length={S} model.context_dim={E}"
            )

    def spec(self, batch_size: int) -> dict:
        of = lambda shape, dtype: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        S = self.cfg.context_length
        text = {"context": of((S, self.cfg.context_dim), jnp.float16)}
        if getattr(self.cfg, "text_layers", 0):
            text = {"tokens": of((S,), jnp.int32)}
        sizes = {"size": of((2,), jnp.float32), "aspect": of((), jnp.float32)} if self._reads_sizes else {}
        return text | {"length": of((), jnp.int32)} | sizes

    @property
    def _reads_sizes(self) -> bool:
        return getattr(self.cfg, "micro_conditions", False)

    def of_batch(self, batch: dict) -> dict:
        return {_NAMES[key]: batch[key] for key in self.spec(1)}

    def given(self, condition: dict) -> dict:
        return condition

    @functools.cached_property
    def _null(self) -> dict:
        """Of one image. For a plan anything of its shape."""
        if self.source is None:
            shapes = self.spec(1)
            return {_NAMES[key]: np.zeros(s.shape[1:], s.dtype) for key, s in shapes.items() if key in _OF_TEXT}
        return {_NAMES[key]: np.asarray(value) for key, value in self.source.null.items() if key in _OF_TEXT}

    def dropped(self, condition: dict, drops_B) -> dict:
        def of(name, x):
            if name in OF_IMAGES:
                return x
            return jnp.where(drops_B.reshape(-1, *[1] * (x.ndim - 1)), self._null[name].astype(x.dtype), x)

        return {name: of(name, x) for name, x in condition.items()}

    def opposite(self, condition: dict) -> dict:
        """The negative prompt; without one, the empty text."""
        instead = self._negative if self.sample.negative_prompt else self._null
        of = lambda name, x: x if name in OF_IMAGES else jnp.broadcast_to(jnp.asarray(instead[name], x.dtype), x.shape)
        return {name: of(name, x) for name, x in condition.items()}

    @functools.cached_property
    def _negative(self) -> dict:
        if self.source is None:
            return self._null
        return {name: rows[0] for name, rows in self._encoded([self.sample.negative_prompt]).items()}

    def _encoded(self, prompts: list[str]) -> dict:
        return {_NAMES[key]: np.asarray(rows) for key, rows in self.source.encode_prompts(prompts).items()}

    def asked(self, count: int) -> tuple[dict, list[str]]:
        """(conditions of `count` images, what each shows): the prompts asked for in turn, or captions held out.

        `opposite` is ready after it too: no text encoder is wanted once the weights are on the card.
        """
        prompts = [prompt.strip() for prompt in self.sample.prompt.split(BETWEEN_PROMPTS) if prompt.strip()]
        prompts = prompts or self.source.captions("val", 0, count)
        if self.sample.negative_prompt:
            _ = self._negative
        rows = np.arange(count) % len(prompts)
        return self.of_prompts([prompts[i] for i in rows]), [prompts[i] for i in rows]

    def of_prompts(self, prompts: list[str]) -> dict:
        """Conditions of these texts, each encoded once, of pictures as large as they are drawn."""
        different = sorted(set(prompts))
        rows = np.array([different.index(prompt) for prompt in prompts])
        condition = {name: x[rows] for name, x in self._encoded(different).items()}
        if self._reads_sizes:
            H, W = sample_shape_of(self.cfg, self.sample)
            size_2 = np.float32([H, W]) * getattr(self.source, "downsample", 1)
            condition |= {"size_Bx2": np.tile(size_2, (len(rows), 1)), "aspect_B": np.full(len(rows), H / W, np.float32)}
        return condition


_NAMES = {"context": "context_BxSxE", "tokens": "tokens_BxS", "length": "length_B", "size": "size_Bx2", "aspect": "aspect_B"}
_OF_TEXT = ("context", "tokens", "length")
