"""Text encoders from folders of Hugging Face's, and the small one to a folder of our own and back.

Read are CLIP's text half (alone or within a CLIPModel), T5's encoder (alone or within a whole T5), as safetensors of one
file or several; and a pipeline's folder, of which text_encoder/ is meant. Weights are read a layer at a time, so that a
model larger than a card or the memory can pass through it. Our matrices lie [in, out], theirs [out, in]; q, k and v, side
by side here, are three there.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvram.convert.huggingface import CONFIG, HuggingFaceFolder, write_folder
from jaxvram.errors import UserError
from jaxvram.models.text_encoder import CLIPText, CLIPTextConfig, SmallTextConfig, SmallTextEncoder, T5Config, T5Encoder

OURS = "jaxvram_text"  # model_type of the small one
ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # folders of a pipeline; a second encoder's end in _2
KINDS = f"CLIP's (clip, clip_text_model), T5's of version 1.1 (t5) and our small ones ({OURS})"
MODULE_OF = {CLIPTextConfig: CLIPText, T5Config: T5Encoder, SmallTextConfig: SmallTextEncoder}
NAME_OF = {CLIPTextConfig: "CLIP text", T5Config: "T5", SmallTextConfig: "small text"}
HOW_TO_COMPUTE = ("remat", "unroll_layers", "dtype", "param_dtype", "kernels")  # fields that a folder says nothing of

CLIP_DEFAULTS = {  # what transformers takes for a key that config.json leaves out
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_size": 512,
    "intermediate_size": 2048,
}
T5_DEFAULTS = {
    "vocab_size": 32128,
    "num_layers": 6,
    "num_heads": 8,
    "d_kv": 64,
    "d_model": 512,
    "d_ff": 2048,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
ACTIVATION_OF = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
GATE_OF = {"gated-gelu": "gelu_tanh", "gated-silu": "swish"}

_LEAF = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}
_CLIP_OUTER = {
    "token/embedding": ["embeddings.token_embedding.weight"],
    "position/embedding": ["embeddings.position_embedding.weight"],
    "norm/scale": ["final_layer_norm.weight"],
    "norm/bias": ["final_layer_norm.bias"],
}
_CLIP_LAYER = {
    f"{ours}/{leaf}": [f"encoder.layers.{{}}.{name}.{_LEAF[leaf]}" for name in theirs]
    for ours, leaves, theirs in (
        ("ln_1", ("scale", "bias"), ["layer_norm1"]),
        ("attn/c_attn", ("kernel", "bias"), ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("attn/c_proj", ("kernel", "bias"), ["self_attn.out_proj"]),
        ("ln_2", ("scale", "bias"), ["layer_norm2"]),
        ("mlp/c_fc", ("kernel", "bias"), ["mlp.fc1"]),
        ("mlp/c_proj", ("kernel", "bias"), ["mlp.fc2"]),
    )
    for leaf in leaves
}
_ATTENTION, _MLP = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
_T5_OUTER = {
    "token/embedding": ["shared.weight"],
    "relative/embedding": ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
    "norm/scale": ["encoder.final_layer_norm.weight"],
}
_T5_LAYER = {
    "attn_norm/scale": [f"{_ATTENTION}.layer_norm.weight"],
    "attn/qkv/kernel": [f"{_ATTENTION}.SelfAttention.{name}.weight" for name in "qkv"],
    "attn/proj/kernel": [f"{_ATTENTION}.SelfAttention.o.weight"],
    "mlp_norm/scale": [f"{_MLP}.layer_norm.weight"],
    "gate/kernel": [f"{_MLP}.DenseReluDense.wi_0.weight"],
    "up/kernel": [f"{_MLP}.DenseReluDense.wi_1.weight"],
    "down/kernel": [f"{_MLP}.DenseReluDense.wo.weight"],
}


@dataclasses.dataclass(frozen=True)
class TextFolder:
    """Where the weights are, where the tokenizer's files, and what config.json says the model is."""

    path: pathlib.Path
    tokenizer: pathlib.Path
    cfg: SmallTextConfig | T5Config  # CLIPTextConfig too

    @property
    def name(self) -> str:
        cfg = self.cfg
        return f"{NAME_OF[type(cfg)]} encoder, {cfg.n_layer} layers of {cfg.n_embd}"


def find(folder) -> TextFolder:
    """The text encoder in `folder`: one's own folder, or a pipeline's. Reads config.json alone.

    Raises:
      UserError: there is none, or one of a kind that is not known.
    """
    given = path = pathlib.Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"--text_encoder={folder}: there is no such folder; give one with {CONFIG} and model.safetensors")
    if not (path / CONFIG).is_file() and (path / ENCODER / CONFIG).is_file():
        path = path / ENCODER
    beside = path.with_name(path.name.replace(ENCODER, TOKENIZER)) if path.name.startswith(ENCODER) else path
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except FileNotFoundError as error:
        raise UserError(f"{given} has no {CONFIG} and no {ENCODER}/{CONFIG}: it is no folder of a text encoder") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path / CONFIG} is damaged: {error}") from error
    readers = {"clip": _clip, "clip_text_model": _clip, "t5": _t5, OURS: _small}
    if kind not in readers:
        what = config.get("_class_name") if kind is None else kind
        raise UserError(f"{path / CONFIG} is of {what!r}, which is no text encoder that we know; known are {KINDS}")
    cfg = readers[kind](path / CONFIG, config)
    return TextFolder(path, beside if beside.is_dir() else path, cfg)


def _clip(file: pathlib.Path, config: dict) -> CLIPTextConfig:
    theirs = CLIP_DEFAULTS | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | (config.get("text_config") or config)
    _check(file, theirs, CLIP_DEFAULTS, {"layer_norm_eps": (1e-5,), "hidden_act": tuple(ACTIVATION_OF)}, "CLIP")
    return CLIPTextConfig(
        vocab_size=theirs["vocab_size"], length=theirs["max_position_embeddings"], n_layer=theirs["num_hidden_layers"],
        n_head=theirs["num_attention_heads"], n_embd=theirs["hidden_size"], mlp_width=theirs["intermediate_size"],
        activation=ACTIVATION_OF[theirs["hidden_act"]], dtype="float32",
    )  # fmt: skip


def _t5(file: pathlib.Path, config: dict) -> T5Config:
    theirs = T5_DEFAULTS | {"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6} | config
    _check(file, theirs, T5_DEFAULTS, {"feed_forward_proj": tuple(GATE_OF)}, "T5 of version 1.1")
    return T5Config(
        vocab_size=theirs["vocab_size"], n_layer=theirs["num_layers"], n_head=theirs["num_heads"], head_dim=theirs["d_kv"],
        n_embd=theirs["d_model"], mlp_width=theirs["d_ff"], activation=GATE_OF[theirs["feed_forward_proj"]],
        buckets=theirs["relative_attention_num_buckets"], max_distance=theirs["relative_attention_max_distance"],
        epsilon=theirs["layer_norm_epsilon"],
    )  # fmt: skip


def _small(file: pathlib.Path, config: dict) -> SmallTextConfig:
    names = [field.name for field in dataclasses.fields(SmallTextConfig) if field.name not in HOW_TO_COMPUTE]
    if missing := [name for name in names if name not in config]:
        raise UserError(f"{file} is damaged: it has no {missing[0]}")
    values = {name: config[name] for name in names}
    return SmallTextConfig(**values | {"ngrams": tuple(values["ngrams"])}, dtype="float32")


def _check(file: pathlib.Path, theirs: dict, sizes, fixed: dict[str, tuple], model: str) -> None:
    if strange := [name for name in sizes if type(theirs[name]) is not int or theirs[name] < 1]:
        raise UserError(f"{file} is damaged: {strange[0]}={theirs[strange[0]]!r}")
    for key, values in fixed.items():
        if theirs[key] not in values:
            known = ", ".join(map(str, values))
            raise UserError(f"{file}: {key}={theirs[key]} is no {model} as we know it (known: {known}); not supported")


class TextWeights:
    """The parameters of a text encoder's module, by parts, as NumPy arrays in cfg.param_dtype.

    Raises (constructor and methods):
      UserError: a file is missing or damaged, or has not the tensors that its config.json means.
    """

    def __init__(self, folder: TextFolder):
        self.cfg = cfg = folder.cfg
        self._source = source = HuggingFaceFolder(folder.path, "clip_text_model", "clip", "t5", OURS)
        tokens = np.zeros((1, 2), np.int32)
        shapes = jax.eval_shape(lambda: MODULE_OF[type(cfg)](cfg).init(jax.random.key(0), tokens)["params"])
        self._outer = flatten_dict({name: x for name, x in shapes.items() if name != "blocks"}, sep="/")
        one_of_L = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        self._layer = flatten_dict(jax.tree.map(one_of_L, shapes["blocks"]), sep="/")
        self._prefix, self._transposed = "", True
        if isinstance(cfg, T5Config):
            self._names = {"outer": dict(_T5_OUTER), "layer": _T5_LAYER}
            if "shared.weight" not in source:
                self._names["outer"]["token/embedding"] = ["encoder.embed_tokens.weight"]
        elif isinstance(cfg, CLIPTextConfig):
            self._names = {"outer": _CLIP_OUTER, "layer": _CLIP_LAYER}
            self._prefix = "text_model." if "text_model.final_layer_norm.weight" in source else ""
        else:
            own = lambda path: path.replace("/", ".")
            self._names = {"outer": {path: [own(path)] for path in self._outer}}
            self._names["layer"] = {path: [f"blocks.{{}}.{own(path)}"] for path in self._layer}
            self._transposed = False

    def outer(self) -> dict:
        """All but the layers: tables and the last norm."""
        return self._read(self._outer, self._names["outer"])

    def layer(self, index: int) -> dict:
        """What one block is applied with."""
        return self._read(self._layer, self._names["layer"], index)

    def whole(self) -> dict:
        """The tree inside of "params"."""
        layers = [self.layer(index) for index in range(self.cfg.n_layer)]
        return self.outer() | {"blocks": jax.tree.map(lambda *x: np.stack(x), *layers)}

    def _read(self, shapes: dict, names: dict, index: int | None = None) -> dict:
        params = {}
        for path, leaf in shapes.items():
            params[path] = np.empty(leaf.shape, leaf.dtype)
            turned = self._transposed and path.endswith("/kernel")
            for name, part in zip(names[path], np.split(params[path], len(names[path]), axis=-1), strict=True):  # views
                part = part.T if turned else part
                part[...] = self._source.tensor(self._prefix + name.format(index), part.shape)
        return unflatten_dict(params, sep="/")

    def sampled(self, rows: int = 8):
        """(name, shape, a few of its rows) of every tensor that is read, in the order of names: enough to tell two apart."""
        names = [name for of in self._names["outer"].values() for name in of]
        names += [n.format(i) for i in range(self.cfg.n_layer) for of in self._names["layer"].values() for n in of]
        for name in sorted(names):
            shape = self._source.shape(self._prefix + name)
            yield name, shape, self._source.some_rows(self._prefix + name, rows)


def load_params(folder) -> tuple[dict, SmallTextConfig | T5Config]:
    """(the tree inside of "params", its configuration) of the text encoder in `folder`."""
    found = find(folder)
    return TextWeights(found).whole(), found.cfg


def save(params, cfg: SmallTextConfig, folder) -> None:
    """A small text encoder as a folder of our own: config.json and model.safetensors, which `find` and `TextWeights` read.

    Args:
      params: the tree inside of "params" of SmallTextEncoder(cfg).
    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    params = {name: np.asarray(x) for name, x in flatten_dict(params, sep=".").items()}
    tensors = {name: x for name, x in params.items() if not name.startswith("blocks.")}
    for name in params.keys() - tensors.keys():
        tensors |= {name.replace("blocks.", f"blocks.{i}.", 1): layer for i, layer in enumerate(params[name])}
    fields = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in HOW_TO_COMPUTE}
    write_folder(folder, {"model_type": OURS, **fields}, dict(sorted(tensors.items())))
