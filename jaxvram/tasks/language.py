"""Language modelling: the next token, as loss, as batch layout, as samples to show and as exact answers."""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram import data, models
from jaxvram.convert.packaged import locate
from jaxvram.data.instructions import prompt_segments
from jaxvram.data.tokenizers import continuation
from jaxvram.errors import UserError
from jaxvram.finetune.adapted import adapted
from jaxvram.kernels.linear_cross_entropy import linear_cross_entropy
from jaxvram.layers import routing
from jaxvram.sample.text import SampleConfig, generate
from jaxvram.tasks.samples import Samples

UNKNOWN_VOCABULARY = 256  # characters; more than any text in one European language has


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    score_problems: int = 1000  # held-out problems answered at each evaluation; only where the data has answers
    chunk_length: int = 0  # tokens of a sequence at a time, the model's state carried on: memory for so many; 0: all
    chunk_gradient: bool = True  # through the state from chunk to chunk; False: none (truncated backpropagation)
    l2wrap: float = 0.0  # a pull on each token's largest logit, in the gradient alone; RWKV's authors take 1e-4; 0: none

    def __post_init__(self):
        if min(self.score_problems, self.chunk_length, self.l2wrap) < 0:
            raise UserError("task: score_problems, chunk_length and l2wrap must not be negative")


class LanguageTask:
    """What a train loop, a plan and a sampler need to know of language modelling.

    Args:
      model: a Linen module of the language model protocol (models/gpt2.py).
      source: data with `vocab_size`, `tokenizer` and `batch`; None for a plan, which reads shapes alone.
      data_cfg: what the source was made from; None: nothing that matters to shapes.
    """

    unit = "tokens"
    SECTIONS: ClassVar = {"task": LanguageConfig, "data": data.DataConfig, "sample": SampleConfig}

    @classmethod
    def of_recipe(cls, recipe, with_data: bool = True, say: Callable[[str], None] = lambda _: None) -> "LanguageTask":
        """The task of a recipe. Without data, for a plan: nothing is downloaded, and an unknown vocabulary is assumed."""
        if with_data:
            recipe = dataclasses.replace(recipe, data=_with_vocabulary(recipe))
        cfg = recipe.model
        source = None
        if with_data:
            source = data.load(recipe.data, cfg.block_size, recipe.train.seed)
        elif cfg.vocab_size == 0:
            try:
                at_hand = dataclasses.replace(recipe.data, download=False, allow_offline=False)
                source = data.load(at_hand, cfg.block_size, recipe.train.seed)
            except UserError:
                say(f"the data is not on this machine: assuming {UNKNOWN_VOCABULARY} characters (model.vocab_size)")
        if cfg.vocab_size == 0:
            cfg = dataclasses.replace(cfg, vocab_size=source.vocab_size if source else UNKNOWN_VOCABULARY)
        if source and recipe.train.init_from:
            _check_vocabulary(source, cfg)
        model = models.build(cfg)
        if _is_packed(recipe.data):
            _check_packing(model, recipe.task)
        return cls(adapted(model, recipe.finetune), source, recipe.task, recipe.sample, recipe.data)

    def __init__(
        self, model, source, cfg: LanguageConfig, sample: SampleConfig, data_cfg: data.DataConfig | None = None
    ):
        self.model, self.source, self.cfg, self.sample = model, source, cfg, sample
        self.data_cfg = data_cfg or data.DataConfig()
        if cfg.chunk_length and model.cfg.block_size % cfg.chunk_length:
            which = f"task.chunk_length={cfg.chunk_length}"
            raise UserError(f"{which} does not divide model.block_size={model.cfg.block_size}")
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
        names = ("tokens", "targets", "segments") if _is_packed(self.data_cfg) else ("tokens", "targets")
        return dict.fromkeys(names, shape)

    def example(self) -> tuple:
        """What the model is called with, as small as can be."""
        return (jnp.zeros((1, 1), jnp.int32),)

    def init(self, key):
        """Parameters from the architecture's own distributions."""
        return self.model.init(key, *self.example())["params"]

    def loss(self, params, batch, key=None):
        """(sum of nats over the targets, how many there are, sums of metrics); dropout only with a key.

        A mixture of experts adds what its routers cost, times the number of targets, and tells of them (layers/routing.py):
        of microbatches, those with more targets count for more.
        """
        nats, weight, told_L = self._sums(params, batch, key)
        if not told_L:
            return nats, weight, {}
        cfg = self.model.cfg
        added, metrics = routing.terms(told_L, cfg.balance_loss, cfg.z_loss)
        return nats + weight * added, weight, {"next_token_loss": nats} | {name: weight * x for name, x in metrics.items()}

    def _sums(self, params, batch, key):
        """(sum of nats, how many targets, what the layers told of their routers or {})."""
        targets_BxT = batch["targets"]
        if self.cfg.chunk_length in (0, targets_BxT.shape[1]):
            nats, _, told_L = self._nats(
                params, batch["tokens"], targets_BxT, key, None, batch.get("segments"), self._mix(batch)
            )
        else:
            nats, told_L = self._nats_by_chunk(params, batch["tokens"], targets_BxT, key, self._mix(batch))
        return nats, (targets_BxT >= 0).sum().astype(jnp.float32), told_L

    @property
    def reads_step(self) -> bool:
        """Does the loss change with time? Of a BitNet that began in full precision it does."""
        return getattr(self.model.cfg, "anneal_steps", 0) > 0

    def _mix(self, batch):
        """How far weights and activations are rounded (models/bitnet.py); None: in full, and always where nobody trains."""
        return self.model.cfg.mix_at(batch["step"][0]) if "step" in batch else None

    def _nats(self, params, tokens_BxT, targets_BxT, key, state, segments_BxT=None, mix=None):
        """(sum of nats over the targets, the model's state after the last token, what the layers told or {})."""
        variables, rngs = {"params": params}, None if key is None else {"dropout": key}
        options = {name: x for name, x in (("segments_BxT", segments_BxT), ("mix", mix)) if x is not None}
        options |= {"deterministic": key is None, "rngs": rngs}
        if hasattr(self.model.cfg, "n_expert"):
            hidden_BxTxD, state, told_L = self.model.apply(variables, tokens_BxT, state, method="routed", **options)
        else:
            (hidden_BxTxD, state), told_L = self.model.apply(variables, tokens_BxT, state, **options), {}
        head_VxD = self.model.apply(variables, method="head_VxD")
        cfg = self.model.cfg
        # A head of its own is stored (D, V): turned back here, or a kernel would be given a turned copy of it.
        head, vocab_axis = (head_VxD, 0) if cfg.tie_head else (head_VxD.T, 1)
        options = {"vocab_axis": vocab_axis, "l2wrap": self.cfg.l2wrap, "implementation": cfg.kernels}
        loss_BxT, _ = linear_cross_entropy(hidden_BxTxD, head, targets_BxT, cfg.vocab_size, **options)
        return loss_BxT.sum(), state, told_L

    def _nats_by_chunk(self, params, tokens_BxT, targets_BxT, key, mix=None):
        """The same, `chunk_length` tokens at a time: the backward pass keeps a state a chunk, and makes each chunk again."""
        B, T = tokens_BxT.shape
        chunks = T // self.cfg.chunk_length
        split = lambda x_BxT: x_BxT.reshape(B, chunks, -1).swapaxes(0, 1)
        keys = None if key is None else jax.random.split(key, chunks)

        @jax.checkpoint
        def chunk(carry, of_chunk):
            nats, state = carry
            if not self.cfg.chunk_gradient:
                state = jax.lax.stop_gradient(state)
            more, state, told_L = self._nats(params, *of_chunk, state, mix=mix)
            return (nats + more, state), told_L

        empty = self.model.apply({"params": params}, B, method="initial_state")
        xs = split(tokens_BxT), split(targets_BxT), keys
        (nats, _), told = jax.lax.scan(chunk, (jnp.float32(0), empty), xs)
        return nats, jax.tree.map(lambda x: x.mean(0), told)

    def evaluation(self, params, batch, key):
        """The next token's loss, and the routers' loads where there are any; nothing is drawn."""
        nats, weight, told_L = self._sums(params, batch, None)
        return {"loss": (nats, weight)} | ({"router_load": (weight * told_L["load_E"], weight)} if told_L else {})

    def check_samples(self) -> None:
        """Raises the UserError that `show` would meet only after the first hundreds of steps."""
        if not self._has_problems and not self._has_exam:
            self._prompt_ids(self.sample.prompt)

    def _prompt_ids(self, prompt: str) -> np.ndarray:
        if self._has_turns and not prompt.strip():
            raise UserError(
                "sample.prompt is blank; with data.name=instructions it is what a user says, such as "
                "--config.sample.prompt='Name three colours.'"
            )
        encode = self.source.prompt_ids if self._has_turns else self.source.tokenizer.encode
        try:
            ids_P = np.asarray(encode(prompt), np.int32)
        except UserError as error:
            raise UserError(f"sample.prompt={prompt[:40]!r}: {error}") from error
        if ids_P.size == 0:
            raise UserError("sample.prompt is empty; a model continues at least one token")
        return ids_P

    def continue_prompt(self, params, prompt: str | None = None) -> list[str]:
        """Samples as `config.sample` asks for them, each with its prompt in front; of instructions: answers to it.

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
        if self._has_turns:
            answers = (self.source.until_end(row) for row in np.asarray(tokens_BxN))
            return [f"{prompt}\n{continuation(tokenizer, ids_P, answer).strip()}" for answer in answers]
        return [prompt + continuation(tokenizer, ids_P, row) for row in np.asarray(tokens_BxN)]

    def show(self, params) -> Samples:
        """What a reader sees during training: continuations, or problems with the model's answers."""
        if self._has_exam:
            return Samples.of_texts(self._filled_in(params))
        return Samples.of_texts(self._answered(params) if self._has_problems else self.continue_prompt(params))

    def show_on_request(self, params) -> Samples:
        """Continuations of the prompt that the recipe or a file gives; without one, as during training."""
        prompt = _prompt_of(self.sample)
        if prompt is None and (self._has_problems or self._has_exam):
            return self.show(params)
        return Samples.of_texts(self.continue_prompt(params, prompt))

    @property
    def _has_problems(self) -> bool:
        return hasattr(self.source, "problems")

    @property
    def _has_exam(self) -> bool:
        return hasattr(self.source, "exam")

    @property
    def _has_turns(self) -> bool:
        return hasattr(self.source, "prompt_ids")

    def _answered(self, params) -> list[str]:
        prompts, answers, said = self._answers(params, self.sample.num_samples)
        text = self.source.tokenizer.decode
        verdict = lambda want, got: "right" if (want == got).all() else f"wrong, it is {text(want)}"
        return [f"{text(p)} -> {text(s)}  ({verdict(a, s)})" for p, a, s in zip(prompts, answers, said, strict=True)]

    def _filled_in(self, params) -> list[str]:
        """Rows of an exam as they were read, and what the model said at each question."""
        tokens, targets, said = self._read(params, self.sample.num_samples)
        text = self.source.tokenizer.decode
        shown = []
        for row, wanted, got in zip(tokens, targets, said, strict=True):
            asked = wanted >= 0
            verdicts = [f"{text(k)}{text(s)}" + ("" if s == w else f" (not {text(w)})")
                        for k, w, s in zip(row[asked], wanted[asked], got[asked], strict=True)]  # fmt: skip
            shown.append(f"{text(row)} -> {', '.join(verdicts)}")
        return shown

    def scores(self, params) -> dict[str, float]:
        """Share of held-out problems answered without a mistake, or of an exam's single questions; empty for plain text."""
        limit = self.cfg.score_problems
        if limit and self._has_exam:
            _, targets_NxT, said_NxT = self._read(params, limit)
            return {"accuracy": float((said_NxT == targets_NxT)[targets_NxT >= 0].mean())}
        if limit and self._has_problems:
            _, answers_NxA, said_NxA = self._answers(params, limit)
            return {"exact_match": float((answers_NxA == said_NxA).all(-1).mean())}
        return {}

    def _read(self, params, limit: int):
        batch = self.source.exam("val", limit)
        return batch["tokens"], batch["targets"], np.asarray(self._likeliest(params, batch["tokens"]))

    @functools.cached_property
    def _likeliest(self):
        """`(params, tokens_NxT) -> (N, T)`: at each token the one that is most likely to follow."""
        model, vocab_size = self.model, self.source.vocab_size

        @jax.jit
        def likeliest(params, tokens_NxT):
            hidden_NxTxD, _ = model.apply({"params": params}, tokens_NxT)
            head_VxD = model.apply({"params": params}, method="head_VxD")[:vocab_size].astype(hidden_NxTxD.dtype)
            logits_NxTxV = jnp.einsum("ntd,vd->ntv", hidden_NxTxD, head_VxD, preferred_element_type=jnp.float32)
            return logits_NxTxV.argmax(-1)

        return likeliest

    def _answers(self, params, limit: int):
        prompts_NxP, answers_NxA = self.source.problems("val", limit)
        said_NxA = generate(
            self.model, params, jnp.asarray(prompts_NxP), jax.random.key(0), new_tokens=answers_NxA.shape[1],
            vocab_size=self.source.vocab_size, temperature=0,
        )  # fmt: skip
        return prompts_NxP, answers_NxA, np.asarray(said_NxA)

    def sampling(self, params):
        """(function, arguments): continuations as config.sample asks, or as many answers as an evaluation scores."""
        cfg, vocab_size = self.sample, self.source.vocab_size if self.source else self.model.cfg.vocab_size
        options = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
        if self._has_exam:
            tokens_NxT = self.source.exam("val", max(self.cfg.score_problems, cfg.num_samples))["tokens"]
            return self._likeliest, (params, jax.ShapeDtypeStruct(tokens_NxT.shape, jnp.int32))
        if self._has_problems:
            prompts_NxP, answers_NxA = self.source.problems("val", max(self.cfg.score_problems, cfg.num_samples))
            shape, new_tokens, options = prompts_NxP.shape, answers_NxA.shape[1], {"temperature": 0}
        else:  # no vocabulary here makes more tokens than there are characters, and only the end of a long prompt is read
            T, text = self.model.cfg.block_size, cfg.prompt
            if self.data_cfg.name == "instructions":
                text = "".join("." if s.is_special else s.text for s in prompt_segments(self.data_cfg, text))
            length = T if cfg.prompt_file else min(len(text), T)
            shape, new_tokens = (cfg.num_samples, max(length, 1)), cfg.max_new_tokens

        def sample(params, prompt, key):
            return generate(self.model, params, prompt, key, new_tokens=new_tokens, vocab_size=vocab_size, **options)

        return sample, (params, jax.ShapeDtypeStruct(shape, jnp.int32), jax.eval_shape(lambda: jax.random.key(0)))


def _with_vocabulary(recipe) -> data.DataConfig:
    """A tokenizer of a file that nobody names is that which lies with the weights."""
    cfg, weights = recipe.data, recipe.train.init_from
    if cfg.tokenizer != "file" or cfg.vocab_path:
        return cfg
    if not weights:
        raise UserError(
            "data.tokenizer=file is the tokenizer that lies with the weights, and there are none: set train.init_from to a "
            "folder or .gguf of them; or, to train from nothing, data.vocab_path to a tokenizer"
        )
    if not pathlib.Path(locate(weights)).expanduser().exists():
        raise UserError(f"train.init_from={weights}: there is no such folder or file")
    return dataclasses.replace(cfg, vocab_path=locate(weights))


def _check_vocabulary(source, cfg) -> None:
    """Raises a UserError where pretrained weights surely read other tokens: a few rows more are padding, a tenth is not."""
    if source.vocab_size < 0.9 * cfg.vocab_size:
        raise UserError(
            f"the tokenizer has {source.vocab_size:,} tokens, and the weights of train.init_from know {cfg.vocab_size:,}: "
            "it is not theirs (data.tokenizer, data.vocab_path)"
        )


def _is_packed(cfg: data.DataConfig) -> bool:
    return cfg.name == "instructions" and cfg.pack


def _check_packing(model, cfg: LanguageConfig) -> None:
    """Raises a UserError unless the model can keep the examples of a row apart."""
    if "segments_BxT" not in inspect.signature(type(model).__call__).parameters:
        raise UserError(
            f"a {type(model).__name__} cannot keep the examples of a row apart: set data.pack=False (one example a row)"
        )
    if cfg.chunk_length not in (0, model.cfg.block_size):
        raise UserError("task.chunk_length carries a state past the ends of packed examples: set data.pack=False")


def _prompt_of(cfg: SampleConfig) -> str | None:
    """What was asked for, in the recipe or in a file; None: nothing in particular."""
    if not cfg.prompt_file:
        return cfg.prompt if cfg.prompt != SampleConfig.prompt else None
    path = pathlib.Path(cfg.prompt_file)
    if not path.is_file():
        raise UserError(f"sample.prompt_file={path} does not exist")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"sample.prompt_file={path} is not UTF-8 text") from error
