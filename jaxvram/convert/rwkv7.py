"""RWKV-7's weights: official .pth, and Hugging Face folders (rwkv7_hf's names, which its models load), both in and out.

Both have matrices [out, in]; ours are [in, out]. The small matrices w1 to g2 are [in, out] in a .pth as well. Layer 0 of a
.pth may have v0, v1, v2, which nothing reads.
"""

from jaxvram.convert import rwkv, torch_file
from jaxvram.convert.huggingface import HuggingFaceFolder, write_folder
from jaxvram.convert.rwkv import Layout, Parameter, Stored
from jaxvram.models.rwkv7 import MIXTURES, RWKV7Config

SIZE_OF = {
    "vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "head_dim": "head_dim",
    "d_ffn": "intermediate_size", "d_decay": "decay_low_rank_dim", "d_rate": "a_low_rank_dim",
    "d_value": "v_low_rank_dim", "d_gate": "gate_low_rank_dim",
}  # fmt: skip
SIZES_OF_OFFICIAL = {
    "head_dim": ("blocks.0.att.r_k", 1), "d_decay": ("blocks.0.att.w1", 1), "d_rate": ("blocks.0.att.a1", 1),
    "d_value": ("blocks.1.att.v1", 1), "d_gate": ("blocks.0.att.g1", 1), "d_ffn": ("blocks.0.ffn.key.weight", 0),
}  # fmt: skip
THEIR_MATRICES = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
THEIR_NORMS = {"ln1": "attn_norm", "ln2": "ffn_norm"}
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


def _layer(cfg: RWKV7Config, first: bool) -> list[Parameter]:
    D, F = cfg.n_embd, cfg.hidden
    found = []

    def add(ours, shape, official, theirs, fp32=True):
        found.append(Parameter(tuple(ours.split("/")), shape, Stored(*official), Stored(*theirs), fp32))

    def matrix(ours, shape, theirs):
        name, turned = ours.replace("/", "."), (shape[::-1], True)
        add(f"{ours}/kernel", shape, (f"{name}.weight", *turned), (f"{theirs}.weight", *turned), fp32=False)

    def norm(ours, official, theirs):
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            add(ours + leaf, (D,), (f"{official}.{name}", (D,)), (f"{theirs}.{name}", (D,)), fp32=False)

    for name, theirs in THEIR_NORMS.items():
        norm(f"{name}/", name, theirs)
    for name in MIXTURES:
        add(f"att/x_{name}", (D,), (f"att.x_{name}", (1, 1, D)), (f"attn.x_{name}", (1, 1, D)))
    for name in "wag" if first else "wavg":
        R, lora = cfg.rank(name), f"attn.{name}_lora.lora"
        add(f"att/{name}1", (D, R), (f"att.{name}1", (D, R)), (f"{lora}.0.weight", (R, D), True))
        add(f"att/{name}2", (R, D), (f"att.{name}2", (R, D)), (f"{lora}.2.weight", (D, R), True))
        if name != "g":
            add(f"att/{name}0", (D,), (f"att.{name}0", (1, 1, D)), (f"{lora}.2.bias", (D,)))
    for name in ("k_k", "k_a"):
        add(f"att/{name}", (D,), (f"att.{name}", (1, 1, D)), (f"attn.{name}", (D,)))
    heads = (cfg.heads, cfg.head_dim)
    add("att/r_k", heads, ("att.r_k", heads), ("attn.r_k", heads))
    for ours, theirs in THEIR_MATRICES.items():
        matrix(f"att/{ours}", (D, D), f"attn.{theirs}")
    norm("att/ln_x_", "att.ln_x", "attn.g_norm")
    add("ffn/x_k", (D,), ("ffn.x_k", (1, 1, D)), ("ffn.x_k", (D,)))
    matrix("ffn/key", (D, F), "ffn.key")
    matrix("ffn/value", (F, D), "ffn.value")
    return found


def layout_of(cfg: RWKV7Config) -> Layout:
    norms = {"ln0": "model.layers.0.pre_norm", "norm_f": "model.norm"}
    outside = rwkv.frame(cfg, "model.embeddings.weight", "lm_head.weight", norms)
    return Layout(outside, [_layer(cfg, i == 0) for i in range(cfg.n_layer)], "model.layers", True, UNUSED)


def load_params(source, cfg: RWKV7Config) -> dict:
    """Parameters of `RWKV7(cfg)` as NumPy arrays (the tree inside of "params"), from a .pth or a folder.

    Raises:
      UserError: what `source` holds is incomplete, damaged or another model than `cfg`; the message names the overrides.
    """
    if rwkv.is_official(source):
        return rwkv.read_official(source, cfg, layout_of(cfg), "RWKV-7", SIZES_OF_OFFICIAL, _size)
    folder = HuggingFaceFolder(source, "rwkv7")
    folder.check_sizes(folder.config, SIZE_OF.values())
    wanted = {ours: folder.config[theirs] for ours, theirs in SIZE_OF.items()}
    folder.check_fixed(folder.config, {"norm_eps": (1e-5,), "head_dim": (64,), "norm_bias": (True,)}, "RWKV-7")
    folder.check_fields({k: v for k, v in wanted.items() if v != _size(cfg, k)}, cfg)
    return rwkv.from_tensors(folder.tensor, cfg, layout_of(cfg), official=False)


def _size(cfg: RWKV7Config, field: str) -> int:
    """A field, or what it stands for where it is 0."""
    ranks = {"d_decay": "w", "d_rate": "a", "d_value": "v", "d_gate": "g"}
    if field in ranks:
        return cfg.rank(ranks[field])
    return cfg.hidden if field == "d_ffn" else getattr(cfg, field)


def save(params, cfg: RWKV7Config, folder) -> None:
    """A folder that `rwkv7_hf.RWKV7ForCausalLM.from_pretrained` loads, with the same logits.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    config = {theirs: _size(cfg, ours) for ours, theirs in SIZE_OF.items()}
    config |= {"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "num_heads": cfg.heads, "norm_eps": 1e-5}
    config |= {"attention_hidden_size": cfg.n_embd, "norm_bias": True, "tie_word_embeddings": False}
    tensors = rwkv.to_tensors(params, cfg, layout_of(cfg), official=False)
    write_folder(folder, config | {"torch_dtype": cfg.param_dtype}, tensors)


def save_official(params, cfg: RWKV7Config, file) -> None:
    """A .pth that the rwkv package loads; see torch_file.write."""
    torch_file.write(file, rwkv.to_tensors(params, cfg, layout_of(cfg), official=True))
