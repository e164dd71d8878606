"""The layer loop: every remat and both loops give the numbers of a plain Python loop, and remat saves what it says."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.layers.stack import REMAT, Stack, group_count, layer_slice

N, B, D = 6, 3, 8


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 4 * D
    dropout: float = 0.0


class Toy(nn.Module):
    """Carries (x, balance), remembers the mean it saw, reads a shift and a scale."""

    cfg: ToyConfig

    @nn.compact
    def __call__(self, carry, state, shift_BxD, scales, deterministic=True):
        x_BxD, balance = carry
        u_BxF = nn.tanh(nn.Dense(self.cfg.width, name="up")(x_BxD + shift_BxD))
        u_BxF = nn.Dropout(self.cfg.dropout)(u_BxF, deterministic=deterministic)
        y_BxD = nn.Dense(D, name="down")(u_BxF) * scales["y"]
        seen = None if state is None else state + y_BxD.mean(0)
        return (x_BxD + y_BxD, balance + jnp.square(u_BxF).sum()), seen


class Masks(nn.Module):
    """What dropout keeps, as the state of its layer."""

    cfg: ToyConfig

    @nn.compact
    def __call__(self, x_BxD, state, deterministic=True):
        self.param("unused", nn.initializers.zeros, (1,))
        return x_BxD, nn.Dropout(0.5)(jnp.ones((B, 64)), deterministic=deterministic) + state


def inputs():
    random = np.random.RandomState(0)
    x_BxD, shift_BxD = random.normal(0, 1, (2, B, D)).astype(np.float32)
    state_LxD = random.normal(0, 1, (N, D)).astype(np.float32)
    return (jnp.asarray(x_BxD), jnp.float32(0)), jnp.asarray(state_LxD), jnp.asarray(shift_BxD), {"y": jnp.float32(0.5)}


@functools.cache
def params():
    return Stack(Toy, ToyConfig(), N).init(jax.random.key(0), *inputs())["params"]


def value_and_gradients(apply):
    """(carry, state) and the gradients of a number made of both, by parameters, carry, state and extras."""

    def loss(params, args):
        (x_BxD, balance), state = out = apply(params, *args)
        return jnp.sin(x_BxD).sum() + 0.1 * balance + jnp.square(state).sum(), out

    return quick.jit(jax.grad(loss, (0, 1), has_aux=True))(params(), inputs())


def python_loop(params, carry, state_LxD, *extras):
    states = []
    for i in range(N):
        carry, state = Toy(ToyConfig()).apply({"params": layer_slice(params, i)}, carry, state_LxD[i], *extras)
        states.append(state)
    return carry, jnp.stack(states)


@functools.cache
def by_python_loop():
    return value_and_gradients(python_loop)


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("remat", REMAT)
def test_equals_a_python_loop(remat, unroll):
    """Carry, states, and gradients through the carry's both parts, the states and the extras."""
    stack = Stack(Toy, ToyConfig(), N, remat, unroll)
    got = value_and_gradients(lambda p, *args: stack.apply({"params": p}, *args))
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, got, by_python_loop()))) < 2e-6


def test_without_state():
    carry, _, *extras = inputs()
    (x_BxD, _), state = Stack(Toy, ToyConfig(), N, "nested").apply({"params": params()}, carry, None, *extras)
    assert state is None
    (want_BxD, _), _ = python_loop(params(), *inputs())
    np.testing.assert_allclose(x_BxD, want_BxD, rtol=1e-5, atol=1e-6)


def kept_bytes(remat, n_layers, unroll=False):
    """Bytes of activations that the forward pass keeps for the backward pass, arguments left out."""
    stack = Stack(Toy, ToyConfig(), n_layers, remat, unroll)
    (x_BxD, zero), _, *extras = inputs()
    variables = jax.eval_shape(lambda: stack.init(jax.random.key(0), (x_BxD, zero), None, *extras))
    run = lambda v, x: stack.apply(v, (x, zero), None, *extras)[0]
    pull = jax.eval_shape(lambda v, x: jax.vjp(run, v, x)[1], variables, x_BxD)
    own = {x.size for x in jax.tree.leaves(variables)}  # nested groups them: other shapes, the same arrays
    return sum(4 * x.size for x in jax.tree.leaves(pull) if x.size not in own)


def test_remat_saves_what_it_says():
    """Sixteen layers. full: one carry each; nested: one a group of four; dots: the products, not what follows them."""
    kept = {remat: kept_bytes(remat, 16) for remat in REMAT}
    assert kept["none"] > kept["dots"] > kept["full"] > kept["nested"]
    carry = 4 * B * D
    assert 16 * carry <= kept["full"] < 18 * carry
    assert 4 * carry <= kept["nested"] < 6 * carry


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
def test_remat_is_on(unroll):
    for remat in REMAT:
        stack = Stack(Toy, ToyConfig(), N, remat, unroll)
        jaxpr = str(jax.make_jaxpr(lambda p, s=stack: s.apply({"params": p}, *inputs()))(params()))
        assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (remat != "none")


def test_unknown_remat():
    with pytest.raises(ValueError, match="remat='some' is none of"):
        Stack(Toy, ToyConfig(), N, "some").apply({"params": params()}, *inputs())


def test_layers_start_differently():
    """Each layer by its own key, with the distribution of one layer alone (fan-in 8, not 6 x 8)."""
    p = params()
    assert jax.tree.map(jnp.shape, p)["up"] == {"kernel": (N, D, 4 * D), "bias": (N, 4 * D)}
    kernel_LxDxF = np.asarray(p["up"]["kernel"])
    assert len({kernel_LxDxF[i].tobytes() for i in range(N)}) == N
    np.testing.assert_allclose(kernel_LxDxF.std(), D**-0.5, rtol=0.1)


@pytest.mark.parametrize("remat", ["none", "nested"])
def test_dropout_differs_by_layer(remat):
    stack = Stack(Masks, ToyConfig(), N, remat)
    zeros = jnp.zeros((N, 1, 1))
    variables = stack.init(jax.random.key(0), jnp.ones((B, D)), zeros)
    run = quick.jit(
        lambda key: stack.apply(variables, jnp.ones((B, D)), zeros, deterministic=False, rngs={"dropout": key})[1]
    )
    masks_L = np.asarray(run(jax.random.key(1)))
    assert len({mask.tobytes() for mask in masks_L}) == N
    assert abs((masks_L == 0).mean() - 0.5) < 0.06
    np.testing.assert_array_equal(masks_L, run(jax.random.key(1)))
    assert (masks_L != run(jax.random.key(2))).any()
    assert (stack.apply(variables, jnp.ones((B, D)), zeros)[1] == 1).all()


@pytest.mark.parametrize("remat", ["dots", "full", "nested"])
def test_recomputed_dropout_is_the_same(remat):
    """Were the mask of the recomputation another, gradients would not be those of the forward pass."""

    def gradient(remat):
        stack = Stack(Toy, ToyConfig(dropout=0.5), N, remat)

        def loss(p):
            (x_BxD, _), _ = stack.apply(
                {"params": p}, *inputs(), deterministic=False, rngs={"dropout": jax.random.key(5)}
            )
            return jnp.sin(x_BxD).sum()

        return quick.jit(jax.grad(loss))(params())

    errors = jax.tree.map(quick.relative_error, gradient(remat), gradient("none"))
    assert max(jax.tree.leaves(errors)) < 2e-6


def test_group_count():
    assert {n: group_count(n) for n in (1, 4, 7, 9, 12, 24, 36, 48)} == {
        1: 1,
        4: 2,
        7: 1,
        9: 3,
        12: 3,
        24: 4,
        36: 6,
        48: 6,
    }
    for n in range(1, 100):
        d = group_count(n)
        assert n % d == 0 and d * d <= n and not any(n % e == 0 for e in range(d + 1, int(n**0.5) + 1))


def test_layer_slice():
    one = layer_slice(params(), 2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[2]), one, params())
