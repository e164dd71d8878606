"""GPT-2's weights from and to a Hugging Face folder.

Both sides name parameters as OpenAI did. Three things differ: ours are stacked along a leading layer axis; a table of ours
may have rows of padding; a norm's `weight` is our `scale`. Matrices need no transposition: Hugging Face's Conv1D, like
Linen's Dense, has them [in, out] - except the head, a Linear, which is [out, in].
"""

import jax
import numpy as np

from jaxvram.convert.huggingface import HuggingFaceFolder, write_folder
from jaxvram.errors import UserError
from jaxvram.models.gpt2 import GPT2Config

SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
DEFAULTS = {  # what transformers takes for a key that config.json leaves out
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}
FIXED = {  # what our GPT-2 is, and config.json may change
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
ACTIVATION_OF = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
EOT = 50256  # <|endoftext|> of GPT-2's vocabulary


def load_params(folder, cfg: GPT2Config) -> dict:
    """Parameters of `GPT2(cfg)` as NumPy arrays in cfg.param_dtype (the tree inside of "params").

    A longer context in the checkpoint is cropped to cfg.block_size (nanoGPT's crop_block_size). A head of its own is
    filled from `lm_head`, or, where the checkpoint is tied, with a copy of the token table.

    Raises:
      UserError: the folder is incomplete or damaged, or holds another model than `cfg`; the message names the overrides.
    """
    source = HuggingFaceFolder(folder, "gpt2")
    theirs = DEFAULTS | source.config
    _check_config(source, theirs, cfg)
    D, L, V = cfg.n_embd, cfg.n_layer, cfg.vocab_size
    prefix = "transformer." if "transformer.wte.weight" in source else ""
    read = lambda name, *shape: source.tensor(prefix + name, shape)

    def table(name, found, rows, kept):
        padded = np.zeros((rows, D), cfg.param_dtype)
        padded[:kept] = read(name, found, D)[:kept]
        return {"embedding": padded}

    def stacked(name, *shape):
        layers = np.empty((L, *shape), cfg.param_dtype)
        source.read_layers(f"{prefix}h.{{}}.{name}", layers)
        return layers

    params = {
        "wte": table("wte.weight", V, cfg.table_rows, V),
        "wpe": table("wpe.weight", theirs["n_positions"], cfg.block_size, cfg.block_size),
        "h": {},
        "ln_f": {ours: read(f"ln_f.{name}", D).astype(cfg.param_dtype) for ours, name in _NORM.items()},
    }
    for name, shape, ours in _layer_parameters(D):
        _put(params["h"], ours, stacked(name, *shape))
    if not cfg.bias:
        _drop_zero_biases(source, params)
    if not cfg.tie_head:
        own = not theirs["tie_word_embeddings"] and "lm_head.weight" in source
        head_VxD = source.tensor("lm_head.weight", (V, D)) if own else params["wte"]["embedding"][:V]
        kernel_DxV = np.zeros((D, cfg.table_rows), cfg.param_dtype)
        kernel_DxV[:, :V] = head_VxD.T
        params["lm_head"] = {"kernel": kernel_DxV}
    return params


def save(params, cfg: GPT2Config, folder) -> None:
    """A folder that `transformers.GPT2LMHeadModel.from_pretrained` loads, with the same logits; complete or not there.

    Padding rows are left out. GPT2LMHeadModel always has biases: a model without them is given zeros, and says so.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    params = jax.tree.map(np.asarray, params)
    D, V = cfg.n_embd, cfg.vocab_size
    tensors = {
        "transformer.wte.weight": params["wte"]["embedding"][:V],
        "transformer.wpe.weight": params["wpe"]["embedding"],
    }
    bias = lambda shape: np.zeros(shape, cfg.param_dtype)
    for ours, name in _NORM.items():
        tensors[f"transformer.ln_f.{name}"] = params["ln_f"].get(ours, bias(D))
    for name, shape, ours in _layer_parameters(D):
        module, leaf = _get(params["h"], ours[:-1]), ours[-1]
        for i in range(cfg.n_layer):
            tensors[f"transformer.h.{i}.{name}"] = module[leaf][i] if leaf in module else bias(shape)
    if not cfg.tie_head:
        tensors["lm_head.weight"] = params["lm_head"]["kernel"][:, :V].T
    if not cfg.bias:
        print("model.bias=False: the Hugging Face folder gets biases of zero, since its GPT-2 has no other form")
    write_folder(folder, _config_json(cfg), tensors)


_NORM = {"scale": "weight", "bias": "bias"}
_DENSE = {"kernel": "weight", "bias": "bias"}


def _layer_parameters(D: int):
    """(their name within a layer, its shape, our path within "h") of every parameter of a block."""
    for norm in ("ln_1", "ln_2"):
        for leaf, name in _NORM.items():
            yield f"{norm}.{name}", (D,), (norm, leaf)
    matrices = {("attn", "c_attn"): (D, 3 * D), ("attn", "c_proj"): (D, D)}
    matrices |= {("mlp", "c_fc"): (D, 4 * D), ("mlp", "c_proj"): (4 * D, D)}
    for module, shape in matrices.items():
        for leaf, name in _DENSE.items():
            yield ".".join((*module, name)), shape if leaf == "kernel" else shape[1:], (*module, leaf)


def _check_config(source: HuggingFaceFolder, theirs: dict, cfg: GPT2Config) -> None:
    source.check_sizes(theirs, SIZES)
    source.check_fixed(theirs, {"n_inner": (None, 4 * cfg.n_embd), **FIXED}, "GPT-2 as OpenAI made it")
    if (activation := ACTIVATION_OF.get(theirs["activation_function"])) is None:
        where = source.path / "config.json"
        raise UserError(f"{where}: activation_function={theirs['activation_function']!r} is none of {[*ACTIVATION_OF]}")
    wanted = {key: theirs[key] for key in SIZES if key != "n_positions"} | {"activation": activation}
    if cfg.tie_head and not theirs["tie_word_embeddings"]:
        wanted["tie_head"] = False
    if cfg.block_size > theirs["n_positions"]:
        wanted["block_size"] = theirs["n_positions"]
    source.check_fields(wanted, cfg)


def _drop_zero_biases(source: HuggingFaceFolder, params: dict) -> None:
    """Removes every bias from `params`; one that is not zero would be lost."""

    def drop(tree, path):
        for name in [*tree]:
            if isinstance(tree[name], dict):
                drop(tree[name], f"{path}{name}.")
            elif name == "bias" and tree.pop(name).any():
                raise UserError(
                    f"the checkpoint in {source.path} has biases (first of them: {path}bias), the recipe none; "
                    "add --config.model.bias=True"
                )

    drop(params, "")


def _config_json(cfg: GPT2Config) -> dict:
    eot = EOT if cfg.vocab_size == EOT + 1 else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[cfg.activation],
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.block_size,
        "n_ctx": cfg.block_size,
        "n_embd": cfg.n_embd,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": cfg.tie_head,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": cfg.param_dtype,
    }


def _get(tree: dict, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: dict, path: tuple[str, ...], value) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
