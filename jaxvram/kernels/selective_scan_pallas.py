"""The selective scan as Pallas kernels: each program walks along time with the states of one sequence's few channels.

The states are a tile (N, E) in registers. Triton gives a thread every fourth state of 4 channels, which is the cheapest for
sums over N and over E together: 48 shuffles a warp and step backward, where whole columns of states would take 160. Steps
come in groups that are unrolled; a group's rows are read before its first step.

Forward: one walk, which leaves the state before every chunk. Backward, chunk by chunk from the last: walk through the chunk
from its saved state, leaving the state before every other group in scratch memory; then group by group from the last: walk
through it with decays and states in registers, and back with the gradient g of the state,
  g_t = C_t dy_t + decay_{t+1} g_{t+1};   with a_t = decay_t h_{t-1}, u_t = delta_t x_t:
  dC_t = sum_e h_t dy_t;  dB_t = sum_e g_t u_t;  s_t = sum_n g_t B_t;  dx_t = delta_t s_t + D dy_t;
  ddelta_t = x_t s_t + sum_n g_t a_t A;  dA = sum_t g_t a_t delta_t.
A state is never divided by a decay, which may be 0. The sums over channels, dB and dC, leave a program as partial sums, and
XLA adds them up: 8 N / E_p bytes a token and channel with E_p channels a program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import LOG2_E, Tile
from jaxvram.kernels.selective_scan_xla import CHUNK, Inputs, discretise

# Steps a group x channels a program: one warp for 32 channels of up to 16 states. Few channels make many programs, which
# 8 x 1536 channels are for 46 multiprocessors: 384 of one warp, 8 side by side. Found by compiling for sm_89: the longest
# groups that spill nothing.
FORWARD = Tile(8, 32, 1, 1)
BACKWARD = Tile(2, 32, 1, 1)
STATES_PER_THREAD = 8  # where there are more than 16
APART = 2  # groups from one state in scratch memory to the next, so that all programs' scratch stays in the L2 cache
PARTIALS_BUDGET = 128 * 2**20  # bytes of dB's and dC's partial sums, above which a program takes more channels
MOST_CHANNELS = 128
MOST_STATES = 32


def tile_for(table: Tile, B: int, T: int, E: int, N: int) -> Tile:
    """`table`: FORWARD or BACKWARD; more warps for more states, and backward as many channels as the budget asks for."""
    more = 1 if padded(N) <= 16 else padded(N) // STATES_PER_THREAD
    tile = dataclasses.replace(table, warps=table.warps * more, rows=table.rows if more == 1 else max(2, table.rows // 2))
    while table is BACKWARD and tile.columns < MOST_CHANNELS and partial_bytes(tile, B, T, E, N) > PARTIALS_BUDGET:
        tile = dataclasses.replace(tile, columns=2 * tile.columns, warps=2 * tile.warps)
    return tile


def partial_bytes(tile: Tile, B: int, T: int, E: int, N: int) -> int:
    return 2 * 4 * pl.cdiv(E, tile.columns) * B * T * N


def padded(N: int) -> int:
    return 1 << (N - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What of a call is known when its kernel is built."""

    T: int
    E: int
    N: int
    tile: Tile
    gated: bool
    resets: bool

    @property
    def groups(self) -> int:
        """Of a whole chunk."""
        return CHUNK // self.tile.rows


class _Program:
    """One program's view of the arrays: its channels, its states, and which steps there are."""

    def __init__(self, cut: _Cut):
        self.cut, self.first = cut, pl.program_id(0) * cut.tile.columns
        self.channels = pl.ds(self.first, cut.tile.columns)
        # JAX 0.12 refuses a constant slice that ends beyond the array, mask or not; it cannot object to a computed one.
        self.states = pl.ds(pl.program_id(0) * 0, padded(cut.N))
        self.E_inside = self.first + jnp.arange(cut.tile.columns) < cut.E if cut.E % cut.tile.columns else None
        self.N_inside = jnp.arange(padded(cut.N)) < cut.N if padded(cut.N) > cut.N else None

    def _mask(self, rows: bool, channels: bool, valid=None):
        """Of an (N, E) tile, an (N,) or an (E,) vector."""
        if rows and channels:
            inside = None if self.N_inside is None else self.N_inside[:, None]
            if self.E_inside is not None:
                inside = self.E_inside[None, :] if inside is None else inside & self.E_inside[None, :]
            return None if inside is None else jnp.broadcast_to(inside, (padded(self.cut.N), self.cut.tile.columns))
        inside, count = (self.N_inside, padded(self.cut.N)) if rows else (self.E_inside, self.cut.tile.columns)
        valid = None if valid is None else jnp.broadcast_to(valid, (count,))
        return inside if valid is None else valid if inside is None else inside & valid

    def tile(self, ref, *at):
        """(N, E) in fp32."""
        return backend.load(ref.at[(*at, self.states, self.channels)], mask=self._mask(True, True)).astype(jnp.float32)

    def put_tile(self, ref, value, *at):
        backend.store(ref.at[(*at, self.states, self.channels)], value, mask=self._mask(True, True))

    def of_channels(self, ref, *at):
        return backend.load(ref.at[(*at, self.channels)], mask=self._mask(False, True)).astype(jnp.float32)

    def put_channels(self, ref, value, *at, valid=None):
        backend.store(ref.at[(*at, self.channels)], value, mask=self._mask(False, True, valid))

    def of_states(self, ref, *at):
        return backend.load(ref.at[(*at, self.states)], mask=self._mask(True, False)).astype(jnp.float32)

    def put_states(self, ref, value, *at, valid=None):
        backend.store(ref.at[(*at, self.states)], value, mask=self._mask(True, False, valid))

    def steps(self, start):
        """[(t, whether there is such a step; None: surely)] of the group that starts there; t is always inside."""
        steps = [start + r for r in range(self.cut.tile.rows)]
        if self.cut.T % self.cut.tile.rows == 0:
            return [(t, None) for t in steps]
        return [(jnp.minimum(t, self.cut.T - 1), t < self.cut.T) for t in steps]

    def groups_of(self, chunk):
        """How many groups this chunk has."""
        if self.cut.T % CHUNK == 0:
            return self.cut.groups
        return jnp.minimum(self.cut.groups, pl.cdiv(self.cut.T - chunk * CHUNK, self.cut.tile.rows))


def _only(valid, value, otherwise=0.0):
    return value if valid is None else jnp.where(valid, value, otherwise)


class _Recurrence:
    """What both kernels need of a group of steps: delta, x and B of each, and how they move the state."""

    def __init__(self, program: _Program, A_ref, bias_ref, x_ref, dt_ref, B_ref, keep_refs):
        self.program, self.x_ref, self.dt_ref, self.B_ref = program, x_ref, dt_ref, B_ref
        self.keep_refs = keep_refs
        self.A_NxE = program.tile(A_ref) * LOG2_E  # decays are powers of two, which the hardware has
        self.bias_E = program.of_channels(bias_ref)

    def read(self, steps):
        """[(delta_E, its slope, x_E, B_N, keep)]: a step that is not there has delta 0, which leaves the state as it is."""
        rows = [
            (self.program.of_channels(self.dt_ref, t), self.program.of_channels(self.x_ref, t),
             self.program.of_states(self.B_ref, t), *(backend.load(ref.at[t]) for ref in self.keep_refs))
            for t, _ in steps
        ]  # fmt: skip
        read = []
        for (dt_E, x_E, B_N, *keep), (_, valid) in zip(rows, steps, strict=True):
            delta_E, slope_E = discretise(dt_E + self.bias_E)
            keep = [_only(valid, k, 1.0) for k in keep]
            read.append((_only(valid, delta_E), _only(valid, slope_E), x_E, B_N, *keep))
        return read

    def decay(self, delta_E, keep):
        decay_NxE = jnp.exp2(delta_E[None, :] * self.A_NxE)
        return decay_NxE * keep[0] if keep else decay_NxE

    def advance(self, h_NxE, row):
        delta_E, _, x_E, B_N, *keep = row
        return self.decay(delta_E, keep) * h_NxE + (delta_E * x_E)[None, :] * B_N[:, None]


def _forward_kernel(x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, bias_ref, h_ref, *refs, cut):
    z_ref, keep_refs, (y_ref, states_ref, last_ref) = _optional(cut, refs)
    program = _Program(cut)
    recurrence = _Recurrence(program, A_ref, bias_ref, x_ref, dt_ref, B_ref, keep_refs)
    D_E = program.of_channels(D_ref)

    def of_group(start, h_NxE):
        steps = program.steps(start)
        C_RxN = [program.of_states(C_ref, t) for t, _ in steps]
        z_RxE = [program.of_channels(z_ref, t) for t, _ in steps] if cut.gated else None
        y_RxE = []
        for r, row in enumerate(recurrence.read(steps)):
            h_NxE = recurrence.advance(h_NxE, row)
            y_E = (C_RxN[r][:, None] * h_NxE).sum(axis=0) + D_E * row[2]
            y_RxE.append(y_E * z_RxE[r] * jax.nn.sigmoid(z_RxE[r]) if cut.gated else y_E)
        for (t, valid), y_E in zip(steps, y_RxE, strict=True):
            program.put_channels(y_ref, y_E, t, valid=valid)
        return h_NxE

    def of_chunk(c, h_NxE):
        program.put_tile(states_ref, h_NxE, c)
        step = lambda k, h_NxE: of_group(c * CHUNK + k * cut.tile.rows, h_NxE)
        return jax.lax.fori_loop(0, program.groups_of(c), step, h_NxE)

    program.put_tile(last_ref, jax.lax.fori_loop(0, pl.cdiv(cut.T, CHUNK), of_chunk, program.tile(h_ref)))


def _optional(cut: _Cut, refs):
    """(z's, [keep's], the rest) of references that begin with those of arrays that a call may not have."""
    z_refs, refs = refs[: cut.gated], refs[cut.gated :]
    return z_refs[0] if z_refs else None, refs[: cut.resets], refs[cut.resets :]


def _walk_back(program: _Program, recurrence, D_E, C_ref, dy_ref, z_ref, dx_ref, ddt_ref, dB_ref, dC_ref, dz_refs):
    """`(first step of a group, the state before it, carry) -> carry`: through the group and back."""
    cut, R = program.cut, program.cut.tile.rows

    def back_through_step(t, valid, row, a_NxE, decay_NxE, carry, C_N, dy_E, z_E):
        g_NxE, dA_NxE, dD_E, dbias_E = carry
        delta_E, slope_E, x_E, B_N, *_ = row
        u_E, dy_E = delta_E * x_E, _only(valid, dy_E)
        h_NxE = a_NxE + u_E[None, :] * B_N[:, None]
        if cut.gated:
            sigmoid_E = jax.nn.sigmoid(z_E)
            y_E = (C_N[:, None] * h_NxE).sum(axis=0) + D_E * x_E
            dz_E = dy_E * y_E * sigmoid_E * (1 + z_E * (1 - sigmoid_E))
            program.put_channels(dz_refs[0], dz_E, t, valid=valid)
            dy_E = dy_E * z_E * sigmoid_E
        g_NxE += C_N[:, None] * dy_E[None, :]
        program.put_states(dC_ref, (h_NxE * dy_E[None, :]).sum(axis=1), t, valid=valid)
        program.put_states(dB_ref, (g_NxE * u_E[None, :]).sum(axis=1), t, valid=valid)
        s_E = (g_NxE * B_N[:, None]).sum(axis=0)
        ga_NxE = g_NxE * a_NxE
        ddt_E = (x_E * s_E + (ga_NxE * recurrence.A_NxE).sum(axis=0) * (1 / LOG2_E)) * slope_E
        program.put_channels(dx_ref, delta_E * s_E + D_E * dy_E, t, valid=valid)
        program.put_channels(ddt_ref, ddt_E, t, valid=valid)
        return g_NxE * decay_NxE, dA_NxE + ga_NxE * delta_E[None, :], dD_E + dy_E * x_E, dbias_E + ddt_E

    def back_through_group(start, h_NxE, carry):
        steps = program.steps(start)
        C_RxN = [program.of_states(C_ref, t) for t, _ in steps]
        dy_RxE = [program.of_channels(dy_ref, t) for t, _ in steps]
        z_RxE = [program.of_channels(z_ref, t) for t, _ in steps] if cut.gated else [None] * R
        rows, moves = recurrence.read(steps), []
        for delta_E, _, x_E, B_N, *keep in rows:
            decay_NxE = recurrence.decay(delta_E, keep)
            moves.append((decay_NxE * h_NxE, decay_NxE))
            h_NxE = moves[-1][0] + (delta_E * x_E)[None, :] * B_N[:, None]
        for r in reversed(range(R)):
            carry = back_through_step(*steps[r], rows[r], *moves[r], carry, C_RxN[r], dy_RxE[r], z_RxE[r])
        return carry

    return back_through_group


def _backward_kernel(
    x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, bias_ref, states_ref, dy_ref, dlast_ref, *refs, cut, interpret
):
    z_ref, keep_refs, refs = _optional(cut, refs)
    dx_ref, ddt_ref, dA_ref, dB_ref, dC_ref, dD_ref, dbias_ref, dh_ref, scratch_ref, *dz_refs = refs
    program, R = _Program(cut), cut.tile.rows
    recurrence, D_E = _Recurrence(program, A_ref, bias_ref, x_ref, dt_ref, B_ref, keep_refs), program.of_channels(D_ref)
    outputs = dx_ref, ddt_ref, dB_ref, dC_ref, dz_refs
    back_through_group = _walk_back(program, recurrence, D_E, C_ref, dy_ref, z_ref, *outputs)

    def of_chunk(i, carry):
        c = pl.cdiv(cut.T, CHUNK) - 1 - i
        groups = program.groups_of(c)

        def onward(k, h_NxE):
            for row in recurrence.read(program.steps(c * CHUNK + k * R)):
                h_NxE = recurrence.advance(h_NxE, row)
            return h_NxE

        def leave(j, h_NxE):
            program.put_tile(scratch_ref, h_NxE, j)
            return jax.lax.fori_loop(j * APART, jnp.minimum((j + 1) * APART, groups - 1), onward, h_NxE)

        def back(i, carry):
            k = groups - 1 - i
            h_NxE = jax.lax.fori_loop(k // APART * APART, k, onward, program.tile(scratch_ref, k // APART))
            return back_through_group(c * CHUNK + k * R, h_NxE, carry)

        barrier = (lambda: None) if interpret else backend.barrier
        barrier()  # threads may read what others wrote, and write where others read
        jax.lax.fori_loop(0, pl.cdiv(groups, APART), leave, program.tile(states_ref, c))
        barrier()
        return jax.lax.fori_loop(0, groups, back, carry)

    zeros_E = jnp.zeros(cut.tile.columns, jnp.float32)
    carry = program.tile(dlast_ref), jnp.zeros((padded(cut.N), cut.tile.columns), jnp.float32), zeros_E, zeros_E
    dh_NxE, dA_NxE, dD_E, dbias_E = jax.lax.fori_loop(0, pl.cdiv(cut.T, CHUNK), of_chunk, carry)
    program.put_tile(dh_ref, dh_NxE)
    program.put_tile(dA_ref, dA_NxE)
    program.put_channels(dD_ref, dD_E)
    program.put_channels(dbias_ref, dbias_E)


def _of_sequence(array) -> pl.BlockSpec:
    rest = (0,) * (len(array.shape) - 1)
    return pl.BlockSpec((None, *array.shape[1:]), lambda e, b: (b, *rest))


def _shared(array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda e, b: (0,) * len(array.shape))


def _arrays(inputs: Inputs):
    """(arrays, block specs) of what both kernels read, and (those that a call may not have)."""
    x, dt, A_ExN, B, C, D, bias, _, z, resets = inputs
    shared = [(a, _shared(a)) for a in (A_ExN.T, D, bias)]
    of_sequence = [(a, _of_sequence(a)) for a in (x, dt, B, C)]
    keep = () if resets is None else (1.0 - resets.astype(jnp.float32),)
    optional = [(a, _of_sequence(a)) for a in ((() if z is None else (z,)) + keep)]
    (x, dt, B, C), (A, D, bias) = of_sequence, shared
    return [x, dt, A, B, C, D, bias], optional


def _cut(inputs: Inputs, table: Tile) -> _Cut:
    (B, T, E), N = inputs.x_BxTxE.shape, inputs.A_ExN.shape[1]
    return _Cut(T, E, N, tile_for(table, B, T, E, N), inputs.z_BxTxE is not None, inputs.resets_BxT is not None)


def forward(inputs: Inputs, *, interpret: bool):
    """(y_BxTxE in the dtype of x, h_BxExN after the last token, the states before each chunk (B, chunks, N, E))."""
    cut = _cut(inputs, FORWARD)
    B, f32 = inputs.x_BxTxE.shape[0], jnp.float32
    read, optional = _arrays(inputs)
    h_BxNxE = inputs.h_BxExN.swapaxes(1, 2)
    arrays, specs = zip(*read, (h_BxNxE, _of_sequence(h_BxNxE)), *optional, strict=True)
    out_shape = [
        jax.ShapeDtypeStruct(inputs.x_BxTxE.shape, inputs.x_BxTxE.dtype),
        jax.ShapeDtypeStruct((B, pl.cdiv(cut.T, CHUNK), cut.N, cut.E), f32),
        jax.ShapeDtypeStruct((B, cut.N, cut.E), f32),
    ]
    y_BxTxE, states_BxcxNxE, last_BxNxE = backend.call(
        functools.partial(_forward_kernel, cut=cut),
        grid=(pl.cdiv(cut.E, cut.tile.columns), B),
        in_specs=list(specs),
        out_specs=[_of_sequence(a) for a in out_shape],
        out_shape=out_shape,
        tile=cut.tile, interpret=interpret, name="selective_scan_forward",
    )(*arrays)  # fmt: skip
    return y_BxTxE, last_BxNxE.swapaxes(1, 2), states_BxcxNxE


def backward(inputs: Inputs, states_BxcxNxE, dy_BxTxE, dlast_BxExN, *, interpret: bool) -> Inputs:
    """The gradients of `inputs`, those of weights in fp32; None for the resets."""
    cut = _cut(inputs, BACKWARD)
    (B, T, E), N, f32 = inputs.x_BxTxE.shape, cut.N, jnp.float32
    blocks = pl.cdiv(E, cut.tile.columns)
    read, optional = _arrays(inputs)
    more = [(a, _of_sequence(a)) for a in (states_BxcxNxE, dy_BxTxE, dlast_BxExN.swapaxes(1, 2))]
    arrays, specs = zip(*read, *more, *optional, strict=True)
    like = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)
    sums = lambda *shape: jax.ShapeDtypeStruct((B, *shape), f32)
    partial = jax.ShapeDtypeStruct((blocks, B, T, N), f32)
    of_block = pl.BlockSpec((None, None, T, N), lambda e, b: (e, b, 0, 0))
    scratch = sums(pl.cdiv(cut.groups, APART), N, E)
    out = [like(inputs.x_BxTxE), like(inputs.dt_BxTxE), sums(N, E), partial, partial, sums(E), sums(E), sums(N, E), scratch]
    out += [like(inputs.z_BxTxE)] if cut.gated else []
    dx, ddt, dA_BxNxE, dB, dC, dD_BxE, dbias_BxE, dh_BxNxE, _, *dz = backend.call(
        functools.partial(_backward_kernel, cut=cut, interpret=interpret),
        grid=(blocks, B),
        in_specs=list(specs),
        out_specs=[of_block if a is partial else _of_sequence(a) for a in out],
        out_shape=out,
        tile=cut.tile, interpret=interpret, name="selective_scan_backward",
    )(*arrays)  # fmt: skip
    return Inputs(
        dx, ddt, dA_BxNxE.sum(0).T, dB.sum(0).astype(inputs.B_BxTxN.dtype), dC.sum(0).astype(inputs.C_BxTxN.dtype),
        dD_BxE.sum(0), dbias_BxE.sum(0), dh_BxNxE.swapaxes(1, 2), dz[0] if dz else None, None,
    )  # fmt: skip
