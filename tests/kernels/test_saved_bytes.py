"""What an op keeps for its backward pass: the bytes of its docstring, and those of the program that the plan compiles."""

import jax
import jax.numpy as jnp
import pytest

from jaxvram.kernels.attention import attention
from jaxvram.kernels.causal_conv import causal_conv
from jaxvram.kernels.scalar_decay import scalar_decay
from jaxvram.kernels.selective_scan import selective_scan
from jaxvram.kernels.wkv6 import wkv6
from jaxvram.models.retnet import RetNetConfig, places, retain
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

B, T, E, N, W = 2, 1024, 256, 16, 4
H, G, P, M = 4, 1, 64, 128  # heads, groups, values a head and keys of the scalar decay
f32, bf16 = jnp.float32, jnp.bfloat16
spec = jax.ShapeDtypeStruct
CHANNELS, STATES = spec((B, T, E), bf16), spec((B, T, N), bf16)
HEADS = spec((B, T, H, P), bf16)

RETNET = RetNetConfig(n_embd=H * M, n_head=H, d_value=H * P)
PLACES = places(RETNET, jnp.zeros((B, T), jnp.int32), None, None)

CASES = {  # op, arguments, bytes a token as the docstring has them
    "selective_scan": (
        lambda x, dt, A, b, c, D, z: selective_scan(x, dt, A, b, c, D, z)[0],
        (CHANNELS, CHANNELS, spec((E, N), f32), STATES, STATES, spec((E,), f32), CHANNELS),
        E * (3 * 2 + 4 * N / 64) + 2 * 2 * N,  # x, dt, z and a state every 64 steps; B and C
    ),
    "scalar_decay": (
        lambda q, k, v, g, w: scalar_decay(q, k, v, g, w)[0],
        (*[spec((B, T, G, M), bf16)] * 2, spec((B, T, H, P), bf16), *[spec((B, T, H), f32)] * 2),
        H * P * (2 + 2 * 2 * M / (P * H // G) + 2 * 4 / P),
    ),
    "retention": (
        lambda q, k, v, g: retain(q, k, v, g, PLACES, RETNET)[0],
        (*[spec((B, T, H, M), bf16)] * 2, *[spec((B, T, H, P), bf16)] * 2),
        H * P * (4 * M / P + 6) + H * 4 + 16 * M / B,
    ),
    "causal_conv": (
        lambda x, kernel, bias: causal_conv(x, kernel, bias)[0],
        (CHANNELS, spec((W, E), f32), spec((E,), f32)),
        E * 2,
    ),
    "wkv6": (
        lambda r, g, k, v, u: wkv6(r, g, k, v, u)[0],
        (HEADS, spec((B, T, H, P), f32), HEADS, HEADS, spec((H, P), f32)),
        H * P * 10,
    ),
    "wkv6, constant decay": (
        lambda r, g, k, v, u: wkv6(r, g, k, v, u)[0],
        (HEADS, spec((H, P), f32), HEADS, HEADS, spec((H, P), f32)),
        H * P * 6,
    ),
    "attention": (attention, (HEADS,) * 3, H * (4 * 2 * P + 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_kept_for_backward_is_what_the_docstring_says(name):
    """The compiled forward pass, its kept arrays handed out; weights and a convolution's tail are under 1 % of them."""
    op, args, bytes_a_token = CASES[name]

    def forward(*args):
        y, backward = jax.vjp(op, *args)
        return y, jax.tree.leaves(backward)

    compiled = compile_for(cards.find("rtx4070"), forward, args)
    y = jax.eval_shape(op, *args)
    kept = compiled.output_bytes - y.size * y.dtype.itemsize
    assert kept == pytest.approx(B * T * bytes_a_token, rel=0.02)
