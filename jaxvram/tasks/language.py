"""Language modelling: the next token, as loss, as batch layout, as samples to show and as exact answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.errors import UserError
from jaxvram.kernels.linear_cross_entropy import linear_cross_entropy
from jaxvram.sample.text import SampleConfig, generate


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    score_problems: int = 1000  # held-out problems answered at each evaluation; only where the data has answers


class LanguageTask:
    """What a train loop, a plan and a sampler need to know of language modelling.

    Args:
      model: a Linen module of the language model protocol (models/gpt2.py).
      source: data with `vocab_size`, `tokenizer` and `batch`; None for a plan, which reads shapes alone.
    """

    unit = "tokens"

    def __init__(self, model, source, cfg: LanguageConfig, sample: SampleConfig):
        self.model, self.source, self.cfg, self.sample = model, source, cfg, sample
        if source is not None and source.vocab_size > model.cfg.vocab_size:
            raise UserError(
                f"the data has {source.vocab_size} tokens, the model only model.vocab_size={model.cfg.vocab_size} of them"
            )

    @property
    def data_identity(self) -> dict:
        """What a checkpoint's data and the data at hand must share: the meaning of a token."""
        return {"vocabulary": self.source.tokenizer.identity, "vocab_size": self.source.vocab_size}

    @property
    def units_per_example(self) -> int:
        return self.model.cfg.block_size

    def batch_spec(self, batch_size: int):
        """Shapes of a batch: T is the whole context."""
        shape = jax.ShapeDtypeStruct((batch_size, self.model.cfg.block_size), jnp.int32)
        return {"tokens": shape, "targets": shape}

    def init(self, key):
        """Parameters from the architecture's own distributions."""
        return self.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def loss(self, params, batch, key=None):
        """(sum of nats over the targets, how many there are, no further metrics); dropout only with a key."""
        variables, rngs = {"params": params}, None if key is None else {"dropout": key}
        hidden_BxTxD, _ = self.model.apply(variables, batch["tokens"], deterministic=key is None, rngs=rngs)
        head_VxD = self.model.apply(variables, method="head_VxD")
        cfg = self.model.cfg
        loss_BxT, _ = linear_cross_entropy(
            hidden_BxTxD, head_VxD, batch["targets"], cfg.vocab_size, implementation=cfg.kernels
        )
        return loss_BxT.sum(), (batch["targets"] >= 0).sum().astype(jnp.float32), {}

    def check_samples(self) -> None:
        """Raises the UserError that `show` would meet only after the first hundreds of steps."""
        if not hasattr(self.source, "problems"):
            self._prompt_ids(self.sample.prompt)

    def _prompt_ids(self, prompt: str) -> np.ndarray:
        try:
            ids_P = np.asarray(self.source.tokenizer.encode(prompt), np.int32)
        except UserError as error:
            raise UserError(f"sample.prompt={prompt[:40]!r}: {error}") from error
        if ids_P.size == 0:
            raise UserError("sample.prompt is empty; a model continues at least one token")
        return ids_P

    def continue_prompt(self, params, prompt: str | None = None) -> list[str]:
        """Samples as `config.sample` asks for them, each with its prompt in front.

        Raises:
          UserError: the prompt has characters outside the vocabulary, or no token at all.
        """
        cfg = self.sample
        prompt = cfg.prompt if prompt is None else prompt
        ids_P, tokenizer = self._prompt_ids(prompt), self.source.tokenizer
        tokens_BxN = generate(
            self.model, params, jnp.broadcast_to(ids_P, (cfg.num_samples, ids_P.size)), jax.random.key(cfg.seed),
            new_tokens=cfg.max_new_tokens, vocab_size=self.source.vocab_size,
            temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
        )  # fmt: skip
        return [prompt + tokenizer.decode(row) for row in np.asarray(tokens_BxN)]

    def show(self, params) -> list[str]:
        """What a reader sees during training: continuations, or problems with the model's answers."""
        if not hasattr(self.source, "problems"):
            return self.continue_prompt(params)
        prompts, answers, said = self._answers(params, self.sample.num_samples)
        text = self.source.tokenizer.decode
        verdict = lambda want, got: "right" if (want == got).all() else f"wrong, it is {text(want)}"
        return [f"{text(p)} -> {text(s)}  ({verdict(a, s)})" for p, a, s in zip(prompts, answers, said, strict=True)]

    def scores(self, params) -> dict[str, float]:
        """Share of held-out problems answered without a mistake; empty for plain text."""
        if not hasattr(self.source, "problems") or self.cfg.score_problems == 0:
            return {}
        _, answers_NxA, said_NxA = self._answers(params, self.cfg.score_problems)
        return {"exact_match": float((answers_NxA == said_NxA).all(-1).mean())}

    def _answers(self, params, limit: int):
        prompts_NxP, answers_NxA = self.source.problems("val", limit)
        said_NxA = generate(
            self.model, params, jnp.asarray(prompts_NxP), jax.random.key(0), new_tokens=answers_NxA.shape[1],
            vocab_size=self.source.vocab_size, temperature=0,
        )  # fmt: skip
        return prompts_NxP, answers_NxA, np.asarray(said_NxA)
