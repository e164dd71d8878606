"""The selective scan's bytes: what it keeps, what its gradients need, how its kernels are cut and what their code takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels import selective_scan as op
from jaxvram.kernels import selective_scan_pallas as kernels
from jaxvram.kernels.selective_scan import selective_scan
from jaxvram.vram import cards
from jaxvram.vram.compile import compile_for

NAMES = {"selective_scan_forward", "selective_scan_backward"}

ROWS = {"A_ExN": (8,), "B_BxTxN": (2, 7), "C_BxTxN": (2, 7)}
MANY_STATES = {name: np.zeros((*rows, 99), np.float32) for name, rows in ROWS.items()}


def arguments(B, T, E, N, dtype=jnp.bfloat16):
    """x, dt, A, B, C, D, z."""
    spec, f32 = jax.ShapeDtypeStruct, jnp.float32
    of_channels, of_states = spec((B, T, E), dtype), spec((B, T, N), dtype)
    return of_channels, of_channels, spec((E, N), f32), of_states, of_states, spec((E,), f32), of_channels


def gradients(*args, resets=False, implementation="auto"):
    def loss(*arrays):
        resets_BxT = jnp.zeros(arrays[0].shape[:2], bool) if resets else None
        y, h = selective_scan(*arrays, resets_BxT=resets_BxT, implementation=implementation)
        return y.astype(jnp.float32).sum() + h.sum()

    return jax.value_and_grad(loss, tuple(range(len(args))))


@pytest.mark.parametrize("T", [1, 64, 65, 1000])
def test_kept_for_the_gradients_are_inputs_and_a_state_every_64_steps(T):
    B, E, N = 2, 48, 16
    args = arguments(B, T, E, N)
    inputs = op.Inputs(*args[:6], args[5], jax.ShapeDtypeStruct((B, E, N), jnp.float32), args[6], None)
    kept = {}
    for implementation in ("xla", "interpret"):
        _, (again, states) = jax.eval_shape(functools.partial(op._forward, implementation), inputs)
        assert again == inputs._replace(h_BxExN=None)
        kept[implementation] = states.shape, states.dtype
    assert kept["xla"] == kept["interpret"] == ((B, -(-T // 64), N, E), jnp.float32)


def test_memory_without_kernels_does_not_grow_with_states_times_time():
    """At T = 65,536 all states would be 268 MB; temporaries are a few times the inputs, and so they are at half the T."""

    def temporary(T):
        args = arguments(1, T, 64, 16, jnp.float32)
        compiled = jax.jit(gradients(*args, implementation="xla")).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes, 3 * T * 64 * 4

    (temp, inputs), (half, _) = temporary(65_536), temporary(32_768)
    assert temp < 2 * inputs and temp < 2.1 * half


def test_programs_take_more_channels_where_partial_sums_would_be_large():
    tile = functools.partial(kernels.tile_for, kernels.BACKWARD)
    assert (tile(8, 2048, 1536, 16).columns, tile(8, 2048, 1536, 16).warps) == (32, 1)
    assert (tile(8, 4096, 1536, 16).columns, tile(8, 4096, 1536, 16).warps) == (64, 2)
    assert tile(1, 2**20, 1536, 16).columns == 128  # and no more, whatever they come to
    assert kernels.partial_bytes(tile(8, 2048, 1536, 16), 8, 2048, 1536, 16) == 2 * 4 * 48 * 8 * 2048 * 16
    assert kernels.tile_for(kernels.FORWARD, 1, 2**20, 1536, 16).columns == 32
    assert tile(8, 2048, 1536, 32).warps == 4 * tile(8, 2048, 1536, 32).columns // 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A_ExN": np.zeros((6, 5), np.float32)}, r"A \(6, 5\) for x \(2, 7, 8\), A \(6, 5\); \(8, 5\) belongs"),
        ({"B_BxTxN": np.zeros((2, 7, 3), np.float32)}, r"B \(2, 7, 3\) for"),
        ({"h_BxExN": np.zeros((2, 5, 8), np.float32)}, r"h \(2, 5, 8\) for .*; \(2, 8, 5\) belongs"),
        ({"resets_BxT": np.zeros((7,), bool)}, r"resets \(7,\) for"),
        ({"implementation": "cuda"}, "implementation='cuda' is none of"),
        ({"x_BxTxE": jnp.zeros((2, 7, 8), jnp.float8_e4m3fn), "implementation": "pallas"}, "x: dtype float8_e4m3fn is not"),
        (MANY_STATES | {"implementation": "pallas"}, "A: 99 states a channel are more than the 32"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_told(change, message):
    zeros = lambda *shape: np.zeros(shape, np.float32)
    call = {"x_BxTxE": zeros(2, 7, 8), "dt_BxTxE": zeros(2, 7, 8), "A_ExN": zeros(8, 5)}
    call |= {"B_BxTxN": zeros(2, 7, 5), "C_BxTxN": zeros(2, 7, 5)}
    with pytest.raises(ValueError, match=message):
        selective_scan(**call | change)


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code(card):
    args = arguments(8, 2048, 1536, 16)
    proof.check_machine_code(gradients(*args), args, card, NAMES, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "resets", "dtype"),
    [
        ((2, 1001, 100, 5), True, jnp.bfloat16),
        ((8, 2047, 1536, 16), True, jnp.float32),
        ((1, 65536, 1536, 16), False, jnp.bfloat16),
        ((2, 512, 96, 32), True, jnp.bfloat16),
    ],
)
def test_machine_code_of_odd_sizes(sizes, resets, dtype):
    args = arguments(*sizes, dtype)
    proof.check_machine_code(gradients(*args, resets=resets), args, "rtx4070", NAMES, False)


@pytest.mark.slow
def test_memory_on_a_card():
    """Temporaries of the backward pass at Mamba 130M's 8 x 2048: states, partial sums, scratch, and little else."""
    args = arguments(8, 2048, 1536, 16)
    compiled = compile_for(cards.find("rtx4070"), gradients(*args), args)
    channel = 8 * 2048 * 1536
    scratch = 8 * 1536 * 16 * 4 * 64 // (kernels.APART * kernels.BACKWARD.rows)
    assert compiled.temporary_bytes < 1.1 * (4 * 16 // 64 * channel + 4 * channel + scratch) + 2 * 2 * channel


@pytest.mark.slow
def test_xla_form_compiles_for_a_card():
    args = arguments(1, 300, 64, 16)
    assert compile_for(cards.find("rtx4070"), gradients(*args, implementation="xla"), args, kernels=True).kernels == ()
