"""Tables of tokens and positions, and the head that may mirror one."""

import flax.linen as nn
import jax.numpy as jnp


class Embed(nn.Module):
    """A table of N rows of width D.

    Rows are gathered in the parameters' dtype and cast afterwards, so that the gradients of a token that occurs often
    add up in fp32 and no second copy of the table is made (nn.Embed casts the table first).
    """

    num_embeddings: int
    features: int
    embedding_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.bfloat16
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(self, ids_BxT):
        return jnp.take(self.embedding, ids_BxT, axis=0, mode="clip").astype(self.dtype)


class Head(nn.Module):
    """An output matrix of its own, no bias: its rows of padding are zero."""

    vocab_size: int
    table_rows: int
    features: int
    param_dtype: jnp.dtype = jnp.float32
    std: float = 0.02
    init: nn.initializers.Initializer | None = None  # of rows; None: normal numbers of that deviation

    @nn.compact
    def rows_VxD(self):
        padded = padded_rows(self.vocab_size, self.init or nn.initializers.normal(self.std))
        kernel_init = lambda key, shape, dtype: padded(key, shape[::-1], dtype).T
        return self.param("kernel", kernel_init, (self.features, self.table_rows), self.param_dtype).T


def padded_normal(vocab_size: int, std: float = 0.02):
    """N(0, std) in the first `vocab_size` rows, zero in the padding (llm.c)."""
    return padded_rows(vocab_size, nn.initializers.normal(std))


def padded_rows(vocab_size: int, init: nn.initializers.Initializer):
    """What `init` gives in the first `vocab_size` rows, zero in the padding."""

    def padded(key, shape, dtype):
        rows = init(key, (vocab_size, *shape[1:]), dtype)
        return jnp.pad(rows, ((0, shape[0] - vocab_size), (0, 0)))

    return padded
