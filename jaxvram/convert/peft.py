"""What fine-tuning added to a Llama, as a folder of peft's: adapter_config.json and adapter_model.safetensors."""

import re

import jax
import numpy as np
from flax import traverse_util

from jaxvram.convert.huggingface import PEFT, HuggingFaceFolder, check_names, write_folder
from jaxvram.errors import UserError

PREFIX = "base_model.model.model.layers"
BASE = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
PROMPT = {"adapter_prompt": "adaption_prompt", "adapter_gate": "adaption_gate"}


def save(params, finetune, folder, base: str = "") -> None:
    """Writes the trained parameters; peft loads them round the model that they were trained on.

    Args:
      params: of the adapted model (finetune/adapted.py).
      finetune: its FinetuneConfig.
      base: name or folder of the base model, for peft to find it; empty: the user says.
    Raises:
      UserError: peft knows no such method, or the folder can't be written (huggingface.write_folder).
    """
    if not finetune.is_pefts:
        raise UserError(
            f"peft has no finetune.method={finetune.method} with finetune.gate={finetune.gate}; it has lora, and adapter "
            "with finetune.gate=layer"
        )
    theirs = {}
    for path, leaf_L in _added(params).items():
        for i, leaf in enumerate(np.asarray(leaf_L)):
            if finetune.method == "lora" or i >= finetune.first_layer:
                theirs[_name(path, i)] = _theirs(path[-1], leaf)
    config = _lora_config(finetune, theirs) if finetune.method == "lora" else _prompt_config(finetune, params)
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "auto_mapping": BASE}
    write_folder(folder, config | {"base_model_name_or_path": base or None}, theirs, PEFT)


def load(folder, target, finetune) -> dict:
    """The added parameters, as a tree to join with the base's.

    Args:
      target: the adapted model's parameters or their shapes.
      finetune: its FinetuneConfig.
    Raises:
      UserError: the folder is incomplete or damaged, or of another method, rank or targets.
    """
    kind = {"lora": "LORA", "adapter": "ADAPTION_PROMPT"}[finetune.method]
    source = HuggingFaceFolder(folder, kind, layout=PEFT)
    _check(source, finetune)
    shapes = _added(target)
    first = finetune.first_layer if finetune.method == "adapter" else 0
    wanted = [_name(path, i) for path, shape in shapes.items() for i in range(first, shape.shape[0])]
    check_names(source.path, source.names, wanted)
    added = {}
    for path, shape in shapes.items():
        added[path] = np.zeros(shape.shape, np.float32)
        for i in range(first, shape.shape[0]):
            theirs = _theirs(path[-1], np.broadcast_to(np.float32(0), shape.shape[1:])).shape
            added[path][i] = _ours(path[-1], source.tensor(_name(path, i), theirs)).reshape(shape.shape[1:])
    return traverse_util.unflatten_dict(added)


def _added(params) -> dict:
    flat = traverse_util.flatten_dict(params)
    return {path: leaf for path, leaf in flat.items() if path[-1] in LORA | PROMPT}


def _name(path: tuple[str, ...], layer: int) -> str:
    modules = ["self_attn" if name == "attn" else name for name in path[1:-1]]
    return ".".join([PREFIX, str(layer), *modules, (LORA | PROMPT)[path[-1]]])


def _theirs(name: str, leaf):
    if name in ("lora_A", "lora_B"):
        return leaf.T
    return leaf[None] if name == "adapter_prompt" else leaf.reshape(-1)


def _ours(name: str, tensor):
    return tensor.T if name in ("lora_A", "lora_B") else tensor


def _lora_config(finetune, theirs) -> dict:
    modules = sorted({re.search(r"(\w+)\.lora_", name)[1] for name in theirs})
    return {
        "peft_type": "LORA", "r": finetune.rank, "lora_alpha": finetune.alpha, "lora_dropout": finetune.dropout,
        "use_rslora": finetune.rank_stabilised, "use_dora": finetune.dora, "bias": "none", "target_modules": modules,
    }  # fmt: skip


def _prompt_config(finetune, params) -> dict:
    layers = jax.tree.leaves(_added(params))[0].shape[0]
    length = {"adapter_len": finetune.prompt_length, "adapter_layers": layers - finetune.first_layer}
    return {"peft_type": "ADAPTION_PROMPT", "target_modules": "self_attn", **length}


def _check(source: HuggingFaceFolder, finetune) -> None:
    said = source.config
    wanted = {"prompt_length": "adapter_len"}
    if finetune.method == "lora":
        wanted = {"rank": "r", "alpha": "lora_alpha", "rank_stabilised": "use_rslora", "dora": "use_dora"}
    differ = {ours: said.get(key) for ours, key in wanted.items() if said.get(key, False) != getattr(finetune, ours)}
    if differ:
        paste = " ".join(f"--config.finetune.{ours}={value}" for ours, value in differ.items())
        raise UserError(f"the adapter in {source.path} was trained otherwise; add {paste}")
    if odd := [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save") if said.get(key)]:
        raise UserError(f"{source.path / PEFT.config}: {odd[0]}={said[odd[0]]} is not supported")
