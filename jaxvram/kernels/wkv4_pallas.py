"""RWKV-4's recurrence as Pallas kernels (the algebra: wkv4_xla.py): a thread walks along time with the state of one channel.

Tokens come in groups that are unrolled, and a group's numbers are read before its first token. `wkv4_forward` is one walk,
`wkv4_states` the same for the backward pass, which writes the state before each group. `wkv4_backward` takes groups from the
last to the first: through one from its state with the states of all its tokens in registers, and back. Nothing is divided by
a decay, which may be 0.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import Tile
from jaxvram.kernels.wkv4_xla import EMPTY, Gradient, State, advance, back, end_back, packed, read, start_back, unpacked

# Tokens a group x channels a program. Programs of one warp: 8 x 768 channels make 192, for 46 multiprocessors. A group of
# the backward pass is from one state that `wkv4_states` writes to the next; of 16 it spilt nothing either, and took three
# times as long to compile.
FORWARD, BACKWARD = Tile(16, 32, 1, 1), Tile(8, 32, 1, 1)


class _Program:
    """One program's channels, and the tokens of its sequence."""

    def __init__(self, w_ref, u_ref, k_ref, v_ref, resets_ref, tile: Tile):
        (self.T, D), self.R = k_ref.shape, tile.rows
        first = pl.program_id(0) * tile.columns
        self.channels = pl.ds(first, tile.columns)
        self.inside = first + jnp.arange(tile.columns) < D if D % tile.columns else None
        self.k_ref, self.v_ref, self.resets_ref = k_ref, v_ref, resets_ref
        self.w, self.u = self.load(w_ref), self.load(u_ref)

    @property
    def groups(self) -> int:
        return pl.cdiv(self.T, self.R)

    def load(self, ref, *at):
        return backend.load(ref.at[(*at, self.channels)], mask=self.inside).astype(jnp.float32)

    def store(self, ref, value, *at, there=None):
        mask = self.inside
        if there is not None:
            there = jnp.broadcast_to(there, value.shape)
            mask = there if mask is None else mask & there
        backend.store(ref.at[(*at, self.channels)], value, mask=mask)

    def load_state(self, ref, *at) -> State:
        return State(*(self.load(ref, *at, jnp.int32(i)) for i in range(3)))  # plain numbers fail in the interpreter

    def store_state(self, ref, s, *at) -> None:
        for i, value in enumerate(s):
            self.store(ref, value, *at, jnp.int32(i))

    def steps(self, group):
        """[(token, whether there is such a one; None: surely)]; the token is always inside."""
        steps = [group * self.R + r for r in range(self.R)]
        if self.T % self.R == 0:
            return [(t, None) for t in steps]
        return [(jnp.minimum(t, self.T - 1), t < self.T) for t in steps]

    def tokens(self, steps):
        """[(w, k, v, whether a document begins)]: one that is not there changes nothing."""
        read = [(self.load(self.k_ref, t), self.load(self.v_ref, t)) for t, _ in steps]
        resets = [None if self.resets_ref is None else backend.load(self.resets_ref.at[t]) != 0 for t, _ in steps]
        return [
            (only(there, self.w), only(there, k, EMPTY), v, None if reset is None else only(there, reset, False))
            for (k, v), reset, (_, there) in zip(read, resets, steps, strict=True)
        ]


def only(there, value, otherwise=0.0):
    return value if there is None else jnp.where(there, value, otherwise)


def _counting(s: State, reset) -> State:
    """The state that a token finds."""
    return s if reset is None else s._replace(p=jnp.where(reset, EMPTY, s.p))


def _split(refs, inputs: int, resets: bool):
    """(references of the inputs behind k and v, resets' or None, those of the outputs)."""
    return refs[:inputs], refs[inputs] if resets else None, refs[inputs + resets :]


def _forward_kernel(w_ref, u_ref, k_ref, v_ref, *refs, tile, resets):
    (s_ref,), resets_ref, (y_ref, last_ref) = _split(refs, 1, resets)
    program = _Program(w_ref, u_ref, k_ref, v_ref, resets_ref, tile)

    def of_group(group, s):
        steps = program.steps(group)
        found = []
        for w, k, v, reset in program.tokens(steps):
            s = _counting(s, reset)
            found.append(read(s, program.u, k, v)[0])
            s = advance(s, w, k, v)
        for (t, there), y in zip(steps, found, strict=True):
            program.store(y_ref, y, t, there=there)
        return s

    program.store_state(last_ref, jax.lax.fori_loop(0, program.groups, of_group, program.load_state(s_ref)))


def _states_kernel(w_ref, u_ref, k_ref, v_ref, *refs, tile, resets):
    (s_ref,), resets_ref, (states_ref,) = _split(refs, 1, resets)
    program = _Program(w_ref, u_ref, k_ref, v_ref, resets_ref, tile)

    def of_group(group, s):
        program.store_state(states_ref, s, group)
        for w, k, v, reset in program.tokens(program.steps(group)):
            s = advance(_counting(s, reset), w, k, v)
        return s

    jax.lax.fori_loop(0, program.groups, of_group, program.load_state(s_ref))


def _backward_kernel(w_ref, u_ref, k_ref, v_ref, *refs, tile, resets):
    inputs, resets_ref, (dw_ref, du_ref, dk_ref, dv_ref, first_ref) = _split(refs, 4, resets)
    states_ref, last_ref, dy_ref, ds_ref = inputs
    program = _Program(w_ref, u_ref, k_ref, v_ref, resets_ref, tile)

    def of_group(i, carry):
        group = program.groups - 1 - i
        steps, s, before = program.steps(group), program.load_state(states_ref, group), []
        dy = [only(there, program.load(dy_ref, t)) for t, there in steps]
        tokens = program.tokens(steps)
        for w, k, v, reset in tokens:
            before.append(_counting(s, reset))
            s = advance(before[-1], w, k, v)
        g, dw_sum, du_sum = carry
        for r in reversed(range(program.R)):
            (w, k, v, _), (t, there) = tokens[r], steps[r]
            g, (dk, dv, dw, du) = back(g, before[r], w, program.u, k, v, dy[r])
            program.store(dk_ref, dk, t, there=there)
            program.store(dv_ref, dv, t, there=there)
            dw_sum, du_sum = dw_sum + only(there, dw), du_sum + du
        return g, dw_sum, du_sum

    zeros = jnp.zeros(tile.columns, jnp.float32)
    g = start_back(program.load_state(last_ref), *program.load_state(ds_ref))
    g, dw, du = jax.lax.fori_loop(0, program.groups, of_group, (g, zeros, zeros))
    program.store(dw_ref, dw)
    program.store(du_ref, du)
    program.store_state(first_ref, g)


def _call(kernel, w_D, u_D, arrays, resets_BxT, outputs, tile: Tile, interpret: bool, name: str):
    """A program has a few channels of one sequence; it is shown all of that."""
    B, D = arrays[0].shape[0], w_D.shape[0]
    spec = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda d, b: (b, *(0,) * (len(x.shape) - 1)))
    weights = [pl.BlockSpec((D,), lambda d, b: (0,))] * 2
    arrays = [*arrays, *([] if resets_BxT is None else [resets_BxT.astype(jnp.int32)])]
    return backend.call(
        functools.partial(kernel, tile=tile, resets=resets_BxT is not None),
        grid=(pl.cdiv(D, tile.columns), B),
        in_specs=[*weights, *map(spec, arrays)],
        out_specs=[*map(spec, outputs)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        tile=tile, interpret=interpret, name=name,
    )(w_D, u_D, *arrays)  # fmt: skip


def forward(w_D, u_D, k_BxTxD, v_BxTxD, s_Bx3xD, resets_BxT, *, interpret: bool):
    """(y_BxTxD in the dtype of v, the last state)."""
    arrays, outputs = [k_BxTxD, v_BxTxD, s_Bx3xD], [v_BxTxD, s_Bx3xD]
    return tuple(_call(_forward_kernel, w_D, u_D, arrays, resets_BxT, outputs, FORWARD, interpret, "wkv4_forward"))


def backward(w_D, u_D, k_BxTxD, v_BxTxD, s_Bx3xD, resets_BxT, last_Bx3xD, dy_BxTxD, ds_Bx3xD, *, interpret: bool):
    """(dw_D, du_D, dk_BxTxD, dv_BxTxD, ds_Bx3xD)."""
    B, T, D = k_BxTxD.shape
    call = lambda kernel, arrays, outputs, tile, name: _call(
        kernel, w_D, u_D, [k_BxTxD, v_BxTxD, *arrays], resets_BxT, outputs, tile, interpret, name
    )
    states = jax.ShapeDtypeStruct((B, pl.cdiv(T, BACKWARD.rows), 3, D), jnp.float32)
    (states_Bxcx3xD,) = call(_states_kernel, [s_Bx3xD], [states], BACKWARD, "wkv4_states")
    arrays, sums = [states_Bxcx3xD, last_Bx3xD, dy_BxTxD, ds_Bx3xD], jax.ShapeDtypeStruct((B, D), jnp.float32)
    outputs = [sums, sums, k_BxTxD, v_BxTxD, s_Bx3xD]
    dw_BxD, du_BxD, dk, dv, g_Bx3xD = call(_backward_kernel, arrays, outputs, BACKWARD, "wkv4_backward")
    return dw_BxD.sum(0), du_BxD.sum(0), dk, dv, packed(end_back(unpacked(s_Bx3xD), Gradient(*unpacked(g_Bx3xD))))
