"""Multi-head self-attention as a mixer `(x, state) -> (y, state)`; its state is the cache of keys and values."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxvram.kernels.attention import attention


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the `length` tokens seen so far, in a buffer of S positions: 2 S H K sizeof(dtype) bytes."""

    k_BxSxHxK: jax.Array
    v_BxSxHxK: jax.Array
    length: jax.Array  # int32, the same for every sequence of the batch

    @classmethod
    def empty(cls, batch: int, positions: int, heads: int, head_dim: int, dtype) -> "KVCache":
        shape = (batch, positions, heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    @classmethod
    def of_layers(cls, layers: int, *shape, dtype) -> "KVCache":
        """One that is `empty` for each layer, along a leading axis, as a Stack takes it."""
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (layers, *a.shape)), cls.empty(*shape, dtype))

    def append(self, k_BxTxHxK, v_BxTxHxK) -> "KVCache":
        """The cache with T more positions. The caller sees to it that length + T <= S."""
        put = lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new, self.length, axis=1)
        k, v = put(self.k_BxSxHxK, k_BxTxHxK), put(self.v_BxSxHxK, v_BxTxHxK)
        return KVCache(k, v, self.length + k_BxTxHxK.shape[1])


class SelfAttention(nn.Module):
    """One matrix for q, k and v, one for the result; dropout on probabilities and on the result, as in GPT-2."""

    n_head: int
    dense: functools.partial  # of Linear, with dtypes and bias as the architecture has them
    kernel_init: nn.initializers.Initializer
    proj_init: nn.initializers.Initializer
    dropout: float = 0.0
    causal: bool = True
    kernels: str = "auto"  # implementation of kernels/attention.py

    @nn.compact
    def __call__(self, x_BxTxD, cache: KVCache | None = None, deterministic: bool = True, key_lengths_B=None):
        """`key_lengths_B`: tokens of each sequence that count, the rest is padding; None: all of them."""
        B, T, D = x_BxTxD.shape
        qkv_BxTx3D = self.dense(3 * D, kernel_init=self.kernel_init, name="c_attn")(x_BxTxD)
        q, k, v = (a.reshape(B, T, self.n_head, D // self.n_head) for a in jnp.split(qkv_BxTx3D, 3, axis=-1))
        offset = 0
        if cache is not None:
            offset, cache = cache.length, cache.append(k, v)
            k, v = cache.k_BxSxHxK, cache.v_BxSxHxK
        key = None if deterministic or self.dropout == 0 else self.make_rng("dropout")
        y_BxTxHxK = attention(
            q, k, v, causal=self.causal, offset=offset, dropout_rate=self.dropout, dropout_key=key,
            implementation=self.kernels, key_lengths_B=key_lengths_B,
        )  # fmt: skip
        y_BxTxD = self.dense(D, kernel_init=self.proj_init, name="c_proj")(y_BxTxHxK.reshape(B, T, D))
        return nn.Dropout(self.dropout)(y_BxTxD, deterministic=deterministic), cache
