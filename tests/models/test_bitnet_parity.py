"""Logits, loss and every gradient equal transformers' with AutoBitLinear in them: by golden file always, live where it is.

And a derivation of the logits in NumPy, from the papers' text, in fp64.
"""

import dataclasses
import functools

import make_bitnet
import numpy as np
import parity
import pytest
from quick import relative_error as error

from jaxvram.models.bitnet import BitNet, BitNetConfig

golden = functools.partial(parity.golden, make_bitnet)
NORMS = {"bitnet": "subln", "jaxvram_bitnet": "inside", "llama": "llama"}


def our_config(variant):
    c, made = make_bitnet.VARIANTS[variant], make_bitnet
    return BitNetConfig(
        vocab_size=made.V, vocab_multiple=16, block_size=made.T, n_layer=made.L, n_embd=made.D, n_inner=made.F,
        n_head=c["num_attention_heads"], n_kv_head=c["num_key_value_heads"], norm_eps=c["rms_norm_eps"],
        tie_head=c["tie_word_embeddings"], attention_bias=c.get("attention_bias", False), activation=c["hidden_act"],
        norms=NORMS[c["model_type"]], remat="none", dtype="float32",
    )  # fmt: skip


def errors(tmp_path, variant, cfg, reference):
    return parity.language_model_errors(tmp_path, make_bitnet, variant, cfg, reference, chunk=7)


@pytest.mark.parametrize("variant", make_bitnet.VARIANTS)
def test_golden(variant, tmp_path):
    parity.assert_small(errors(tmp_path, variant, our_config(variant), golden(variant)))


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_golden_under_remat(remat, unroll, tmp_path):
    if (remat, unroll) == ("none", False):
        return  # above
    cfg = dataclasses.replace(our_config("2b4t"), remat=remat, unroll_layers=unroll)
    parity.assert_small(errors(tmp_path, "2b4t", cfg, golden("2b4t")))


@parity.needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", make_bitnet.VARIANTS)
def test_live(variant, tmp_path):
    """Also that the golden file is what its script makes."""
    live = make_bitnet.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, our_config(variant), live))
    parity.assert_golden_is_live(make_bitnet, variant, live)


def in_numpy(variant):
    """Logits (B, T, V), in fp64, with no more than the names of the weights in common with anybody's code."""
    c, w = make_bitnet.VARIANTS[variant], {k: v.astype(np.float64) for k, v in make_bitnet.weights(variant).items()}
    tokens, eps = make_bitnet.batch()["tokens"], c["rms_norm_eps"]
    H, G = c["num_attention_heads"], c["num_key_value_heads"]
    (B, T), K = tokens.shape, make_bitnet.D // H
    norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x, name):
        """Activations to 8 bits, weights to three values, an exact product, and both scales."""
        x = norm(x, f"{name}.rms_norm") if f"{name}.rms_norm.weight" in w else x
        gamma, beta = np.abs(x).max(-1, keepdims=True), np.abs(w[f"{name}.weight"]).mean()
        x8, w3 = np.rint(127 * x / gamma), np.clip(np.rint(w[f"{name}.weight"] / beta), -1, 1)
        return x8 @ w3.T * (beta * gamma / 127) + w.get(f"{name}.bias", 0)

    def turned(x_BxTxHxK):
        angle = np.arange(T)[:, None, None] * c["rope_theta"] ** (-np.arange(K // 2) / (K // 2))
        z = (x_BxTxHxK[..., : K // 2] + 1j * x_BxTxHxK[..., K // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    def attention(u, name):
        heads = lambda x, count: np.repeat(x.reshape(B, T, count, K), H // count, axis=2)
        q, k, v = (heads(linear(u, f"{name}.{x}_proj"), n) for x, n in (("q", H), ("k", G), ("v", G)))
        scores = np.einsum("bthk,bshk->bhts", turned(q), turned(k)) / K**0.5
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        o = np.einsum("bhts,bshk->bthk", shares / shares.sum(-1, keepdims=True), v).reshape(B, T, H * K)
        return linear(norm(o, f"{name}.attn_sub_norm") if f"{name}.attn_sub_norm.weight" in w else o, f"{name}.o_proj")

    def mlp(u, name):
        gate, up = linear(u, f"{name}.gate_proj"), linear(u, f"{name}.up_proj")
        h = up * (np.maximum(gate, 0) ** 2 if c["hidden_act"] == "relu2" else gate / (1 + np.exp(-gate)))
        return linear(norm(h, f"{name}.ffn_sub_norm") if f"{name}.ffn_sub_norm.weight" in w else h, f"{name}.down_proj")

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(make_bitnet.L):
        layer = f"model.layers.{i}"
        before = lambda x, name: norm(x, name) if f"{name}.weight" in w else x
        x = x + attention(before(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        x = x + mlp(before(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("variant", make_bitnet.VARIANTS)
def test_the_derivation_in_numpy(variant):
    assert error(golden(variant)["logits"], in_numpy(variant)) < parity.TOLERANCE


@pytest.mark.parametrize(
    ("variant", "fields"),
    [("subln", {"norms": "llama"}), ("subln", {"activation": "relu2"}), ("2b4t", {"norm_eps": 1.01e-2}),
     ("llama", {"rope_theta": 20000.0})],
    ids=str,
)  # fmt: skip
def test_the_comparison_sees_a_small_change(variant, fields, tmp_path):
    right = our_config(variant)
    params = parity.in_our_layout(tmp_path, make_bitnet, variant, right, make_bitnet.weights(variant))
    wrong = BitNet(dataclasses.replace(right, **fields))
    logits, _, _ = parity.language_model(wrong, params, **parity.of_batch(make_bitnet))
    assert error(logits, golden(variant)["logits"]) > 5 * parity.TOLERANCE


def test_without_rounding_it_is_a_llama_and_that_is_not_the_same(tmp_path):
    """The oracle is ternary: without its rounding the numbers are others by far."""
    cfg = our_config("llama")
    params = parity.in_our_layout(tmp_path, make_bitnet, "llama", cfg, make_bitnet.weights("llama"))
    hidden, _ = BitNet(cfg).apply({"params": params}, make_bitnet.batch()["tokens"], mix=np.float32(0))
    head = BitNet(cfg).apply({"params": params}, method="head_VxD")
    logits = (np.asarray(hidden) @ np.asarray(head).T)[..., : make_bitnet.V]
    assert error(logits, golden("llama")["logits"]) > 0.05
