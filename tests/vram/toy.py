"""A stand-in for a model: L square layers under one scan, a table, a loss in chunks of nothing; and what its sizes are."""

import jax
import jax.numpy as jnp
import optax

from jaxvram.vram.plan import Program

L, D, B, V = 4, 256, 512, 640  # layers, width, rows, vocabulary


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def init_params():
    return {"wte": {"embedding": jnp.ones((V, D))}, "h": {"mlp": {"kernel": jnp.ones((L, D, D))}}}


def forward(params, tokens_B, remat):
    def layer(x_BxD, kernel_DxD):
        return jnp.tanh(x_BxD @ kernel_DxD), None

    if remat == "full":
        layer = jax.checkpoint(layer, prevent_cse=False)
    x_BxD = params["wte"]["embedding"][tokens_B]
    return jax.lax.scan(layer, x_BxD, params["h"]["mlp"]["kernel"])[0]


class Task:
    def __init__(self, remat="none"):
        self.remat = remat

    def loss(self, params, tokens_B):
        hidden_BxD = forward(params, tokens_B, self.remat)
        logits_BxV = hidden_BxD @ params["wte"]["embedding"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxV, tokens_B).sum()


def train_program(remat="none", rows=B, microbatch=None) -> Program:
    """A step of Adam on `rows` tokens, `microbatch` at a time; the state is a dict of params and opt_state, donated."""
    tx, task, microbatch = optax.adam(1e-3), Task(remat), microbatch or rows

    def step(state, batch):
        def add(sums, tokens_B):
            return jax.tree.map(jnp.add, sums, jax.grad(task.loss)(state["params"], tokens_B)), None

        if microbatch == rows:
            grads = jax.grad(task.loss)(state["params"], batch["tokens"])
        else:
            zeros = jax.tree.map(jnp.zeros_like, state["params"])
            grads, _ = jax.lax.scan(add, zeros, batch["tokens"].reshape(-1, microbatch))
        updates, opt_state = tx.update(grads, state["opt_state"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def make():
        params = init_params()
        return {"params": params, "opt_state": tx.init(params)}

    return Program(step, (jax.eval_shape(make), {"tokens": spec(rows, dtype=jnp.int32)}), (0,))
