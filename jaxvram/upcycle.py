"""A mixture of experts made of dense Llamas: a file says which, prompts say what each is for.

    base = "FOLDER"            # attention, norms, table, head and tokenizer
    gates = "hidden"           # hidden | cheap_embed | random | uniform_random
    experts_per_token = 2
    seed = 0                   # of random gates

    [[experts]]
    source = "FOLDER"          # feed-forward layers
    positive_prompts = ["def quicksort(xs):", "import numpy as np"]
    negative_prompts = ["Once upon a time"]       # may be left out

The gate of an expert in a layer is a vector g; its logit for what the layer's experts read, u, is g . u. By gates, with p
over the positive prompts, m over the negative ones (what mergekit's documentation offers; the code is ours alone):
    hidden           g = n(mean_p h_p - mean_m h_m), h the base's stream before the layer at a prompt's last token
    cheap_embed      g = n(sum of the tokens' rows of the table over all p) - the same of m; one for all layers
    random           g ~ N(0, 1);  uniform_random  g ~ U(-1, 1) / sqrt(D);  n(v) = v / |v|
"""

import dataclasses
import pathlib
import tomllib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.convert import companions, llama, moe
from jaxvram.data.file_tokenizers import file_tokenizer
from jaxvram.errors import UserError, nearest
from jaxvram.layers import rope
from jaxvram.layers.stack import layer_slice
from jaxvram.models.llama import Block, LlamaConfig

GATES = ("hidden", "cheap_embed", "random", "uniform_random")
AT_ONCE = 16  # prompts that go through a layer together
EVEN = 5.0  # condition number of a layer's gates from which experts are told to be hardly told apart


@dataclasses.dataclass(frozen=True)
class Expert:
    source: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    base: str
    experts: tuple[Expert, ...]
    gates: str = "hidden"
    experts_per_token: int = 2
    seed: int = 0

    def __post_init__(self):
        if self.gates not in GATES:
            raise UserError(f"gates={self.gates!r} is unknown{nearest(str(self.gates), GATES)}")
        if not 1 <= self.experts_per_token <= len(self.experts):
            most = f"at most {len(self.experts)}, the number of [[experts]]"
            raise UserError(f"experts_per_token={self.experts_per_token} must be at least 1 and {most}")
        if self.gates.endswith("random"):
            return
        for i, expert in enumerate(self.experts):
            if not any(prompt.strip() for prompt in expert.positive_prompts):
                raise UserError(f"expert {i} has no positive_prompts, of which gates={self.gates!r} are made")
            twin = next((j for j in range(i) if set(self.experts[j].positive_prompts) == set(expert.positive_prompts)), None)
            if twin is not None:
                raise UserError(f"experts {twin} and {i} have the same positive_prompts: no router could tell them apart")


def read(file) -> Plan:
    """The plan in a .toml file.

    Raises:
      UserError: it cannot be read, or says what no plan says.
    """
    try:
        content = tomllib.loads(pathlib.Path(file).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--input={file} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--input={file} is no TOML file: {error}") from error
    experts = content.get("experts")
    if not isinstance(content.get("base"), str) or not isinstance(experts, list) or not experts:
        raise UserError(f"{file} needs base='FOLDER' and at least one [[experts]] (jaxvram/upcycle.py shows one)")
    made = tuple(_of_fields(Expert, expert, f"{file}, expert {i}") for i, expert in enumerate(experts))
    return _of_fields(Plan, content | {"experts": made}, str(file))


def _of_fields(cls, values, where: str):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or (cls is Expert and not isinstance(values.get("source"), str)):
        raise UserError(f"{where} needs source='FOLDER'")
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: {name} is unknown{nearest(name, fields)}")
    listed = {name: tuple(map(str, x)) if name.endswith("prompts") else x for name, x in values.items()}
    return cls(**listed)


def build_mixture(file, folder, encode: Callable | None = None) -> Iterator[str]:
    """Writes the mixture's folder; yields lines that say what was made.

    Args:
      file: the plan.
      encode: text -> token ids, beginning with the tokenizer's BOS; None: by the tokenizer that lies with the base.
    Raises:
      UserError: as `read`, or as `convert.moe.build_folder`.
    """
    plan = read(file)
    cfg = llama.config_of(plan.base)
    gates_LxExD = make_gates(plan, cfg, encode or _encoder(plan.base) if not plan.gates.endswith("random") else None)
    moe.build_folder(plan.base, [expert.source for expert in plan.experts], gates_LxExD, plan.experts_per_token, folder)
    companions.add(folder, plan.base)
    yield f"{len(plan.experts)} experts of {cfg.n_layer} layers, {plan.experts_per_token} a token, gates: {plan.gates}"
    conditions = [np.linalg.cond(gates_ExD) for gates_ExD in gates_LxExD]
    if (worst := max(conditions)) > EVEN:
        yield (
            f"the gates of layer {int(np.argmax(conditions))} are alike (condition number {worst:.0f}): their router hardly "
            "tells the experts apart; prompts that differ more would help"
        )


def _encoder(base):
    tokenizer = file_tokenizer(base)
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    return lambda text: [*begin, *tokenizer.encode(text)]


def make_gates(plan: Plan, cfg: LlamaConfig, encode) -> np.ndarray:
    """gates_LxExD in fp32."""
    shape = cfg.n_layer, len(plan.experts), cfg.n_embd
    if plan.gates.endswith("random"):
        random = np.random.RandomState(plan.seed)
        drawn = random.normal(size=shape) if plan.gates == "random" else random.uniform(-1, 1, shape) / cfg.n_embd**0.5
        return drawn.astype(np.float32)
    params = llama.load_params(plan.base, cfg)
    ids_of = lambda prompts: [np.asarray(encode(prompt), np.int32)[: cfg.block_size] for prompt in prompts]
    gates = []
    for expert in plan.experts:
        positive, negative = ids_of(expert.positive_prompts), ids_of(expert.negative_prompts)
        if plan.gates == "cheap_embed":
            table = params["embed_tokens"]["embedding"]
            of = lambda prompts: _normal(sum(table[ids].astype(np.float32).sum(0) for ids in prompts))  # noqa: B023
            gate_D = of(positive) - (of(negative) if negative else 0)
            gates.append(np.broadcast_to(gate_D, (cfg.n_layer, cfg.n_embd)))
        else:
            mean = lambda prompts: np.mean(last_hidden_states(cfg, params, prompts), axis=1)
            gates.append(_normal(mean(positive) - (mean(negative) if negative else 0)))
    return np.stack(gates, axis=1)


def _normal(v):
    return v / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-8)


def last_hidden_states(cfg: LlamaConfig, params, prompts: list[np.ndarray]) -> np.ndarray:
    """h_LxPxD in fp32: the stream before each layer at the last token of each prompt. One layer on the device at a time."""
    longest = max(map(len, prompts))
    block = Block(cfg, parent=None)
    rotation = rope.rotation(0, longest, cfg.rope_frequencies)

    @jax.jit
    def apply(layer, x_PxTxD):
        return block.apply({"params": layer}, x_PxTxD, None, rotation, None)[0]

    parts = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        # what stands behind a prompt is seen by no token of it
        tokens_PxT = np.stack([np.pad(ids, (0, longest - len(ids))) for ids in some])
        x_PxTxD = jnp.asarray(params["embed_tokens"]["embedding"][tokens_PxT]).astype(cfg.dtype)
        last_P, found = np.array([len(ids) - 1 for ids in some]), []
        for i in range(cfg.n_layer):
            found.append(np.asarray(x_PxTxD[np.arange(len(some)), last_P], np.float32))
            x_PxTxD = apply(layer_slice(params["layers"], i), x_PxTxD)
        parts.append(np.stack(found))
    return np.concatenate(parts, axis=1)
