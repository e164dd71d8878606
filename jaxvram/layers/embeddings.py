"""Token and position tables."""

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
