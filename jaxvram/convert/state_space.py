"""What other layouts of recurrent models share: names and shapes in the frame round the mixers; of Mamba's, the rest too.

Theirs has matrices [out, in], the convolution [channels, 1, width], and a list of layers; ours [in, out], [width, channels]
and a leading layer axis. A table of ours may have rows of padding.
"""

from typing import NamedTuple

import jax
import numpy as np

from jaxvram.convert.huggingface import HuggingFaceFolder, write_folder


class Parameter(NamedTuple):
    """One parameter of every layer."""

    theirs: str  # within a layer
    ours: tuple[str, ...]  # within "layers"
    shape: tuple[int, ...]  # theirs
    is_matrix: bool = False  # stored [out, in] there


class Frame(NamedTuple):
    """What they call things outside of the layers, which are PREFIXlayers.0 and so on."""

    prefix: str  # of every name but the head's, where it is there at all
    table: str
    norm: str
    head: str


BACKBONE = Frame("backbone.", "embeddings.weight", "norm_f.weight", "lm_head.weight")
NORM = ("norm.weight", ("norm", "scale"))
FP32 = ("A_log", "D", "dt_bias")  # whatever the dtype of the others
SIZE_OF = {"vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "d_state": "state_size",
           "d_conv": "conv_kernel", "expand": "expand"}  # fmt: skip


def convolution(channels: int, width: int):
    """Parameters of the convolution; its kernel is read and written by `_of_theirs` and `_of_ours`."""
    yield Parameter("mixer.conv1d.weight", ("mixer", "conv1d", "kernel"), (channels, 1, width))
    yield Parameter("mixer.conv1d.bias", ("mixer", "conv1d", "bias"), (channels,))


def matrix(name: str, inputs: int, outputs: int) -> Parameter:
    return Parameter(f"mixer.{name}.weight", ("mixer", name, "kernel"), (outputs, inputs), is_matrix=True)


def load(source: HuggingFaceFolder, cfg, layer: list[Parameter], tied: bool, frame: Frame = BACKBONE) -> dict:
    """The parameters of a model with these layers. The config has been checked."""
    V, D = cfg.vocab_size, cfg.n_embd
    prefix = frame.prefix if frame.prefix + frame.table in source else ""
    their_head = frame.head if frame.head in source else prefix + frame.head

    def padded(tensor_VxD):
        rows = np.zeros((cfg.table_rows, D), cfg.param_dtype)
        rows[:V] = tensor_VxD
        return rows

    table = source.tensor(prefix + frame.table, (V, D))
    params = {"embedding": {"embedding": padded(table)}, "layers": {}}
    params["norm_f"] = {"scale": source.tensor(prefix + frame.norm, (D,)).astype(cfg.param_dtype)}
    for p in layer:
        dtype = "float32" if p.ours[-1] in FP32 else cfg.param_dtype
        stacked = np.empty((cfg.n_layer, *p.shape), dtype)
        source.read_layers(f"{prefix}layers.{{}}.{p.theirs}", stacked)
        tree = params["layers"]
        for name in p.ours[:-1]:
            tree = tree.setdefault(name, {})
        tree[p.ours[-1]] = np.ascontiguousarray(_turned(stacked, p))
    if not cfg.tie_head:
        head = table if tied or their_head not in source else source.tensor(their_head, (V, D))
        params["lm_head"] = {"kernel": np.ascontiguousarray(padded(head).T)}
    return params


def tensors(params, cfg, layer: list[Parameter], frame: Frame) -> dict[str, np.ndarray]:
    """Under their names; rows of padding are left out, and a head that is the table."""
    params = jax.tree.map(np.asarray, params)
    V = cfg.vocab_size
    named = {
        frame.prefix + frame.table: params["embedding"]["embedding"][:V],
        frame.prefix + frame.norm: params["norm_f"]["scale"],
    }
    for p in layer:
        stacked = params["layers"]
        for name in p.ours:
            stacked = stacked[name]
        for i, ours in enumerate(stacked):
            named[f"{frame.prefix}layers.{i}.{p.theirs}"] = _turned(ours[None], p)[0]
    if not cfg.tie_head:
        named[frame.head] = params["lm_head"]["kernel"][:, :V].T
    return named


def save(params, cfg, layer: list[Parameter], config: dict, folder) -> None:
    """A folder that transformers loads, with the same logits."""
    common = {theirs: getattr(cfg, ours) for ours, theirs in SIZE_OF.items()}
    common |= {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "layer_norm_epsilon": 1e-5}
    common |= {"residual_in_fp32": True, "tie_word_embeddings": cfg.tie_head, "torch_dtype": cfg.param_dtype}
    common |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)  # <|endoftext|> of GPT-NeoX
    write_folder(folder, common | config, tensors(params, cfg, layer, BACKBONE))


def _turned(stacked, p: Parameter):
    """Layers of one parameter from their form to ours, or back: the way is the same."""
    if p.is_matrix:
        return stacked.swapaxes(1, 2)
    if p.theirs.endswith("conv1d.weight"):  # (L, E, 1, W) and (L, W, E)
        return stacked[:, :, 0].swapaxes(1, 2) if stacked.ndim == 4 else stacked.swapaxes(1, 2)[:, :, None]
    return stacked


def check_config(source: HuggingFaceFolder, theirs: dict, cfg, model: str, sizes=(), more_fixed=()) -> None:
    """Raises a UserError where config.json is of another model, or of another size than the recipe's.

    Args:
      theirs: config.json, with what it may leave out.
      sizes: further pairs of our field and their key.
      more_fixed: further keys with the values that ours knows.
    """
    size_of = SIZE_OF | dict(sizes)
    source.check_sizes(theirs, size_of.values())
    fixed = {"use_bias": (False,), "use_conv_bias": (True,), "hidden_act": ("silu", "swish"), "layer_norm_epsilon": (1e-5,)}
    source.check_fixed(theirs, fixed | dict(more_fixed), model)
    wanted = {ours: theirs[key] for ours, key in size_of.items()}
    if cfg.tie_head and not theirs["tie_word_embeddings"] and "lm_head.weight" in source:
        wanted["tie_head"] = False
    source.check_fields(wanted, cfg)
