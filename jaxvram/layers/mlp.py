"""Feed-forward layers, and their activations by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


def gelu(x):
    """x Phi(x), exactly. jax.nn.gelu takes erfc, whose derivative costs XLA:CPU a third of a small model's step."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def from_input_alone(f):
    """`f` element by element in fp32; backward keeps its inputs, in the dtype they came in, and computes `f` again.

    Left to itself JAX keeps two or three arrays of the MLP's inner width for a GELU, the widest there are in a block.
    """

    @jax.custom_vjp
    def activation(*inputs):
        return f(*_in_fp32(inputs)).astype(inputs[0].dtype)

    def backward(inputs, g):
        _, vjp = jax.vjp(f, *_in_fp32(inputs))
        return tuple(d.astype(u.dtype) for u, d in zip(inputs, vjp(g.astype(jnp.float32)), strict=True))

    activation.defvjp(lambda *inputs: (activation(*inputs), inputs), backward)
    return activation


def _in_fp32(arrays):
    return (a.astype(jnp.float32) for a in arrays)


ACTIVATIONS = {
    "gelu": from_input_alone(gelu),  # nanoGPT
    # Hendrycks & Gimpel's tanh form: OpenAI, minGPT, llm.c
    "gelu_tanh": from_input_alone(functools.partial(jax.nn.gelu, approximate=True)),
    "quick_gelu": from_input_alone(lambda x: x * jax.nn.sigmoid(1.702 * x)),  # CLIP
}

# Of two inputs, act(gate) * up: Shazeer 2020, arXiv:2002.05202
swiglu = from_input_alone(lambda gate, up: jax.nn.silu(gate) * up)
GATED = {
    "swish": swiglu,
    "gelu": from_input_alone(lambda gate, up: gelu(gate) * up),
    "gelu_tanh": from_input_alone(lambda gate, up: jax.nn.gelu(gate, approximate=True) * up),  # T5 v1.1
    "relu2": from_input_alone(lambda gate, up: jnp.square(jax.nn.relu(gate)) * up),  # So et al. 2021, arXiv:2109.08668
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
