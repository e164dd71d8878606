"""RWKV-4's weights: official .pth, and Hugging Face folders (transformers.RwkvForCausalLM), both in and out.

Both have matrices [out, in] and mixtures as (1, 1, D); ours are [in, out], and (D,).
"""

from jaxvram.convert import rwkv, torch_file
from jaxvram.convert.huggingface import HuggingFaceFolder, write_folder
from jaxvram.convert.rwkv import Layout, Parameter, Stored
from jaxvram.models.rwkv4 import RWKV4Config

DEFAULTS = {  # what transformers takes for a key that config.json leaves out
    "vocab_size": 50277, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": None,
}  # fmt: skip
SIZE_OF = {
    "vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "d_ffn": "intermediate_size",
}  # fmt: skip
THEIR_MIXTURES = {"k": "key", "v": "value", "r": "receptance"}


def _layer(cfg: RWKV4Config) -> list[Parameter]:
    D, F = cfg.n_embd, cfg.hidden
    found = []

    def add(ours, shape, official, theirs=None, stored=None, turned=False, fp32=True):
        """`theirs`, where the name in a layer of transformers' is no mere change of att and ffn."""
        theirs = (theirs or official).replace("att.", "attention.").replace("ffn.", "feed_forward.")
        shapes = (stored or shape, turned)
        found.append(Parameter(tuple(ours.split("/")), shape, Stored(official, *shapes), Stored(theirs, *shapes), fp32))

    for norm in ("ln1", "ln2"):
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            add(f"{norm}/{leaf}", (D,), f"{norm}.{name}", fp32=False)
    for name in ("time_decay", "time_first"):
        add(f"att/{name}", (D,), f"att.{name}")
    for part, mixtures in (("att", "kvr"), ("ffn", "kr")):
        for name in mixtures:
            mix = f"{part}.time_mix_"
            add(f"{part}/time_mix_{name}", (D,), mix + name, mix + THEIR_MIXTURES[name], (1, 1, D))
    matrices = dict.fromkeys(("att/key", "att/value", "att/receptance", "att/output", "ffn/receptance"), (D, D))
    for ours, shape in (matrices | {"ffn/key": (D, F), "ffn/value": (F, D)}).items():
        add(f"{ours}/kernel", shape, f"{ours.replace('/', '.')}.weight", None, shape[::-1], True, fp32=False)
    return found


def layout_of(cfg: RWKV4Config) -> Layout:
    norms = {"ln0": "rwkv.blocks.0.pre_ln", "norm_f": "rwkv.ln_out"}
    outside = rwkv.frame(cfg, "rwkv.embeddings.weight", "head.weight", norms)
    return Layout(outside, [_layer(cfg)] * cfg.n_layer, "rwkv.blocks")


def load_params(source, cfg: RWKV4Config) -> dict:
    """Parameters of `RWKV4(cfg)` as NumPy arrays (the tree inside of "params"), from a .pth or a folder.

    Raises:
      UserError: what `source` holds is incomplete, damaged or another model than `cfg`; the message names the overrides.
    """
    if rwkv.is_official(source):
        sizes = {"d_ffn": ("blocks.0.ffn.key.weight", 0)}
        return rwkv.read_official(source, cfg, layout_of(cfg), "RWKV-4", sizes, _size)
    folder = HuggingFaceFolder(source, "rwkv")
    theirs = DEFAULTS | folder.config
    theirs["intermediate_size"] = theirs["intermediate_size"] or 4 * theirs["hidden_size"]
    folder.check_sizes(theirs, SIZE_OF.values())
    fixed = {"layer_norm_epsilon": (1e-5,), "attention_hidden_size": (theirs["hidden_size"], None)}
    folder.check_fixed(theirs, fixed | {"tie_word_embeddings": (False,)}, "RWKV-4")
    folder.check_fields({ours: theirs[key] for ours, key in SIZE_OF.items() if theirs[key] != _size(cfg, ours)}, cfg)
    return rwkv.from_tensors(folder.tensor, cfg, layout_of(cfg), official=False)


def _size(cfg: RWKV4Config, field: str) -> int:
    """A field, or what it stands for where it is 0."""
    return cfg.hidden if field == "d_ffn" else getattr(cfg, field)


def save(params, cfg: RWKV4Config, folder) -> None:
    """A folder that `transformers.RwkvForCausalLM.from_pretrained` loads, with the same logits.

    Its rescaling of weights (`rescale_every`, against overflow in fp16) is off: it changes nothing but rounding.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    config = {theirs: _size(cfg, ours) for ours, theirs in SIZE_OF.items()}
    config |= {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv", "attention_hidden_size": cfg.n_embd}
    config |= {"context_length": cfg.block_size, "layer_norm_epsilon": 1e-5, "rescale_every": 0}
    config |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": cfg.param_dtype}
    write_folder(folder, config, rwkv.to_tensors(params, cfg, layout_of(cfg), official=False))


def save_official(params, cfg: RWKV4Config, file) -> None:
    """A .pth that the rwkv package loads; see torch_file.write."""
    torch_file.write(file, rwkv.to_tensors(params, cfg, layout_of(cfg), official=True))
