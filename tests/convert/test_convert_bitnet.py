"""BitNet's weights in others' files: there and back, packed bit for bit, transformers' logits, and what goes wrong."""

import dataclasses
import functools
import types

import checkpoints
import gguf
import jax
import numpy as np
import parity
import pytest
import quick
import safetensors.numpy
from checkpoints import assert_equal, edit_config, edit_weights, logits_of
from tiny_llama import CFG as LLAMA

from jaxvram import modes
from jaxvram.convert import bitnet as convert
from jaxvram.convert import llama
from jaxvram.errors import UserError
from jaxvram.kernels import ternary
from jaxvram.models.bitnet import NORMS, BitNet, BitNetConfig, packed_params

CFG = BitNetConfig(**dataclasses.asdict(LLAMA))
GGUF = dataclasses.replace(CFG, n_embd=256, n_inner=512, n_layer=2, head_dim=64, tie_head=True)  # rows of whole blocks
TOKENS = np.random.RandomState(2).randint(0, CFG.vocab_size, (2, 12))
UP = "model.layers.1.mlp.up_proj.weight"


@functools.cache
def params_of(cfg):
    return checkpoints.random_params(cfg, std=0.4)


def with_(cfg=CFG, **fields):
    return dataclasses.replace(cfg, **fields)


def codes_of(params, weights):
    """Path -> codes of every matrix."""
    rows = {"gate_proj": "n_inner", "up_proj": "n_inner"}
    found = {}
    for module in ("attn", "mlp"):
        for name, leaves in params["layers"][module].items():
            if weights in ternary.STORAGE and "packed" in leaves:
                D, G = CFG.n_embd, CFG.n_kv_head * CFG.key_size
                F = getattr(CFG, rows[name]) if name in rows else G if name in ("k_proj", "v_proj") else D
                found[module, name] = np.stack([ternary.unpack(x, F, weights, np) for x in np.asarray(leaves["packed"])])
            elif "latent" in leaves:
                found[module, name] = np.stack([ternary.codes_of(x, np)[0] for x in leaves["latent"]])
    return found


@pytest.mark.parametrize("norms", NORMS)
def test_latent_weights_come_back(norms, tmp_path):
    cfg = with_(norms=norms, activation="relu2")
    convert.save(params_of(cfg), cfg, tmp_path / "m")
    assert_equal(convert.load_params(tmp_path / "m", cfg), params_of(cfg))


@pytest.mark.parametrize("weights", ternary.STORAGE)
def test_packed_weights_come_back_with_the_same_codes(weights, tmp_path):
    """From latent weights to the packed folder, into either of our storages, and out again: not a byte differs."""
    params, cfg = params_of(CFG), with_(weights=weights)
    convert.save(params, CFG, tmp_path / "m", "2bit")
    packed = convert.load_params(tmp_path / "m", cfg)
    for path, codes in codes_of(params, "latent").items():
        np.testing.assert_array_equal(codes_of(packed, weights)[path], codes)
    convert.save(packed, cfg, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()
    convert.save(params, CFG, tmp_path / "latent")
    assert_equal(convert.load_params(tmp_path / "latent", cfg), packed)
    assert quick.relative_error(logits_of(cfg, packed, TOKENS), logits_of(CFG, params, TOKENS)) < 1e-5


def test_packed_in_jax_is_packed_in_numpy(tmp_path):
    """But for the scale's last bit, of which the mean is another sum."""
    convert.save(params_of(CFG), CFG, tmp_path / "m", "2bit")
    read = convert.load_params(tmp_path / "m", with_(weights="2bit"))
    made = jax.device_get(packed_params(params_of(CFG), "2bit"))
    for (path, want), got in zip(jax.tree.leaves_with_path(read), jax.tree.leaves(made), strict=True):
        check = np.testing.assert_allclose if path[-1].key == "weight_scale" else np.testing.assert_array_equal
        check(got, want, **({"rtol": 1e-6} if path[-1].key == "weight_scale" else {}))


@parity.needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("storage", ["2bit", "latent"])
@pytest.mark.parametrize("norms", ["subln", "llama"])
def test_transformers_read_it(norms, storage, tmp_path):
    """It finds every weight, packed as its own functions pack, and gives our logits; rows of W_q in the other order too."""
    import golden_file

    golden_file.quiet_torch()
    import torch
    import transformers
    from transformers.integrations.bitnet import pack_weights

    cfg = with_(norms=norms, rope_layout="interleaved")
    convert.save(params_of(cfg), cfg, tmp_path / "m", storage)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, dtype=torch.float32
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    want = model.eval()(torch.tensor(TOKENS)).logits.detach().numpy()
    assert quick.relative_error(logits_of(cfg, params_of(cfg), TOKENS), want) < 1e-5
    if storage == "2bit":
        stored = safetensors.numpy.load_file(tmp_path / "m/model.safetensors")
        codes = codes_of(params_of(cfg), "latent")["mlp", "up_proj"][1]
        np.testing.assert_array_equal(stored[UP], pack_weights(torch.tensor(codes).float()).numpy())


def test_a_scale_that_is_divided_by(tmp_path):
    """As BitLinear, the class that has no online form, reads it."""
    convert.save(params_of(CFG), CFG, tmp_path / "m", "2bit")
    cfg = with_(weights="2bit")
    want = convert.load_params(tmp_path / "m", cfg)
    edit_weights(tmp_path / "m", lambda t: {k: 1 / x if k.endswith("_scale") else x for k, x in t.items()})
    edit_config(tmp_path / "m", quantization_config={"quant_method": "bitnet", "linear_class": "bitlinear"})
    got = convert.load_params(tmp_path / "m", cfg)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want)


@pytest.mark.parametrize("norms", ["subln", "llama"])
@pytest.mark.parametrize("storage", ["tq2_0", "tq1_0"])
def test_gguf(storage, norms, tmp_path):
    """Codes come back exactly, scales as fp16 has them; so says the gguf package's own reader too."""
    cfg = with_(GGUF, norms=norms)
    file = tmp_path / "m.gguf"
    convert.save(params_of(cfg), cfg, file, storage)
    packed_cfg = with_(cfg, weights="base3")
    got = convert.load_params(file, packed_cfg)
    want = jax.device_get(packed_params(params_of(cfg), "base3"))
    for (path, w), g in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        exact = path[-1].key in ("packed", "scale")
        np.testing.assert_allclose(g, w, rtol=0 if exact else 2**-11, atol=0 if exact else 1e-3, err_msg=str(path))
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    up = tensors["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == storage.upper()
    theirs = gguf.quants.dequantize(np.asarray(up.data), up.tensor_type)
    latent = params_of(cfg)["layers"]["mlp"]["up_proj"]["latent"][1]
    np.testing.assert_array_equal(np.sign(theirs), ternary.codes_of(latent, np)[0])
    assert up.n_bytes * 8 / theirs.size == {"TQ2_0": 2.0625, "TQ1_0": 1.6875}[storage.upper()]


def test_from_a_llama(tmp_path):
    """Not rounded at all it is that Llama, with norms as they were, and with those in its products."""
    params = checkpoints.random_params(LLAMA, std=0.4)
    llama.save(params, LLAMA, tmp_path / "m")
    want = logits_of(LLAMA, params, TOKENS)
    for norms in ("llama", "inside"):
        cfg = with_(norms=norms, anneal_steps=10)
        mine = convert.load_params(tmp_path / "m", cfg)
        if norms == "inside":  # what a Llama has not comes from the seed: ones
            for module, name, width in (("attn", "o_proj", cfg.n_head * cfg.key_size), ("mlp", "down_proj", cfg.n_inner)):
                mine["layers"][module][name]["rms_norm"] = {"scale": np.ones((cfg.n_layer, width), np.float32)}
            with_ones = mine
            continue  # norms of W_o and W_down are new, so it is another function; that all is read is what is seen here
        hidden, _ = BitNet(cfg).apply({"params": mine}, TOKENS, mix=np.float32(0))
        logits = (hidden @ BitNet(cfg).apply({"params": mine}, method="head_VxD").T)[..., : cfg.vocab_size]
        assert quick.relative_error(logits, want) < 1e-5
    shapes = jax.eval_shape(lambda: BitNet(cfg).init(jax.random.key(0), TOKENS[:1, :1])["params"])
    jax.tree.map(lambda s, x: None if s.shape == x.shape else pytest.fail(f"{s.shape} {x.shape}"), shapes, with_ones)


def spoilt(params, value):
    changed = jax.tree.map(np.copy, params)
    changed["layers"]["mlp"]["up_proj"]["latent"][1] = value
    return changed


def test_what_cannot_become_ternary(tmp_path):
    params, out = params_of(CFG), tmp_path / "m"
    for value, message in ((np.nan, "holds numbers that are not finite"), (1e-7, "is not trained: its weights are 1e-05")):
        with pytest.raises(UserError, match=f"{UP} {message}"):
            convert.save(spoilt(params, value), CFG, out, "2bit")
    assert not out.exists()
    for cfg, to, storage, message in (
        (CFG, out, "tq2_0", "a folder has latent or 2bit"),
        (CFG, tmp_path / "m.gguf", "2bit", "an --out that ends in .gguf tq2_0 or tq1_0"),
        (with_(norms="inside"), out, "2bit", "neither transformers nor llama.cpp has model.norms=inside"),
        (with_(activation="relu2"), tmp_path / "m.gguf", None, "GGUF's bitnet has silu, and bitnet a tied head"),
        (with_(tie_head=True), tmp_path / "m.gguf", None, "has rows of 32 weights, and TQ2_0 takes multiples of 256"),
    ):
        with pytest.raises(UserError, match=message):
            convert.save(params_of(cfg), cfg, to, storage)
    assert not list(tmp_path.iterdir())


def test_packed_files_hold_no_latent_weights(tmp_path):
    convert.save(params_of(CFG), CFG, tmp_path / "m", "2bit")
    with pytest.raises(UserError, match=r"q_proj.weight is ternary already.*set model.weights=2bit or base3"):
        convert.load_params(tmp_path / "m", CFG)
    cfg = with_(weights="2bit")
    with pytest.raises(UserError, match="no others are left"):
        convert.save(convert.load_params(tmp_path / "m", cfg), cfg, tmp_path / "n", "latent")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "relu2"}, "--config.model.activation=silu"),
        ({"n_inner": 60}, "--config.model.n_inner=64"),
        ({"norms": "llama"}, "is of a 'bitnet' model; this recipe's model is 'llama'"),
    ],
    ids=str,
)
def test_another_model(fields, message, tmp_path):
    convert.save(params_of(CFG), CFG, tmp_path / "m")
    with pytest.raises(UserError, match=message):
        convert.load_params(tmp_path / "m", with_(**fields))


def test_who_may_be_exported_as_ternary():
    """Only a BitNet, and one that began in full precision only when it has got there."""
    asked = lambda **options: types.SimpleNamespace(**{"storage": None, "out": "folder"} | options)
    of = lambda cfg: types.SimpleNamespace(model=cfg)
    with pytest.raises(UserError, match="a bitnet's ternary matrices; this recipe's model is 'llama'"):
        modes._storage(of(LLAMA), asked(storage="2bit"), 10)
    with pytest.raises(UserError, match="this recipe's model is 'llama'"):
        modes._storage(of(LLAMA), asked(out="m.gguf"), 10)
    assert modes._storage(of(LLAMA), asked(), 10) == {}
    annealed = of(with_(anneal_steps=10))
    with pytest.raises(UserError, match=r"step 9 of model.anneal_steps=10: .* not trained as ternary ones yet"):
        modes._storage(annealed, asked(storage="2bit"), 9)
    assert modes._storage(annealed, asked(storage="latent"), 9) == {"storage": "latent"}
    assert modes._storage(annealed, asked(storage="2bit"), 10) == {"storage": "2bit"}


def test_a_damaged_scale(tmp_path):
    convert.save(params_of(CFG), CFG, tmp_path / "m", "2bit")
    edit_weights(tmp_path / "m", lambda t: t | {f"{UP}_scale": np.array([np.nan], np.float32)})
    with pytest.raises(UserError, match=f"is damaged: {UP} is uint8 and its scale nan"):
        convert.load_params(tmp_path / "m", with_(weights="2bit"))
