"""Mixtral's weights from and to a Hugging Face folder; and a dense Llama's, which become those of every expert.

Two layouts are read, that of published files (block_sparse_moe.experts.E.w1, w3, w2 [out, in]) and that of transformers 5 in
memory (mlp.experts.gate_up_proj and down_proj, experts stacked, gate above up); the first is written. Attention, norms,
table and head are Llama's (convert/llama.py).

From a dense Llama (sparse upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055) everything comes but the routers: those are
left out of what `load_params` returns, and begin as the seed has them. With weights that add up to 1 the model is at first
the dense one, whatever its routers say.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxvram.convert import llama
from jaxvram.convert.huggingface import CONFIG, HuggingFaceFolder, check_names, write_folder
from jaxvram.errors import UserError
from jaxvram.models.llama import LlamaConfig
from jaxvram.models.moe import MoEConfig

SIZE_OF = {name: hf for name, (hf, _) in llama.SIZE_OF.items()} | {
    "n_expert": "num_local_experts", "n_expert_per_token": "num_experts_per_tok",
}  # fmt: skip
DEFAULTS = {  # what transformers takes for a key that config.json leaves out
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRALS = {  # what a Mixtral is, of what a mixture of ours may be
    "router": "softmax", "renormalise": True, "n_shared_expert": 0, "balance_offsets": False, "activation": "swish",
    "sandwich_norm": False, "attention_soft_cap": 0.0, "scale_embedding": False, "output_multiplier": 1.0,
    "attention_bias": False, "rope_factor": 1.0,
}  # fmt: skip
THEIRS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
EXPERTS = ("layers", "moe", "experts")
ROUTER = ("layers", "moe", "router", "kernel")


def load_params(folder_or_file, cfg: MoEConfig, put: Callable | None = None) -> dict:
    """Parameters of `MoE(cfg)`, matrices in cfg.param_dtype; of a dense Llama without routers.

    Args:
      folder_or_file: a Mixtral's folder; or a Llama's, or its GGUF file.
      put: called with the path and the NumPy array of each parameter, all layers stacked, as soon as it is complete; what
        it returns stands in the tree. None: the array itself.
    Raises:
      UserError: the weights are incomplete or damaged, or of another model than `cfg`; the message names the overrides.
    """
    put = put or (lambda path, array: array)
    params, stacked = {}, None
    for path, layer, array in tensors(folder_or_file, cfg):
        dtype = "float32" if path == ROUTER else cfg.param_dtype
        if layer is None:
            _put(params, path, put(path, np.array(array, dtype, order="C")))
            continue
        if layer == 0:
            stacked = np.empty((cfg.n_layer, *array.shape), dtype)
        stacked[layer] = array
        if layer == cfg.n_layer - 1:
            _put(params, path, put(path, stacked))
    return params


def tensors(folder_or_file, cfg: MoEConfig) -> Iterator[tuple[tuple[str, ...], int | None, np.ndarray]]:
    """(path in our tree, layer or None, array), a parameter's layers in a row, as convert/llama.py has them."""
    if not _is_mixture(folder_or_file):
        return _of_every_expert(folder_or_file, cfg)
    source = HuggingFaceFolder(folder_or_file, "mixtral")
    tied = _check(source, cfg)
    fused = any(name.endswith("mlp.experts.down_proj") for name in source.names)
    rest = _rest(cfg)
    if tied and not cfg.tie_head:  # the head starts as a copy of the table
        rest[-1] = rest[-1]._replace(hf=rest[0].hf)
    layers = lambda name: range(cfg.n_layer) if "{}" in name else (None,)
    wanted = [p.hf.format(i) for p in rest for i in layers(p.hf)]
    wanted += [name for i in range(cfg.n_layer) for name in _names(cfg, i, fused)]
    check_names(source.path, source.names, dict.fromkeys(wanted), llama.HARMLESS)
    read = lambda p, i: llama.to_ours(source.tensor(p.hf.format(i), p.shape), p, cfg, "half")

    def stream():
        yield from ((p.ours, i, read(p, i)) for p in rest for i in layers(p.hf))
        router = _prefix(fused) + ".gate.weight"
        yield from ((ROUTER, i, source.tensor(router.format(i), (cfg.n_expert, cfg.n_embd)).T) for i in range(cfg.n_layer))
        for name in THEIRS:
            yield from (((*EXPERTS, name, "kernel"), i, _experts(source, cfg, i, name, fused)) for i in range(cfg.n_layer))

    return stream()


def save(params, cfg: MoEConfig, folder) -> None:
    """A folder that `transformers.MixtralForCausalLM.from_pretrained` loads, with the same logits; complete or not there.

    Raises:
      UserError: the model is no Mixtral, `folder` holds anything but an earlier export, or the disk is full.
    """
    if odd := [name for name, value in MIXTRALS.items() if getattr(cfg, name) != value]:
        raise UserError(
            f"model.{odd[0]}={getattr(cfg, odd[0])} is no Mixtral's ({MIXTRALS[odd[0]]}), and transformers has no model "
            "that it could be exported as"
        )
    params = jax.tree.map(np.asarray, params)
    at = lambda path: _at(params, path)
    theirs = {}
    for p in _rest(cfg):
        layers = enumerate(at(p.ours)) if "{}" in p.hf else [(None, at(p.ours))]
        theirs |= {p.hf.format(i): llama.to_half(a, p, cfg) for i, a in layers}
    prefix, dtype = _prefix(False), at((*EXPERTS, "up_proj", "kernel")).dtype
    for i, router_DxE in enumerate(at(ROUTER)):
        theirs[f"{prefix}.gate.weight".format(i)] = router_DxE.T.astype(dtype)
        for ours, name in THEIRS.items():
            kernels = at((*EXPERTS, ours, "kernel"))[i]
            theirs |= {f"{prefix}.experts.{e}.{name}.weight".format(i): kernel.T for e, kernel in enumerate(kernels)}
    write_folder(folder, _config_json(cfg), theirs)


def build_folder(base, experts: list, gates_LxExD, experts_per_token: int, folder) -> None:
    """A Mixtral's folder of Llamas': attention, norms, table and head of `base`, each feed-forward layer of `experts`.

    Args:
      base, experts: folders in Hugging Face's layout; tensors are taken as they lie there.
      gates_LxExD: the routers, whose logit for expert e is gate_e . u.
      experts_per_token: k.
    Raises:
      UserError: a folder is no Llama's, or an expert's tensors have not the shapes of the base's; the message names them.
    """
    cfg, source = llama.config_of(base), HuggingFaceFolder(base, "llama")
    sources = [HuggingFaceFolder(expert, "llama") for expert in experts]
    matrix = lambda i, name: f"model.layers.{i}.mlp.{name}.weight"
    matrices = [matrix(i, name) for i in range(cfg.n_layer) for name in THEIRS]
    for expert in sources:
        _check_expert(source, expert, matrices)
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(cfg, name)]
    if biased or cfg.rope_factor != 1:
        which = (*biased, "rope_factor")[0]
        raise UserError(f"{base}: a Mixtral has neither biases nor scaled rotary frequencies ({which})")
    read = lambda source, name: source.tensor(name, source.shape(name))
    kept = [name for name in source.names if ".mlp." not in name and not name.endswith(llama.HARMLESS[:2])]
    theirs = {name: read(source, name) for name in kept if not (cfg.tie_head and name == "lm_head.weight")}
    prefix, dtype = _prefix(False), read(source, matrices[0]).dtype
    for i, gates_ExD in enumerate(gates_LxExD):
        theirs[f"{prefix}.gate.weight".format(i)] = np.asarray(gates_ExD).astype(dtype)
        for e, expert in enumerate(sources):
            of = {name: f"{prefix}.experts.{e}.{w}.weight".format(i) for name, w in THEIRS.items()}
            theirs |= {theirs_name: read(expert, matrix(i, name)) for name, theirs_name in of.items()}
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(LlamaConfig)}
    fields |= {"n_expert": len(experts), "n_expert_per_token": experts_per_token, "param_dtype": str(dtype)}
    write_folder(folder, _config_json(MoEConfig(**fields)), theirs)


def _check_expert(base: HuggingFaceFolder, expert: HuggingFaceFolder, names: list[str]) -> None:
    of = lambda source, name: source.shape(name) if name in source else None
    if odd := [name for name in names if of(base, name) != of(expert, name)]:
        some = "; ".join(f"{name} {of(expert, name) or 'missing'}, not {of(base, name)}" for name in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(f"{expert.path} cannot be an expert beside {base.path}, tensors have other shapes: {some}{more}")


def dense_config(cfg: MoEConfig) -> LlamaConfig:
    """The Llama whose feed-forward layer is one expert."""
    return LlamaConfig(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(LlamaConfig)})


def _is_mixture(folder_or_file) -> bool:
    config = pathlib.Path(folder_or_file).expanduser() / CONFIG
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "mixtral"
    except (OSError, ValueError, AttributeError):
        return False  # the reader of a Llama says what is wrong


def _of_every_expert(folder_or_file, cfg: MoEConfig):
    """A Llama's tensors, its feed-forward layer as each expert."""
    if cfg.sandwich_norm or cfg.n_shared_expert:
        lacking = "sandwich_norm" if cfg.sandwich_norm else "n_shared_expert"
        raise UserError(f"{folder_or_file} is a dense Llama, which has no weights for model.{lacking}")
    for path, layer, array in llama.tensors(folder_or_file, dense_config(cfg)):
        if path[:2] == ("layers", "mlp"):
            path, array = (*EXPERTS, *path[2:]), np.broadcast_to(array, (cfg.n_expert, *array.shape))
        yield path, layer, array


def _rest(cfg: MoEConfig) -> list[llama.Parameter]:
    """All but experts and routers; the table first, a head of its own last."""
    return [p for p in llama.parameters(cfg) if p.ours[:2] != ("layers", "mlp")]


def _prefix(fused: bool) -> str:
    return "model.layers.{}." + ("mlp" if fused else "block_sparse_moe")


def _names(cfg: MoEConfig, i: int, fused: bool) -> list[str]:
    """Their names of a layer's router and experts."""
    prefix = _prefix(fused).format(i)
    if fused:
        return [f"{prefix}.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]
    experts = [f"{prefix}.experts.{e}.{name}.weight" for e in range(cfg.n_expert) for name in THEIRS.values()]
    return [f"{prefix}.gate.weight", *experts]


def _experts(source: HuggingFaceFolder, cfg: MoEConfig, i: int, name: str, fused: bool) -> np.ndarray:
    """A layer's matrices of that name, (E, in, out)."""
    E, F, D, prefix = cfg.n_expert, cfg.n_inner, cfg.n_embd, _prefix(fused).format(i)
    if not fused:
        shape = (D, F) if name == "down_proj" else (F, D)
        return np.stack([source.tensor(f"{prefix}.experts.{e}.{THEIRS[name]}.weight", shape).T for e in range(E)])
    if name == "down_proj":
        return source.tensor(f"{prefix}.experts.down_proj", (E, D, F)).swapaxes(1, 2)
    both = source.tensor(f"{prefix}.experts.gate_up_proj", (E, 2 * F, D))
    return (both[:, :F] if name == "gate_proj" else both[:, F:]).swapaxes(1, 2)


def _check(source: HuggingFaceFolder, cfg: MoEConfig) -> bool:
    """Raises a UserError where config.json is not of `cfg`; True where the head is the table."""
    theirs = DEFAULTS | source.config
    source.check_sizes(theirs, list(SIZE_OF.values()))
    rope = theirs.get("rope_parameters") or {}
    source.check_fixed({**theirs, "rope_type": rope.get("rope_type", "default")}, {"rope_type": ("default",)}, "Mixtral")
    source.check_fixed(theirs, llama.FIXED, "Mixtral")
    window = theirs.get("sliding_window")
    if window is not None and window < cfg.block_size:
        which = f"sliding_window={window} hides what model.block_size={cfg.block_size} shows"
        raise UserError(f"{source.path / CONFIG}: {which}; add --config.model.block_size={window}")
    wanted = {ours: theirs[hf] for ours, hf in SIZE_OF.items()}
    wanted |= {"rope_theta": float(rope.get("rope_theta", theirs["rope_theta"])), "norm_eps": float(theirs["rms_norm_eps"])}
    head_dim, tied = theirs.get("head_dim") or wanted["n_embd"] // wanted["n_head"], bool(theirs["tie_word_embeddings"])
    wanted |= {"head_dim": head_dim} if head_dim != cfg.key_size else {}
    wanted |= {"tie_head": False} if cfg.tie_head and not tied else {}
    if cfg.block_size <= wanted["block_size"]:  # a shorter one is fine
        del wanted["block_size"]
    source.check_fields(wanted | MIXTRALS, cfg)
    return tied


def _config_json(cfg: MoEConfig) -> dict:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{hf: getattr(cfg, ours) for ours, hf in SIZE_OF.items()},
        "head_dim": cfg.key_size,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "sliding_window": None,
        "initializer_range": cfg.init_std,
        "router_aux_loss_coef": cfg.balance_loss,
        "tie_word_embeddings": cfg.tie_head,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": cfg.param_dtype,
    }


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: dict, path: tuple[str, ...], value) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
