"""BitNet's weights from and to Hugging Face folders and GGUF files; its matrices in full precision, or as ternary codes.

A folder has them in full precision (`latent`, as transformers trains them: linear_class autobitlinear, online), or packed in
2 bits beside a `weight_scale` (offline), which AutoBitLinear multiplies with and BitLinear divides by. Ours in 2 bits are
those bytes. GGUF has them with scales of their own for each 256 weights of a row, in fp16, as TQ2_0 (2.06 bits) or TQ1_0
(1.69): codes come back as they were, the scale rounded to 11 bits. A matrix of one magnitude besides 0, in whatever format,
is one of codes; its latent weights are not in it.

By model.norms: `subln` is transformers' BitNet and (with silu and a tied head) llama.cpp's `bitnet`; `llama` is a Llama with
ternary matrices in both; `inside` neither has, so its folders are for us alone. Any may start from a plain Llama.
"""

import math
import os
import pathlib
import tempfile
from collections.abc import Iterator

import gguf
import jax
import numpy as np

from jaxvram.convert import llama
from jaxvram.convert.gguf import GGUFFile
from jaxvram.convert.huggingface import CONFIG, write_folder
from jaxvram.convert.llama import Parameter
from jaxvram.errors import UserError, nearest
from jaxvram.kernels import ternary
from jaxvram.models.bitnet import ACTIVATIONS, BitNetConfig

KINDS = {"subln": "bitnet", "inside": "jaxvram_bitnet", "llama": "llama"}  # model_type of a folder, by model.norms
DEFAULTS = llama.DEFAULTS | {  # of transformers' BitNet; a folder that leaves them out is of 2B4T
    "vocab_size": 128256, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 30,
    "num_attention_heads": 20, "num_key_value_heads": 5, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "relu2",
}  # fmt: skip
GGUF_TYPES = {"tq2_0": gguf.GGMLQuantizationType.TQ2_0, "tq1_0": gguf.GGMLQuantizationType.TQ1_0}
FILE_TYPES = {"tq2_0": gguf.LlamaFileType.MOSTLY_TQ2_0, "tq1_0": gguf.LlamaFileType.MOSTLY_TQ1_0}
STORAGE = ("latent", "2bit", *GGUF_TYPES)  # of an export


def load_params(folder_or_file, cfg: BitNetConfig, put=None) -> dict:
    """Parameters of `BitNet(cfg)`, as convert/llama.py's; those that a plain Llama lacks (norms) are not among them.

    Raises:
      UserError: as there; also where weights are to be trained (model.weights=latent) of which the file has codes alone.
    """
    dtypes = {"packed": np.uint8, "weight_scale": np.float32}
    return llama.stacked(tensors(folder_or_file, cfg), cfg, put or (lambda path, array: array), dtypes)


def tensors(folder_or_file, cfg: BitNetConfig) -> Iterator[tuple[tuple[str, ...], int | None, np.ndarray]]:
    """(path in our tree, layer or None, array) of every tensor, one matrix in memory at a time. Raises as load_params."""
    in_gguf = "llama" if cfg.norms == "llama" else "bitnet"
    source = llama.open_source(folder_or_file, *dict.fromkeys((KINDS[cfg.norms], "llama")), gguf=in_gguf)
    is_gguf = isinstance(source, GGUFFile)
    kind = source.metadata["general.architecture"] if is_gguf else source.config["model_type"]
    found = of_kind(parameters(cfg), kind, cfg)
    if is_gguf:
        if cfg.norms == "inside" or (kind == "bitnet" and cfg.activation != "silu"):
            raise UserError(f"{source.path}: GGUF's bitnet is model.norms=subln with model.activation=silu")
        tied = llama.check_gguf(source, cfg)
    else:
        tied = _check_folder(source, cfg, kind)
    scale_of = lambda p: (p.hf.removesuffix("weight") + "weight_scale",)
    packed = not is_gguf and any(name.endswith(".weight_scale") for name in source.names)
    more = lambda p: scale_of(p) if packed and p.ours[-1] == "latent" else ()
    found = llama.as_named_there(source, found, cfg, tied, more)
    layout = "interleaved" if is_gguf and kind == "llama" else "half"
    return _read(source, found, cfg, layout, more)


def _check_folder(source, cfg: BitNetConfig, kind: str) -> bool:
    defaults = DEFAULTS if kind == "bitnet" else llama.DEFAULTS
    act = source.config.get("hidden_act", defaults.get("hidden_act", "silu"))
    act = {"swish": "silu"}.get(act, act)
    if act not in ACTIVATIONS:
        raise UserError(f"{source.path / CONFIG}: hidden_act={act} is no BitNet as we know it{nearest(act, ACTIVATIONS)}")
    fixed = {name: values for name, values in llama.FIXED.items() if name != "hidden_act"}
    return llama.check_folder(source, cfg, defaults, fixed, {"activation": act})


def _read(source, found: list[Parameter], cfg: BitNetConfig, layout: str, scales):
    for p in found:
        for i in p.layers(cfg):
            name = p.name(source).format(i)
            if p.ours[-1] != "latent":
                yield p.ours, i, llama.to_ours(source.tensor(name, p.shape), p, cfg, layout)
                continue
            array, scale = _matrix(source, name, p, [s.format(i) for s in scales(p)])
            array = llama.to_ours(array, p, cfg, layout)
            if cfg.weights == "latent":
                if scale is not None:
                    which = f"{source.path}: {name} is ternary already, and what it was rounded from is not there"
                    raise UserError(f"{which}; to sample or to train a LoRA set model.weights=2bit or base3")
                yield p.ours, i, array
                continue
            codes_FxD, scale = checked_codes(name, array) if scale is None else (array, scale)
            yield (*p.ours[:-1], "packed"), i, ternary.pack(codes_FxD, cfg.weights, np)
            yield (*p.ours[:-1], "weight_scale"), i, np.float32(scale)


def _matrix(source, name: str, p: Parameter, scales: list[str]):
    """(array as it lies there, None), or (codes, their scale)."""
    if scales:
        packed = source.tensor(name, (ternary.packed_rows(p.shape[0], "2bit"), p.shape[1]))
        scale = float(np.asarray(source.tensor(scales[0], (1,)), np.float32)[0])
        if not math.isfinite(scale) or scale <= 0 or packed.dtype != np.uint8:
            raise UserError(f"{source.path} is damaged: {name} is {packed.dtype} and its scale {scale}")
        divides = source.config.get("quantization_config", {}).get("linear_class", "bitlinear") == "bitlinear"
        return ternary.unpack(packed, p.shape[0], "2bit", np), 1 / scale if divides else scale
    array = source.tensor(name, p.shape)
    magnitudes = np.abs(array[array != 0].astype(np.float32))
    if magnitudes.size and magnitudes.size < array.size and magnitudes.min() == magnitudes.max():
        return np.sign(array).astype(np.int8), magnitudes.max()
    return array, None


def checked_codes(name: str, latent):
    """(int8 codes, scale) of a matrix as it is trained.

    Raises:
      UserError: it is no matrix that anybody trained: something in it is not finite, or all of it is next to nothing.
    """
    latent = np.asarray(latent, np.float32)
    if not np.isfinite(latent).all():
        raise UserError(f"{name} holds numbers that are not finite; it cannot become ternary. Export an earlier checkpoint")
    codes, scale = ternary.codes_of(latent, np)
    if scale <= ternary.LEAST_SCALE:
        raise UserError(f"{name} is not trained: its weights are {scale:.0e} on average; it cannot become ternary")
    return codes, scale


def save(params, cfg: BitNetConfig, out, storage: str | None = None) -> None:
    """A folder for `transformers.from_pretrained` or, where `out` ends in .gguf, a file for llama.cpp (weights and sizes).

    Args:
      params: of BitNet(cfg).
      storage: of the matrices: latent | 2bit in a folder, tq2_0 | tq1_0 in a file. None: as they lie; in a file tq2_0.
    Raises:
      UserError: `out` holds anything but an earlier export, or has no such storage; the latent weights are not there, or
        are not such as become ternary (the message names the matrix).
    """
    as_file = pathlib.Path(out).suffix == ".gguf"
    storage = storage or ("tq2_0" if as_file else "latent" if cfg.weights == "latent" else "2bit")
    if storage not in STORAGE or (storage in GGUF_TYPES) != as_file:
        raise UserError(f"--storage={storage}: a folder has latent or 2bit, an --out that ends in .gguf tq2_0 or tq1_0")
    if storage == "latent" and cfg.weights != "latent":
        raise UserError(f"--storage=latent: these weights are packed (model.weights={cfg.weights}); no others are left")
    if cfg.norms == "inside" and storage != "latent":
        raise UserError("neither transformers nor llama.cpp has model.norms=inside for a BitNet: export it --storage=latent")
    parts = _parts(jax.tree.map(np.asarray, params), cfg)
    if as_file:
        _write_gguf(parts, cfg, pathlib.Path(out).expanduser(), storage)
        return
    theirs = {}
    for p, i, array in parts:
        name = p.hf.format(i)
        if p.ours[-1] == "latent" and storage != "latent":
            codes, scale = array if isinstance(array, tuple) else checked_codes(name, array)
            theirs[name] = ternary.pack(codes, "2bit", np)
            theirs[name + "_scale"] = np.asarray([scale], np.float32)
        else:
            theirs[name] = array
    write_folder(out, _config_json(cfg, storage), theirs)


def _parts(params, cfg: BitNetConfig):
    """(parameter, layer, array as Hugging Face has it; of a packed matrix: (codes, scale)) of all, one after the other."""
    for p in parameters(cfg):
        leaf = params
        packed = p.ours[-1] == "latent" and cfg.weights != "latent"
        for name in p.ours[:-1]:
            leaf = leaf[name]
        for i in p.layers(cfg):
            at = lambda name: leaf[name] if i is None else leaf[name][i]  # noqa: B023
            if packed:
                codes = ternary.unpack(at("packed"), p.shape[0], cfg.weights, np)
                yield p, i, (llama.to_half(codes, p, cfg), at("weight_scale"))
            else:
                yield p, i, llama.to_half(at(p.ours[-1]), p, cfg)


def parameters(cfg: BitNetConfig) -> list[Parameter]:
    """Every parameter of a model with latent weights: the table first, a head of its own last."""
    found = []
    for p in llama.parameters(cfg):
        if p.ours[0] == "layers" and p.is_matrix:
            found.append(p._replace(ours=(*p.ours[:-1], "latent")))
            if cfg.norms == "inside":
                names = (p.hf.replace("proj.weight", "proj.rms_norm.weight"), p.gguf.replace("weight", "norm.weight"))
                found.append(Parameter((*p.ours[:-1], "rms_norm", "scale"), *names, p.shape[1:]))
        elif cfg.norms != "inside" or p.ours[0] != "layers" or p.ours[1] not in ("input_norm", "post_norm"):
            found.append(p)
    if cfg.norms == "subln":
        of_attention = ("attn", "attn_sub_norm", cfg.n_head * cfg.key_size)
        for module, name, width in (of_attention, ("mlp", "ffn_sub_norm", cfg.n_inner)):
            hf = f"model.layers.{{}}.{'self_attn' if module == 'attn' else module}.{name}.weight"
            found.insert(1, Parameter(("layers", module, name, "scale"), hf, f"blk.{{}}.{name}.weight", (width,)))
    return found


def of_kind(found: list[Parameter], kind: str, cfg: BitNetConfig) -> list[Parameter]:
    """Those that a source of that kind has. A plain Llama's norms before a layer's products are those in them."""
    if kind != "llama" or cfg.norms == "llama":
        return found
    before = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input")
    before |= dict.fromkeys(("gate_proj", "up_proj"), "post_attention")
    kept = []
    for p in found:
        if p.ours[-2:] == ("rms_norm", "scale"):
            if p.ours[-3] in before:
                kept.append(p._replace(hf=f"model.layers.{{}}.{before[p.ours[-3]]}_layernorm.weight"))
        elif p.ours[-2] not in ("attn_sub_norm", "ffn_sub_norm"):
            kept.append(p)
    return kept


def _config_json(cfg: BitNetConfig, storage: str) -> dict:
    kind = KINDS[cfg.norms]
    name = {"subln": "BitNetForCausalLM", "inside": "BitNetForJaxvram", "llama": "LlamaForCausalLM"}[cfg.norms]
    quantization = {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "modules_to_not_convert": ["lm_head"],
        "quantization_mode": "online" if storage == "latent" else "offline", "use_rms_norm": cfg.norms == "inside",
        "rms_norm_eps": cfg.norm_eps,
    }  # fmt: skip
    ours = {"architectures": [name], "model_type": kind, "hidden_act": cfg.activation}
    return llama.config_json(cfg) | ours | {"quantization_config": quantization}


def _write_gguf(parts, cfg: BitNetConfig, file: pathlib.Path, storage: str) -> None:
    """Under a name of its own until it is complete."""
    kind = "llama" if cfg.norms == "llama" else "bitnet"
    if cfg.activation != "silu" or not (cfg.norms == "llama" or cfg.tie_head):
        which = f"model.activation={cfg.activation}, model.tie_head={cfg.tie_head}"
        raise UserError(f"GGUF's {kind} has silu, and bitnet a tied head (here: {which}); export a folder instead")
    if cfg.rope_factor != 1:
        raise UserError("GGUF: model.rope_factor is not written; export a folder instead")
    block = gguf.GGML_QUANT_SIZES[GGUF_TYPES[storage]][0]
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is a folder; give a new file")
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    os.close(handle)
    writer = _writer(temporary, kind, cfg, storage)
    try:
        for p, i, array in parts:
            name = p.gguf.format(i)
            if p.ours[-1] == "latent":
                codes, scale = array if isinstance(array, tuple) else checked_codes(name, array)
                if codes.shape[1] % block:
                    which = f"{name} has rows of {codes.shape[1]} weights, and {storage.upper()} takes multiples of {block}"
                    raise UserError(f"{which}; export a folder instead")
                if p.heads and kind == "llama":
                    codes = llama.reordered(codes, p.heads, "interleaved")
                data = gguf.quants.quantize(codes.astype(np.float32) * np.float32(scale), GGUF_TYPES[storage])
                writer.add_tensor(name, data, raw_dtype=GGUF_TYPES[storage])
            else:
                if p.heads and kind == "llama":
                    array = llama.reordered(array, p.heads, "interleaved")
                as_table = p.ours[0] in ("embed_tokens", "lm_head")
                writer.add_tensor(name, np.ascontiguousarray(array, np.float16 if as_table else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        pathlib.Path(temporary).chmod(0o644)
        pathlib.Path(temporary).replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def _writer(file: str, kind: str, cfg: BitNetConfig, storage: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(file, kind)
    writer.add_name("jaxvram")
    writer.add_file_type(FILE_TYPES[storage])
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_block_count(cfg.n_layer)
    writer.add_feed_forward_length(cfg.n_inner)
    writer.add_head_count(cfg.n_head)
    writer.add_head_count_kv(cfg.n_kv_head)
    writer.add_key_length(cfg.key_size)
    writer.add_value_length(cfg.key_size)
    writer.add_rope_dimension_count(cfg.key_size)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    return writer
