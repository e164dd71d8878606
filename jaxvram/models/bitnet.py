"""BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764; 2B4T: arXiv:2504.12285): a Llama whose matrices are ternary.

Every product of a layer is y = Q(x) Q(W): x in int8, a scale a token, W in -1, 0, 1, a scale a matrix (kernels/bit_linear.py
has the maths), trained straight through with W in full precision. Table, head and norms stay as they are. The norms:

    inside  y = Q(norm(x)) Q(W), a norm in every product; the layer has none            (b1.58, its training tips)
    subln   x += W_o sub_norm(attn(norm(x)));  x += W_down sub_norm(act(W_gate u) * W_up u), u = norm(x)
            (2B4T with act = relu^2; with silu the public reproduction of b1.58, and llama.cpp's `bitnet`)
    llama   a Llama's own and no more, so that what was trained as one stays the same function at lambda = 0

weights says how a matrix lies: `latent`, as it is trained; `2bit` or `base3`, packed codes and their scale, frozen: to
sample from, or as the base of a LoRA. Sampling from latent ones packs them once, and then reads 2 bits a weight and token.

From a trained Llama (`train.init_from` with anneal_steps = N): at step n, x and W are rounded min(n / N, 1) of the way, as
in transformers' recipe for fine-tuning to 1.58 bits; such a run multiplies in the compute dtype and keeps what that takes.

Backward, with remat='none': both streams, q, k, v, o in the compute dtype, and codes in int8; the MLP is computed again, its
products being of integers. That is 14 D bytes a token and layer; a Llama keeps 34 D at the 700M's widths (docs/bitnet.md).
Read: transformers 5.24 modeling_bitnet and integrations/bitnet, Microsoft's training tips (unilm, bitnet).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError, nearest
from jaxvram.kernels import ternary
from jaxvram.kernels.bit_linear import bit_linear, mixed, packed_linear
from jaxvram.layers.attention import KVCache
from jaxvram.layers.linear import Linear, product
from jaxvram.layers.mlp import GATED
from jaxvram.layers.norms import RMSNorm
from jaxvram.models.llama import Llama, LlamaAttention, LlamaConfig

WEIGHTS = ("latent", *ternary.STORAGE)
NORMS = ("subln", "inside", "llama")
ACTIVATIONS = {"silu": GATED["swish"], "relu2": GATED["relu2"]}


def _size(L: int, D: int, F: int, H: int) -> dict:
    return {"n_layer": L, "n_embd": D, "n_inner": F, "n_head": H, "n_kv_head": H}


SIZES = {
    "700m": _size(24, 1536, 4096, 24),
    "1.3b": _size(24, 2048, 5460, 32),
    "3b": _size(26, 3200, 8640, 32),
    "3.9b": _size(26, 3200, 12800, 32),
    "2b4t": {
        **_size(30, 2560, 6912, 20), "n_kv_head": 5, "vocab_size": 128256, "rope_theta": 500000.0, "activation": "relu2",
        "block_size": 4096, "tie_head": True,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BitNetConfig(LlamaConfig):
    n_layer: int = 24  # L
    n_head: int = 24  # H
    n_kv_head: int = 24  # G
    n_embd: int = 1536  # D
    n_inner: int = 4096  # F
    norms: str = "subln"  # subln (2B4T; llama.cpp's bitnet) | inside (every product; b1.58) | llama
    activation: str = "silu"  # of the gate: silu | relu2 (2B4T)
    weights: str = "latent"  # latent (trained, in param_dtype) | 2bit | base3: packed, frozen
    anneal_steps: int = 0  # N, over which weights of a full-precision Llama become ternary; 0: ternary from the start

    def __post_init__(self):
        super().__post_init__()
        for field, valid in (("activation", ACTIVATIONS), ("weights", WEIGHTS), ("norms", NORMS)):
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, valid)}")
        if self.anneal_steps < 0:
            raise UserError(f"model.anneal_steps={self.anneal_steps} must not be negative")
        if self.anneal_steps and self.weights != "latent":
            raise UserError(f"model.anneal_steps rounds weights that are trained; model.weights={self.weights} are not")

    def mix_at(self, step):
        """lambda of a step: how far of the way weights and activations are rounded."""
        return jnp.minimum(step.astype(jnp.float32) / self.anneal_steps, 1)


class BitLinear(Linear):
    """y = Q([norm(x)]) Q(W)^T [+ b]; `mix`: rounded only so far."""

    weights: str = "latent"
    norm_epsilon: float | None = None  # of the norm inside; None: there is none
    mix: Any = None
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x_xD):
        x_xD = x_xD.astype(self.dtype)
        shape = (self.features, x_xD.shape[-1])  # (out, in): see kernels/bit_linear.py
        if self.norm_epsilon is not None:
            x_xD = RMSNorm(self.norm_epsilon, self.dtype, self.param_dtype, name="rms_norm")(x_xD)
        if self.weights != "latent":
            packed = self.param("packed", lambda key: pack_latent(self._fresh(key, shape), self.weights)[0])
            scale = self.param("weight_scale", lambda key: pack_latent(self._fresh(key, shape), self.weights)[1])
            y_xF = packed_linear(x_xD, packed, scale, self.features, self.weights, self.implementation)
        else:
            latent_FxD = self.param("latent", self._fresh, shape)
            if self.mix is None:
                y_xF = bit_linear(x_xD, latent_FxD)
            else:
                x_xD, w_FxD = mixed(x_xD, latent_FxD, self.mix)
                y_xF = product(x_xD, w_FxD.astype(self.dtype).T)
        if self.use_bias:
            y_xF += self.param("bias", self.bias_init, (self.features,), self.param_dtype).astype(self.dtype)
        return y_xF

    def _fresh(self, key, shape):
        return self.kernel_init(key, shape, self.param_dtype)


def pack_latent(latent_FxD, weights: str):
    """(packed uint8 (R, D), its scale) of one matrix as it is trained."""
    codes_FxD, scale = ternary.codes_of(latent_FxD)
    return ternary.pack(codes_FxD, weights), scale


def _dense(cfg: BitNetConfig, features: int, use_bias: bool, mix) -> BitLinear:
    return BitLinear(
        features, use_bias=use_bias, dtype=cfg.dtype, param_dtype=cfg.param_dtype, mix=mix, weights=cfg.weights,
        kernel_init=nn.initializers.normal(cfg.init_std), implementation=cfg.kernels,
        norm_epsilon=cfg.norm_eps if cfg.norms == "inside" else None,
    )  # fmt: skip


def _norm(cfg: BitNetConfig, **name):
    return RMSNorm(cfg.norm_eps, cfg.dtype, cfg.param_dtype, **name)


class BitNetAttention(LlamaAttention):
    """Llama's, of ternary products; in `subln` what it finds is normed before W_o."""

    cfg: BitNetConfig
    mix: Any = None

    def setup(self):
        cfg = self.cfg
        dense = lambda features: _dense(cfg, features, cfg.attention_bias, self.mix)
        self.q_proj = dense(cfg.n_head * cfg.key_size)
        self.k_proj = dense(cfg.n_kv_head * cfg.key_size)
        self.v_proj = dense(cfg.n_kv_head * cfg.key_size)
        self.o_proj = dense(cfg.n_embd)
        if cfg.norms == "subln":
            self.attn_sub_norm = _norm(cfg)

    def attend(self, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, **options):
        o_BxTxHxK = super().attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, **options)
        if self.cfg.norms != "subln":
            return o_BxTxHxK

        def normed(attn, o_BxTxHxK):
            return attn.attn_sub_norm(o_BxTxHxK.reshape(*o_BxTxHxK.shape[:2], -1)).reshape(o_BxTxHxK.shape)

        if self.cfg.remat == "none":  # else it would keep o in another shape than the attention does, beside that
            normed = nn.remat(normed, prevent_cse=self.cfg.unroll_layers)
        return normed(self, o_BxTxHxK)


class BitNetMLP(nn.Module):
    """W_down [norm](act(W_gate u) * W_up u)."""

    cfg: BitNetConfig
    mix: Any = None

    @nn.compact
    def __call__(self, u_BxTxD):
        cfg = self.cfg
        dense = lambda features, name: _dense(cfg, features, cfg.mlp_bias, self.mix).copy(name=name)
        gate_BxTxF, up_BxTxF = dense(cfg.n_inner, "gate_proj")(u_BxTxD), dense(cfg.n_inner, "up_proj")(u_BxTxD)
        h_BxTxF = ACTIVATIONS[cfg.activation](gate_BxTxF, up_BxTxF)
        if cfg.norms == "subln":
            h_BxTxF = _norm(cfg, name="ffn_sub_norm")(h_BxTxF)
        return dense(cfg.n_embd, "down_proj")(h_BxTxF)


class Block(nn.Module):
    """x += attn([norm](x)); x += mlp([norm](x))."""

    cfg: BitNetConfig

    @nn.compact
    def __call__(self, x_BxTxD, cache: KVCache | None, rotation, segments_BxT, mix=None, deterministic: bool = True):
        cfg = self.cfg
        normed = lambda x_BxTxD, name: x_BxTxD if cfg.norms == "inside" else _norm(cfg, name=name)(x_BxTxD)
        u_BxTxD = normed(x_BxTxD, "input_norm")
        y_BxTxD, cache = BitNetAttention(cfg, mix, name="attn")(u_BxTxD, cache, rotation, segments_BxT)
        x_BxTxD += y_BxTxD

        def mlp(block, x_BxTxD):
            return BitNetMLP(cfg, mix, name="mlp")(normed(x_BxTxD, "post_norm"))

        if cfg.remat == "none":  # of its arrays, the widest there are, none is kept
            mlp = nn.remat(mlp, prevent_cse=cfg.unroll_layers)
        return x_BxTxD + mlp(self, x_BxTxD), cache


class BitNet(Llama):
    """Tokens to hidden states; else as a Llama."""

    cfg: BitNetConfig
    block = Block

    def __call__(self, tokens_BxT, state: KVCache | None = None, segments_BxT=None, deterministic: bool = True, mix=None):
        """As Llama's. mix: how far weights and activations are rounded, 0 to 1, fp32; None: in full, and by integers."""
        return self.hidden(tokens_BxT, state, deterministic, segments_BxT, mix)

    @property
    def decoder(self) -> "BitNet":
        """What sampling runs: of latent weights, the same model with these packed."""
        latent = self.cfg.weights == "latent"
        return BitNet(dataclasses.replace(self.cfg, weights="2bit", anneal_steps=0)) if latent else self

    def decoder_params(self, params):
        return packed_params(params, "2bit") if self.cfg.weights == "latent" else params


def packed_params(params, weights: str):
    """The parameters of a model with `weights`, of one with latent ones; all layers of a matrix, one after the other."""
    if not isinstance(params, dict):
        return params
    packed = {name: packed_params(leaf, weights) for name, leaf in params.items() if name != "latent"}
    if "latent" in params:
        both = jax.lax.map(lambda latent_FxD: pack_latent(latent_FxD, weights), params["latent"])
        packed |= dict(zip(("packed", "weight_scale"), both, strict=True))
    return packed
