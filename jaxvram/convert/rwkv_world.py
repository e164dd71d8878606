"""What RWKV-5's and RWKV-6's checkpoints share: a layer's parameters, and the folders rwkv-5-world-* and rwkv-6-world-*.

transformers has no class for either; those folders carry their own code (configuration_rwkv6.py, modeling_rwkv6.py, and
the like for 5), which must lie beside what we write before AutoModelForCausalLM(trust_remote_code=True) loads it. Names and
shapes are those of BBuf/RWKV-World-HF-Tokenizer, with whose scripts the hub's folders were made: convert_rwkv5_... and
convert_rwkv6_checkpoint_to_hf.py at 1630a2a and 67c42f7, and the models that load them, 1c3fbdd (5) and 1dc418a (6). No
folder of the hub's was at hand. That code norms heads with an epsilon of 1e-5, where the authors' has 64e-5: its logits are
a little other ones. It knows no width of ffn but 3.5 D, no 5.1, and as ranks of RWKV-6 only 32 and 64.
"""

import re

from jaxvram.convert import rwkv
from jaxvram.convert.huggingface import HuggingFaceFolder, write_folder
from jaxvram.convert.rwkv import Layout, Parameter, Stored

FOLDER_NORMS = {"ln0": "rwkv.blocks.0.pre_ln", "norm_f": "rwkv.ln_out"}
LONG = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}  # of time_mix_*; time_maa_* stay short
FIXED = {"layer_norm_epsilon": (1e-5,), "head_size_divisor": (8,), "tie_word_embeddings": (False,)}
SIZES = {"d_ffn": ("blocks.0.ffn.key.weight", 0)}


def layout_of(cfg, vectors: dict, matrices: tuple[str, ...]) -> Layout:
    """Of a model whose layers have these, beside the norms and ffn's matrices.

    Args:
      vectors: official name within a layer -> (shape of ours, shape of theirs): what is fp32, and not turned.
      matrices: of att, D x D.
    """
    D, F, found = cfg.n_embd, cfg.hidden, []

    def add(ours, shape, name, stored, turned=False, fp32=False):
        official, theirs = (Stored(each, stored, turned) for each in (name, folder_name(name)))
        found.append(Parameter(tuple(ours.split(".")), shape, official, theirs, fp32))

    for norm in ("ln1", "ln2", "att.ln_x"):
        for leaf, end in (("scale", "weight"), ("bias", "bias")):
            add(f"{norm}.{leaf}", (D,), f"{norm}.{end}", (D,))
    for name, (shape, stored) in vectors.items():
        add(name, shape, name, stored, fp32=True)
    shapes = {f"att.{name}": (D, D) for name in matrices}
    shapes |= {"ffn.key": (D, F), "ffn.value": (F, D), "ffn.receptance": (D, D)}
    for name, shape in shapes.items():
        add(f"{name}.kernel", shape, f"{name}.weight", shape[::-1], turned=True)
    outside = rwkv.frame(cfg, "rwkv.embeddings.weight", "head.weight", FOLDER_NORMS)
    return Layout(outside, [found] * cfg.n_layer, "rwkv.blocks")


def folder_name(official: str) -> str:
    """Of a parameter within a layer."""
    name = official.replace("att.", "attention.", 1).replace("ffn.", "feed_forward.", 1)
    return re.sub(r"time_mix_(\w)$", lambda found: f"time_mix_{LONG[found[1]]}", name)


def read_folder(source, kind: str, cfg, layout: Layout, sizes: dict, size_of, told=None) -> dict:
    """Parameters of `cfg` from such a folder; arguments as `rwkv.read_official` has them.

    Raises:
      UserError: the folder is incomplete, damaged or of another model than `cfg`; the message names the overrides.
    """
    folder = HuggingFaceFolder(source, kind)
    folder.check_fixed(folder.config, FIXED, f"RWKV-{kind[-1]}")
    names = {p.official.name: p.hugging_face.name for p in layout.outside}
    in_layer = re.compile(r"blocks\.(\d+)\.(.*)")

    def shape_of(official):
        found = in_layer.fullmatch(official)
        name = f"rwkv.blocks.{found[1]}.{folder_name(found[2])}" if found else names[official]
        return folder.shape(name)

    rwkv.check_sizes(folder.path, shape_of, folder.names, cfg, f"RWKV-{kind[-1]}", sizes, size_of, told)
    return rwkv.from_tensors(folder.tensor, cfg, layout, official=False)


def save_folder(params, cfg, layout: Layout, kind: str, folder) -> None:
    """A folder in the hub's layout, without its code and its tokenizer.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    name = kind.capitalize()
    config = {
        "architectures": [f"{name}ForCausalLM"], "model_type": kind, "vocab_size": cfg.vocab_size, "head_size": cfg.head_dim,
        "auto_map": {
            "AutoConfig": f"configuration_{kind}.{name}Config", "AutoModelForCausalLM": f"modeling_{kind}.{name}ForCausalLM"
        },
        "hidden_size": cfg.n_embd, "attention_hidden_size": cfg.n_embd, "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.heads, "intermediate_size": cfg.hidden, "rescale_every": 0,
        "torch_dtype": cfg.param_dtype,
    }  # fmt: skip
    fixed = {key: values[0] for key, values in FIXED.items()}
    write_folder(folder, config | fixed, rwkv.to_tensors(params, cfg, layout, official=False))
