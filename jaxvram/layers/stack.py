"""The only layer loop of the suite: `n` equal blocks, parameters stacked with the layer axis first.

The loop is `jax.lax.scan` over the stacked tree and not `nn.scan`: a block is a pure function of one slice of it, so a
slice can be taken, applied, sharded or updated alone, and remat in nested groups needs no second parameter layout.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

REMAT = ("none", "dots", "nested", "full")


class Stack(nn.Module):
    """`n_layers` blocks in a row. A block maps `(carry, state, *extras) -> (carry, state)`.

    `carry` is whatever travels along the depth (the residual stream; with it a balance loss, RWKV-7's first value),
    `state_L` what a layer remembers along time (leading axis L; None in plain training) and `extras` what every layer
    reads (DiT's conditioning). Dropout keys are split a layer.

    remat, what the backward pass of n layers keeps:
      none    everything: fastest, largest
      dots    results of matrix products without batch dimensions
      full    one carry a layer; each block is computed again
      nested  one carry a group of ~sqrt(n) layers, and one a layer within the group at hand; two more forward passes
    """

    block: type[nn.Module]
    cfg: Any
    n_layers: int
    remat: str = "none"
    unroll: bool = False  # no loop in the compiled program: compiles longer, XLA sees all layers at once
    first: int | None = None  # blocks start from weights that depend on their place: field `layer`, this for the first one

    @nn.compact
    def __call__(self, carry, state_L=None, *extras, deterministic: bool = True):
        block = self.block(self.cfg, parent=None)
        if self.is_initializing():
            self._init_layers(block, carry, state_L, extras)
        params_L = self.variables["params"]
        needs_rng = not deterministic and self.has_rng("dropout")
        keys_L = jax.random.split(self.make_rng("dropout"), self.n_layers) if needs_rng else None

        def layer(carry, slice_of):
            params, state, key = slice_of
            rngs = None if key is None else {"dropout": key}
            return block.apply({"params": params}, carry, state, *extras, deterministic=deterministic, rngs=rngs)

        return self._loop(layer, carry, (params_L, state_L, keys_L))

    def _init_layers(self, block, carry, state_L, extras):
        state = jax.tree.map(lambda s: s[0], state_L)
        keys = jax.random.split(self.make_rng("params"), self.n_layers)
        one_layer = lambda key, block: block.init(key, carry, state, *extras)["params"]
        if self.first is None:
            layers = jax.vmap(lambda key: one_layer(key, block))(keys)
        else:
            placed = lambda layer: self.block(self.cfg, layer=layer, parent=None)
            places = self.first + jnp.arange(self.n_layers)
            # One by one: a batch of orthogonal matrices can hang XLA:CPU, whose threads wait for each other.
            layers = jax.lax.map(lambda of: one_layer(of[0], placed(of[1])), (keys, places))
        for name, value in layers.items():
            self.put_variable("params", name, value)

    def _loop(self, layer, carry, xs):
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is none of {REMAT}")
        # A scan already keeps XLA from merging the recomputation with the forward pass; straight-line code does not.
        checkpoint = functools.partial(jax.checkpoint, prevent_cse=self.unroll, policy=policy_of(self.remat))
        if self.remat != "none":
            layer = checkpoint(layer)
        scan = lambda f, carry, xs: jax.lax.scan(f, carry, xs, unroll=self.n_layers if self.unroll else 1)
        if self.remat != "nested":
            return scan(layer, carry, xs)
        groups = group_count(self.n_layers)
        grouped = jax.tree.map(lambda x: x.reshape(groups, self.n_layers // groups, *x.shape[1:]), xs)
        carry, ys = scan(checkpoint(lambda carry, group: scan(layer, carry, group)), carry, grouped)
        return carry, jax.tree.map(lambda y: y.reshape(self.n_layers, *y.shape[2:]), ys)


def policy_of(remat: str):
    """What `jax.checkpoint` keeps of a block; None: what goes in."""
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None


def group_count(n_layers: int) -> int:
    """The divisor of n nearest below sqrt(n): that many carries are kept by remat='nested' (1 for a prime n)."""
    return max(d for d in range(1, math.isqrt(n_layers) + 1) if n_layers % d == 0)


def layer_slice(params_L, index: int):
    """The parameters of one layer: what `block.apply({'params': ...})` takes."""
    return jax.tree.map(lambda p: jnp.asarray(p)[index], params_L)
