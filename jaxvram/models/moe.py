"""Llama with a mixture of experts for a feed-forward layer: Mixtral (arXiv:2401.04088), Grok-1, and others by settings.

In each layer, of the stream x:  x += attn(norm(x));  x += sum over the k experts e chosen for u of w_e f_e(u), u = norm(x)
[+ f_shared(u)], with f(u) = W_down (act(W_gate u) * W_up u). Who is chosen, and the weights: layers/routing.py.

              act    norm after attn, experts   scores of attention   weights w        x at first   logits     head
  Mixtral     silu   no                         s                     over their sum   table        W x        its own
  Grok-1      gelu   yes, before it is added    30 tanh(s / 30)       as they are      sqrt(D) ""   W x/sqrt 3 table

Every matrix and table ~ N(0, init_std), scales 1. Grok-1 was published without training code and with all its initialisers
zero: this start is ours, and so are its losses. Router and its choice in fp32 whatever the dtypes.
Read: xai-org/grok-1 7050ed2 model.py, transformers 5.24 modeling_mixtral, EleutherAI/gpt-neox ea7aefd.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError, nearest
from jaxvram.layers.attention import KVCache
from jaxvram.layers.embeddings import Embed, Head, padded_normal
from jaxvram.layers.experts import Experts, capacity_of
from jaxvram.layers.mlp import GATED
from jaxvram.layers.norms import RMSNorm
from jaxvram.layers.routing import RULES, health, route
from jaxvram.layers.stack import Stack
from jaxvram.models.llama import Llama, LlamaAttention, LlamaConfig, LlamaMLP

GROK = {  # what makes a Grok of it, whatever its size
    "activation": "gelu_tanh", "sandwich_norm": True, "attention_soft_cap": 30.0, "renormalise": False,
    "scale_embedding": True, "output_multiplier": 3**-0.5, "tie_head": True,
}  # fmt: skip
SIZES = {
    "grok-1": {
        "vocab_size": 131072, "block_size": 8192, "n_layer": 64, "n_embd": 6144, "n_inner": 32768, "n_head": 48,
        "n_kv_head": 8, **GROK,
    },
    "mixtral-8x7b": {
        "vocab_size": 32000, "block_size": 32768, "n_layer": 32, "n_embd": 4096, "n_inner": 14336, "n_head": 32,
        "n_kv_head": 8, "rope_theta": 1e6,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MoEConfig(LlamaConfig):
    """n_inner is the width of one expert."""

    n_expert: int = 8  # E
    n_expert_per_token: int = 2  # k
    n_shared_expert: int = 0  # as wide as so many experts: one more feed-forward layer that every token passes
    router: str = "softmax"  # softmax | sigmoid | sinkhorn (layers/routing.py)
    renormalise: bool = True  # a token's weights add up to 1 (Mixtral); False: as they are (Grok-1, GPT-NeoX)
    router_jitter: float = 0.0  # in training, what the router reads is times U(1 - this, 1 + this) (Switch, GPT-NeoX)
    balance_loss: float = 0.01  # factor of the loss that evens loads out; 0: none
    balance_per_sequence: bool = False  # within each sequence, not over the microbatch
    balance_offsets: bool = False  # offsets of the choice, moved by the optimizer group's sign_rate
    z_loss: float = 0.0  # factor of the loss on large logits of the router (ST-MoE: 1e-3)
    capacity_factor: float = 0.0  # in training, room of an expert, 1: for equal loads; 0: for all (nothing is dropped)
    activation: str = "swish"  # swish | gelu | gelu_tanh
    sandwich_norm: bool = False  # norms of what attention and experts give, before it is added
    attention_soft_cap: float = 0.0  # scores s become cap tanh(s / cap); 0: none
    scale_embedding: bool = False  # by sqrt(D)
    output_multiplier: float = 1.0  # of logits

    def __post_init__(self):
        super().__post_init__()
        for field, valid in {"router": RULES, "activation": tuple(GATED)}.items():
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"model.{field}={value!r} is unknown{nearest(value, valid)}")
        if not 1 <= self.n_expert_per_token <= self.n_expert:
            which = f"model.n_expert_per_token={self.n_expert_per_token}"
            raise UserError(f"{which} must be at least 1 and at most model.n_expert={self.n_expert}")
        of = ("n_shared_expert", "balance_loss", "z_loss", "capacity_factor", "attention_soft_cap")
        if negative := [name for name in of if getattr(self, name) < 0]:
            raise UserError(f"model.{negative[0]}={getattr(self, negative[0])} must not be negative")
        if not 0 <= self.router_jitter < 1:
            raise UserError(f"model.router_jitter={self.router_jitter} is not in [0, 1)")
        if self.renormalise and self.n_expert_per_token == 1 < self.n_expert:
            raise UserError("model.renormalise gives one expert a token the weight 1, and the router no gradient: set False")
        if self.mlp_bias:
            raise UserError("model.mlp_bias: experts have no biases")


class CappedAttention(LlamaAttention):
    """Llama's, with Grok-1's cap of scores."""

    def attend(self, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, **options):
        options |= {"soft_cap": self.cfg.attention_soft_cap} if self.cfg.attention_soft_cap else {}
        return super().attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, **options)


class Router(nn.Module):
    """Logits z = W u in fp32, and the choice by them."""

    cfg: MoEConfig

    @nn.compact
    def __call__(self, u_NxD, deterministic: bool):
        """(Routing, offset_E or None)."""
        cfg, D = self.cfg, u_NxD.shape[-1]
        kernel_DxE = self.param("kernel", nn.initializers.normal(cfg.init_std), (D, cfg.n_expert), jnp.float32)
        offset_E = None
        if cfg.balance_offsets:
            offset_E = self.param("expert_offset", nn.initializers.zeros, (cfg.n_expert,), jnp.float32)
        u_NxD = u_NxD.astype(jnp.float32)
        if cfg.router_jitter and not deterministic:
            eps = cfg.router_jitter
            u_NxD *= jax.random.uniform(self.make_rng("dropout"), u_NxD.shape, minval=1 - eps, maxval=1 + eps)
        logits_NxE = jnp.matmul(u_NxD, kernel_DxE, precision=jax.lax.Precision.HIGHEST)
        choice = cfg.n_expert_per_token, cfg.router, cfg.renormalise, offset_E
        return route(logits_NxE, *choice, training=not deterministic), offset_E


class SparseMLP(nn.Module):
    """The experts of each token; and what the router has to tell, for losses and for the reader."""

    cfg: MoEConfig

    @nn.compact
    def __call__(self, u_BxTxD, deterministic: bool):
        cfg = self.cfg
        B, T, D = u_BxTxD.shape
        u_NxD = u_BxTxD.reshape(B * T, D)
        routing, offset_E = Router(cfg, name="router")(u_NxD, deterministic)
        capacity = None
        if cfg.capacity_factor and not deterministic:
            capacity = capacity_of(B * T, cfg.n_expert_per_token, cfg.n_expert, cfg.capacity_factor)
        options = cfg.dtype, cfg.param_dtype, nn.initializers.normal(cfg.init_std), cfg.kernels
        experts = Experts(cfg.n_expert, cfg.n_inner, cfg.activation, *options, name="experts")
        y_NxD, dropped = experts(u_NxD, routing.experts_Nxk, routing.weights_Nxk, capacity)
        y_BxTxD = y_NxD.reshape(B, T, D)
        if cfg.n_shared_expert:
            wide = dataclasses.replace(cfg, n_inner=cfg.n_shared_expert * cfg.n_inner)
            y_BxTxD += SharedMLP(wide, name="shared")(u_BxTxD)
        return y_BxTxD, health(routing, B, cfg.balance_per_sequence, offset_E, dropped)


class SharedMLP(LlamaMLP):
    """Llama's, with the experts' activation."""

    def __call__(self, u_BxTxD):
        return self.down_proj(GATED[self.cfg.activation](self.gate_proj(u_BxTxD), self.up_proj(u_BxTxD)))


class Block(nn.Module):
    """x += attn(input_norm(x)); x += experts(post_norm(x)). The state it returns is (cache, what its router tells)."""

    cfg: MoEConfig

    @nn.compact
    def __call__(self, x_BxTxD, cache: KVCache | None, rotation, segments_BxT, deterministic: bool = True):
        cfg = self.cfg
        norm = functools.partial(RMSNorm, cfg.norm_eps, cfg.dtype, cfg.param_dtype)
        after = lambda name, y_BxTxD: norm(name=name)(y_BxTxD) if cfg.sandwich_norm else y_BxTxD
        u_BxTxD = norm(name="input_norm")(x_BxTxD)
        y_BxTxD, cache = CappedAttention(cfg, name="attn")(u_BxTxD, cache, rotation, segments_BxT)
        x_BxTxD += after("attn_out_norm", y_BxTxD)
        y_BxTxD, told = SparseMLP(cfg, name="moe")(norm(name="post_norm")(x_BxTxD), deterministic)
        x_BxTxD += after("moe_out_norm", y_BxTxD)
        return x_BxTxD, (cache, told)


class ScaledEmbed(Embed):
    """Rows times a number."""

    scale: float = 1.0

    def __call__(self, ids_BxT):
        return super().__call__(ids_BxT) * jnp.asarray(self.scale, self.dtype)


class MoE(Llama):
    """A Llama whose layers also tell of their routers: `routed` returns what they told, leading axis L."""

    cfg: MoEConfig

    def setup(self):
        cfg = self.cfg
        scale = cfg.n_embd**0.5 if cfg.scale_embedding else 1.0
        table = cfg.table_rows, cfg.n_embd, padded_normal(cfg.vocab_size, cfg.init_std), cfg.dtype, cfg.param_dtype
        self.embed_tokens = ScaledEmbed(*table, scale=scale)
        self.layers = Stack(Block, cfg, cfg.n_layer, cfg.remat, cfg.unroll_layers)
        self.norm = RMSNorm(cfg.norm_eps, cfg.dtype, cfg.param_dtype)
        if not cfg.tie_head:
            self.lm_head = Head(cfg.vocab_size, cfg.table_rows, cfg.n_embd, cfg.param_dtype, cfg.init_std)

    def __call__(self, tokens_BxT, state: KVCache | None = None, segments_BxT=None, deterministic: bool = True):
        """As Llama's."""
        return self.routed(tokens_BxT, state, segments_BxT, deterministic)[:2]

    def routed(self, tokens_BxT, state: KVCache | None = None, segments_BxT=None, deterministic: bool = True):
        """The same, and {name: (L, ...)}: layers/routing.py, health. Only this names what `deterministic` changes beside
        jitter: Sinkhorn's choice and the capacity are of training."""
        x_BxTxD, (state, told_L) = super().__call__(tokens_BxT, state, segments_BxT, deterministic)
        return x_BxTxD * jnp.asarray(self.cfg.output_multiplier, x_BxTxD.dtype), state, told_L
