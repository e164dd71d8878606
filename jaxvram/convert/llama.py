"""Llama's weights from and to a Hugging Face folder (transformers.LlamaForCausalLM), and from a GGUF file.

Both have matrices [out, in] and a list of layers; ours are [in, out] and stacked. Both hold the rows of W_q and W_k in an
order that says which channels RoPE turns together: Hugging Face's `half`, GGUF's `interleaved` (layers/rope.py); they are
brought into the model's. A table of ours may have rows of padding.
"""

import dataclasses
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxvram.convert.gguf import GGUFFile
from jaxvram.convert.huggingface import CONFIG, HuggingFaceFolder, check_names, write_folder
from jaxvram.errors import UserError
from jaxvram.models.llama import LlamaConfig

SIZE_OF = {  # ours: theirs in config.json, in a GGUF header
    "vocab_size": ("vocab_size", "vocab_size"),
    "n_layer": ("num_hidden_layers", "block_count"),
    "n_head": ("num_attention_heads", "attention.head_count"),
    "n_kv_head": ("num_key_value_heads", "attention.head_count_kv"),
    "n_embd": ("hidden_size", "embedding_length"),
    "n_inner": ("intermediate_size", "feed_forward_length"),
    "block_size": ("max_position_embeddings", "context_length"),
}
DEFAULTS = {  # what transformers takes for a key that config.json leaves out
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False,
}  # fmt: skip
FIXED = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1.0, 1)}  # what our Llama is, and config.json may change
SCALING_OF = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}
HARMLESS = ("rotary_emb.inv_freq", "rope_freqs.weight", "lm_head.weight")  # computed here, or a tied head's copy
SPECIAL = {32000: (1, 2), 128256: (128000, 128001), 49152: (0, 0)}  # vocabulary: <s> and </s> of Llama 2, 3, SmolLM2


class Parameter(NamedTuple):
    """One parameter; with {} in its names, of every layer."""

    ours: tuple[str, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]  # theirs
    heads: int = 0  # whose channels RoPE turns

    @property
    def is_matrix(self) -> bool:
        """Ours lies [in, out]."""
        return self.ours[-1] == "kernel"

    def layers(self, cfg):
        """The numbers of the layers that have it; None: it is in none."""
        return range(cfg.n_layer) if "{}" in self.hf else (None,)

    def name(self, source) -> str:
        return self.gguf if isinstance(source, GGUFFile) else self.hf


def load_params(folder_or_file, cfg: LlamaConfig, put: Callable | None = None) -> dict:
    """Parameters of `Llama(cfg)` in cfg.param_dtype (the tree inside of "params").

    Args:
      folder_or_file: a Hugging Face folder, or a GGUF file.
      put: called with the path and the NumPy array of each parameter, all layers stacked, as soon as it is complete; what
        it returns stands in the tree. None: the array itself.
    Raises:
      UserError: the weights are incomplete or damaged, or of another model than `cfg`; the message names the overrides.
    """
    return stacked(tensors(folder_or_file, cfg), cfg, put or (lambda path, array: array))


def stacked(parts, cfg: LlamaConfig, put: Callable, dtypes=types.MappingProxyType({})) -> dict:
    """The tree of what `tensors` yields. `dtypes`: of leaves by their name, where they are not in cfg.param_dtype."""
    params, growing = {}, {}
    for path, layer, array in parts:
        dtype = dtypes.get(path[-1], cfg.param_dtype)
        if layer is None:
            _put(params, path, put(path, np.array(array, dtype, order="C")))
            continue
        if layer == 0:
            growing[path] = np.empty((cfg.n_layer, *array.shape), dtype)
        growing[path][layer] = array
        if layer == cfg.n_layer - 1:
            _put(params, path, put(path, growing.pop(path)))
    return params


def tensors(folder_or_file, cfg: LlamaConfig) -> Iterator[tuple[tuple[str, ...], int | None, np.ndarray]]:
    """(path in our tree, layer or None, array) of every tensor, one in memory at a time, a parameter's layers in a row.

    Arrays are shaped as ours, [in, out] and with rows of padding, in the dtype of the file (GGUF: fp32), and may be views.
    Config and names are checked at once, shapes as they come.

    Raises: as load_params.
    """
    source = open_source(folder_or_file, "llama")
    is_gguf = isinstance(source, GGUFFile)
    tied = check_gguf(source, cfg) if is_gguf else check_folder(source, cfg)
    found = as_named_there(source, parameters(cfg), cfg, tied)
    layout = "interleaved" if is_gguf else "half"
    read = lambda p, i: to_ours(source.tensor(p.name(source).format(i), p.shape), p, cfg, layout)
    return ((p.ours, i, read(p, i)) for p in found for i in p.layers(cfg))


def as_named_there(source, found: list[Parameter], cfg: LlamaConfig, tied: bool, more: Callable = lambda p: ()):
    """The parameters with the names that `source` has for them. `more`: other names that belong to one of its own.

    Raises:
      UserError: some are missing, or there are others.
    """
    if tied and not cfg.tie_head:  # the head starts as a copy of the table
        found = [*found[:-1], found[-1]._replace(hf=found[0].hf, gguf=found[0].gguf)]
    if not isinstance(source, GGUFFile) and "model.embed_tokens.weight" not in source and "embed_tokens.weight" in source:
        found = [p._replace(hf=p.hf.removeprefix("model.")) for p in found]
    names = [name.format(i) for p in found for name in (p.name(source), *more(p)) for i in p.layers(cfg)]
    check_names(source.path, source.names, dict.fromkeys(names), HARMLESS)
    return found


def save(params, cfg: LlamaConfig, folder) -> None:
    """A folder that `transformers.LlamaForCausalLM.from_pretrained` loads, with the same logits; complete or not there.

    Rows of padding are left out. More than 5 GB become several files.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    params = jax.tree.map(np.asarray, params)
    theirs = {}
    for p in parameters(cfg):
        array = params
        for name in p.ours:
            array = array[name]
        layers = enumerate(array) if "{}" in p.hf else [(None, array)]
        theirs |= {p.hf.format(i): to_half(a, p, cfg) for i, a in layers}
    write_folder(folder, config_json(cfg), theirs)


def parameters(cfg: LlamaConfig) -> list[Parameter]:
    """Every parameter: the table first, a head of its own last."""
    D, F, V, HK, GK = cfg.n_embd, cfg.n_inner, cfg.vocab_size, cfg.n_head * cfg.key_size, cfg.n_kv_head * cfg.key_size
    found = [Parameter(("embed_tokens", "embedding"), "model.embed_tokens.weight", "token_embd.weight", (V, D))]
    norm = lambda ours, hf, gguf: Parameter((*ours, "scale"), f"model.{hf}.weight", f"{gguf}.weight", (D,))
    found.append(norm(("layers", "input_norm"), "layers.{}.input_layernorm", "blk.{}.attn_norm"))
    found.append(norm(("layers", "post_norm"), "layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"))
    for module, name, gguf, shape, heads in (
        ("attn", "q_proj", "attn_q", (HK, D), cfg.n_head), ("attn", "k_proj", "attn_k", (GK, D), cfg.n_kv_head),
        ("attn", "v_proj", "attn_v", (GK, D), 0), ("attn", "o_proj", "attn_output", (D, HK), 0),
        ("mlp", "gate_proj", "ffn_gate", (F, D), 0), ("mlp", "up_proj", "ffn_up", (F, D), 0),
        ("mlp", "down_proj", "ffn_down", (D, F), 0),
    ):  # fmt: skip
        theirs = "self_attn" if module == "attn" else module
        biased = cfg.attention_bias if module == "attn" else cfg.mlp_bias
        for leaf, end, of_leaf in [("kernel", "weight", shape)] + [("bias", "bias", shape[:1])] * biased:
            names = (f"model.layers.{{}}.{theirs}.{name}.{end}", f"blk.{{}}.{gguf}.{end}")
            found.append(Parameter(("layers", module, name, leaf), *names, of_leaf, heads))
    found.append(norm(("norm",), "norm", "output_norm"))
    if not cfg.tie_head:
        found.append(Parameter(("lm_head", "kernel"), "lm_head.weight", "output.weight", (V, D)))
    return found


def to_ours(array, p: Parameter, cfg: LlamaConfig, layout: str):
    """One layer, of a source whose rows of W_q and W_k lie in `layout`, as we have it."""
    if p.heads and layout != cfg.rope_layout:
        array = reordered(array, p.heads, cfg.rope_layout)
    if p.ours[0] in ("embed_tokens", "lm_head") and cfg.table_rows > cfg.vocab_size:
        array = np.concatenate([array, np.zeros((cfg.table_rows - cfg.vocab_size, cfg.n_embd), array.dtype)])
    return array.T if p.is_matrix else array


def to_half(array, p: Parameter, cfg: LlamaConfig):
    """One layer as a Hugging Face folder has it."""
    array = array.T if p.is_matrix else array
    if p.heads and cfg.rope_layout != "half":
        array = reordered(array, p.heads, "half")
    return array[: p.shape[0]]


def reordered(array, heads: int, to: str):
    """Rows of W_q or W_k (or entries of its bias): a head's pairs brought together (`interleaved`), or parted (`half`)."""
    half = array.shape[0] // heads // 2
    parted = (2, half) if to == "interleaved" else (half, 2)
    return array.reshape(heads, *parted, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def open_source(folder_or_file, *kinds: str, gguf: str = "llama"):
    """The folder, whose model goes by one of `kinds`, or the file, of that architecture."""
    path = pathlib.Path(folder_or_file).expanduser()
    if path.suffix == ".gguf":
        return GGUFFile(path, gguf)
    if path.is_dir() and not (path / CONFIG).exists() and (found := sorted(path.glob("*.gguf"))):
        raise UserError(f"{path} holds GGUF files; name the one to read, as init_from={found[0]}")
    return HuggingFaceFolder(path, *kinds)


def config_of(folder) -> LlamaConfig:
    """The configuration that a Hugging Face folder's config.json means.

    Raises:
      UserError: there is none, or it is of another model.
    """
    fields, tied = _fields_of(HuggingFaceFolder(folder, "llama"))
    return LlamaConfig(**fields, tie_head=tied)


def check_folder(source: HuggingFaceFolder, cfg: LlamaConfig, defaults=DEFAULTS, fixed=FIXED, more=None) -> bool:
    """Raises a UserError where config.json is not of `cfg`; True where the head is the table.

    Args:
      defaults, fixed: of another model than Llama.
      more: what config.json says of further fields of `cfg`.
    """
    fields, tied = _fields_of(source, defaults, fixed)
    _check_fields(source, fields | (more or {}), cfg, tied)
    return tied


def _fields_of(source: HuggingFaceFolder, defaults=DEFAULTS, fixed=FIXED) -> tuple[dict, bool]:
    """(what config.json says, in our names; is the head the table)."""
    theirs = defaults | source.config
    if theirs.get("num_key_value_heads") is None:
        theirs["num_key_value_heads"] = theirs["num_attention_heads"]
    source.check_sizes(theirs, [hf for hf, _ in SIZE_OF.values()])
    scaling = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", theirs.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fixed = {"rope_type": ("default", "llama3"), **fixed}
    source.check_fixed({**theirs, "rope_type": kind}, fixed, "Llama as we know it")
    wanted = {ours: theirs[hf] for ours, (hf, _) in SIZE_OF.items()}
    wanted |= {"head_dim": theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]}
    wanted |= {"attention_bias": theirs["attention_bias"], "mlp_bias": theirs["mlp_bias"], "rope_factor": 1.0}
    numbers = {"rope_theta": theta, "norm_eps": theirs["rms_norm_eps"]}
    if kind == "llama3":
        numbers |= {ours: scaling.get(key) for ours, key in SCALING_OF.items()}
    for name, value in numbers.items():
        if type(value) not in (int, float) or value <= 0:
            raise UserError(f"{source.path / CONFIG} is damaged: {SCALING_OF.get(name, name)}={value!r}")
    as_ours = {name: value if name == "rope_original_context" else float(value) for name, value in numbers.items()}
    return wanted | as_ours, bool(theirs["tie_word_embeddings"])


def check_gguf(source: GGUFFile, cfg: LlamaConfig) -> bool:
    """The same for a GGUF header."""
    wanted = {ours: source.value(key) for ours, (_, key) in SIZE_OF.items()}
    if wanted["vocab_size"] is None:
        wanted["vocab_size"] = len(source.metadata.get("tokenizer.ggml.tokens", ())) or cfg.vocab_size
    wanted["n_kv_head"] = wanted["n_kv_head"] or wanted["n_head"]
    for ours, value in wanted.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{source.path} is damaged, or no Llama: llama.{SIZE_OF[ours][1]}={value!r} in its header")
    if source.value("expert_count", 0):
        raise UserError(f"{source.path} is a mixture of experts; this recipe's model is 'llama'")
    if (kind := source.value("rope.scaling.type", "none")) != "none":
        raise UserError(f"{source.path}: rope.scaling.type={kind} is no Llama as we know it (there: none); not supported")
    wanted["head_dim"] = source.value("attention.key_length", wanted["n_embd"] // wanted["n_head"])
    for ours, module in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_gate")):
        wanted[ours] = f"blk.0.{module}.bias" in source.names
    # a header holds fp32: 1e-5 is 9.99999975e-06 there
    wanted["rope_theta"] = _shortest(source.value("rope.freq_base", 10000.0))
    wanted["norm_eps"] = _shortest(source.value("attention.layer_norm_rms_epsilon", 1e-5))
    wanted["rope_factor"] = _rope_factor(source, cfg)
    tied = "output.weight" not in source.names
    _check_fields(source, wanted, cfg, tied)
    return tied


def _rope_factor(source: GGUFFile, cfg: LlamaConfig) -> float:
    """What the frequencies in a GGUF file are divided by at most. They must be those of `cfg`, if that number is its."""
    if "rope_freqs.weight" not in source.names:
        return 1.0
    theirs_R = source.tensor("rope_freqs.weight", (cfg.key_size // 2,))
    ours_R = dataclasses.replace(cfg, rope_factor=1.0).rope_frequencies / cfg.rope_frequencies
    if np.allclose(theirs_R, ours_R, rtol=1e-4):
        return cfg.rope_factor
    if (factor := _shortest(theirs_R.max())) == cfg.rope_factor:
        raise UserError(
            f"{source.path}: frequencies are not scaled as model.rope_low_freq_factor, rope_high_freq_factor and "
            "rope_original_context say; give those of the original model's config.json"
        )
    return factor


def _check_fields(source, wanted: dict, cfg: LlamaConfig, tied: bool) -> None:
    """Compares fields; a shorter context than the checkpoint's is fine, and so is a head of its own that starts tied."""
    if cfg.block_size <= wanted["block_size"]:
        del wanted["block_size"]
    if wanted["head_dim"] == cfg.key_size:
        del wanted["head_dim"]
    if cfg.tie_head and not tied:
        wanted["tie_head"] = False
    source.check_fields(wanted, cfg)


def _shortest(x) -> float:
    """The shortest decimal number that fp32 rounds to x."""
    return float(str(np.float32(x)))


def config_json(cfg: LlamaConfig) -> dict:
    scaling = None
    if cfg.rope_factor != 1:
        scaling = {"rope_type": "llama3"} | {theirs: getattr(cfg, ours) for ours, theirs in SCALING_OF.items()}
    bos, eos = SPECIAL.get(cfg.vocab_size, (None, None))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{hf: getattr(cfg, ours) for ours, (hf, _) in SIZE_OF.items()},
        "head_dim": cfg.key_size,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": cfg.attention_bias,
        "mlp_bias": cfg.mlp_bias,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tie_head,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": cfg.param_dtype,
    }


def _put(tree: dict, path: tuple[str, ...], value) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
