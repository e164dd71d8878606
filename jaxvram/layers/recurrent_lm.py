"""The frame that language models with a recurrent mixer share: embed, Stack of blocks, norm, head."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError, nearest
from jaxvram.kernels.backend import IMPLEMENTATIONS
from jaxvram.layers.embeddings import Embed, Head, padded_normal
from jaxvram.layers.norms import RMSNorm
from jaxvram.layers.stack import REMAT, Stack

DTYPES = ("bfloat16", "float32")


class RecurrentLM(nn.Module):
    """Tokens to hidden states, with a state of constant size; the head is a method of its own (see models/gpt2.py).

    A subclass names its block, `(x_BxTxD fp32, state, *extras) -> (x_BxTxD, state)`, and how an empty state looks,
    `empty_state(batch)`. Its configuration has vocab_size, table_rows, n_layer, n_embd, tie_head, reset_token, remat,
    unroll_layers, dtype and param_dtype.
    """

    cfg: object
    block: ClassVar[type[nn.Module]]
    context: ClassVar[int | None] = None  # tokens that it can read back to: no bound
    table_std = 0.02  # of a fresh table, and of a head of its own
    norm_eps = 1e-5  # of the norm before the head

    def setup(self):
        cfg = self.cfg
        dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        table_init = padded_normal(cfg.vocab_size, self.table_std)
        self.embedding = Embed(cfg.table_rows, cfg.n_embd, table_init, jnp.float32, cfg.param_dtype)
        self.layers = Stack(self.block, cfg, cfg.n_layer, cfg.remat, cfg.unroll_layers)
        self.norm_f = RMSNorm(self.norm_eps, **dtypes)
        if not cfg.tie_head:
            self.lm_head = Head(cfg.vocab_size, cfg.table_rows, cfg.n_embd, cfg.param_dtype, self.table_std)

    def __call__(self, tokens_BxT, state=None, deterministic: bool = True):
        """Hidden states (B, T, D) in the compute dtype, and the state of all layers (leading axis L) for what follows.

        Args:
          tokens_BxT: int32, of any length; they follow those that `state` has seen.
          state: None (training on whole sequences: none is returned), or `initial_state` or what an earlier call returned.
        """
        resets_BxT = tokens_BxT == self.cfg.reset_token if self.cfg.reset_token >= 0 else None
        extras = self.extras(tokens_BxT, state, resets_BxT)
        x_BxTxD, state = self.run_layers(self.embed(tokens_BxT), state, extras, deterministic)
        if not self.cfg.tie_head:
            self.lm_head.rows_VxD()  # else `init`, which only runs this method, would not make it
        return self.norm_f(x_BxTxD), state

    def embed(self, tokens_BxT):
        """The stream before the first layer, fp32."""
        return self.embedding(tokens_BxT)

    def extras(self, tokens_BxT, state, resets_BxT) -> tuple:
        """What every layer reads beside the stream and its state."""
        return (resets_BxT,)

    def run_layers(self, x_BxTxD, state, extras: tuple, deterministic: bool):
        return self.layers(x_BxTxD, state, *extras, deterministic=deterministic)

    def head_VxD(self):
        return self.embedding.embedding if self.cfg.tie_head else self.lm_head.rows_VxD()

    def initial_state(self, batch: int, tokens: int | None = None):
        """What every layer remembers before the first token: as much, however many `tokens` there will be."""
        one_layer = self.empty_state(batch)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.cfg.n_layer, *a.shape)), one_layer)


def check_fields(cfg) -> None:
    """Raises a UserError unless the fields that all these models have make sense."""
    of = {"remat": REMAT, "kernels": IMPLEMENTATIONS, "dtype": DTYPES, "param_dtype": DTYPES}
    for field, valid in of.items():
        if (value := getattr(cfg, field)) not in valid:
            raise UserError(f"model.{field}={value!r} is unknown{nearest(value, valid)}")
    if not -1 <= cfg.reset_token < max(cfg.vocab_size, 1):
        raise UserError(f"model.reset_token={cfg.reset_token} is no token, nor -1 for none")
