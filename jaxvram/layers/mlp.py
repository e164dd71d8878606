"""Feed-forward layers, and their activations by name."""

import functools

import flax.linen as nn
import jax


def gelu(x):
    """x Phi(x), exactly. jax.nn.gelu takes erfc, whose derivative costs XLA:CPU a third of a small model's train step."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {
    "gelu": gelu,  # nanoGPT
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # Hendrycks & Gimpel's tanh form: OpenAI, minGPT, llm.c
}


class MLP(nn.Module):
    """y = W_proj act(W_fc x): D -> `hidden` -> D, dropout on the result."""

    hidden: int
    activation: str
    dense: functools.partial  # of Linear, with dtypes and bias as the architecture has them
    kernel_init: nn.initializers.Initializer
    proj_init: nn.initializers.Initializer
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BxTxD, deterministic: bool = True):
        D = x_BxTxD.shape[-1]
        u_BxTxF = self.dense(self.hidden, kernel_init=self.kernel_init, name="c_fc")(x_BxTxD)
        y_BxTxD = self.dense(D, kernel_init=self.proj_init, name="c_proj")(ACTIVATIONS[self.activation](u_BxTxF))
        return nn.Dropout(self.dropout)(y_BxTxD, deterministic=deterministic)
