"""Tiles of the scalar-decay kernels, and how they read and write them where these hang over the edge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxvram.kernels import backend
from jaxvram.kernels.backend import Tile

KEYS = 64  # of the state at a time: an operand as wide as a whole key would not fit in registers
WALKED = 128  # of the state that one program of `states` walks with; of more, each has a block


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens x values. Found by compiling for sm_89: the largest that spill nothing.

    Warps: Triton gives the warps of chained products rows of 16 each, so that more than tokens / 16 would repeat the work.
    """

    forward: Tile | None  # None: `states`, then `outputs`
    states: Tile  # as many tokens as those that follow
    by_head: Tile
    by_group: Tile
    outputs: Tile


BF16 = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 16, 4, 1), Tile(64, 32, 4, 1), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(64, 32, 4, 1), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(64, 64, 4, 2)),
    256: Tiles(None, Tile(64, 64, 4, 2), Tile(64, 32, 4, 1), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
}
# bf16: masks at the edges take registers, and so does a loop over values
UNEVEN = Tiles(*[Tile(32, 32, 4, 1)] * 5)
WIDE = dataclasses.replace(UNEVEN, by_head=Tile(32, 16, 4, 1))
FP32 = {
    64: Tiles(Tile(32, 16, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: Tiles(None, Tile(32, 16, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}


def tiles_for(v_BxTxHxP, N: int) -> Tiles:
    (_, T, _, P), table = v_BxTxHxP.shape, FP32 if v_BxTxHxP.dtype == jnp.float32 else BF16
    tiles = table[max(64, backend.power_of_two(N))]
    if table is BF16 and (N % 64 or (N <= WALKED and (T % 64 or P not in (32, 64)))):
        tiles = dataclasses.replace(WIDE if P > 64 else UNEVEN, **({} if N <= WALKED else {"forward": None}))
    fit = lambda tile: tile and dataclasses.replace(tile, columns=min(tile.columns, backend.power_of_two(P)))
    return Tiles(*(fit(getattr(tiles, field.name)) for field in dataclasses.fields(Tiles)))


@dataclasses.dataclass(frozen=True)
class Span:
    """`count` places from `start` along an axis of `size`, which they may hang over."""

    start: int | jax.Array
    count: int
    size: int

    @property
    def at(self):
        return pl.ds(self.start, self.count)

    def inside(self, axis: int):
        """None where all are."""
        if self.size % self.count == 0:
            return None
        return jnp.expand_dims(self.start + jnp.arange(self.count) < self.size, 1 - axis)


def block_of(i, N: int) -> Span:
    """Block i of the keys."""
    width = min(KEYS, backend.power_of_two(N))
    # JAX 0.12 refuses a constant slice that ends beyond the array, mask or not; it cannot object to a computed one.
    start = i * width + (pl.program_id(0) * 0 if isinstance(i, int) and N % width else 0)
    return Span(start, width, N)


def blocks_of(N: int) -> list[Span]:
    return [block_of(i, N) for i in range(pl.cdiv(N, KEYS))]


def walkers(N: int) -> int:
    """Programs of `states` that share a state's keys."""
    return 1 if N <= WALKED else pl.cdiv(N, KEYS)


def _mask(rows: Span, columns: Span):
    masks = [mask for mask in (rows.inside(0), columns.inside(1)) if mask is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (rows.count, columns.count)) if masks else None


def load(ref, rows: Span, columns: Span, *, first=(), head=()):
    """A tile of a matrix; `first` and `head` are the places before and between its axes, where `ref` has more."""
    return backend.load(ref.at[(*first, rows.at, *head, columns.at)], mask=_mask(rows, columns))


def store(ref, rows: Span, columns: Span, value, *, first=(), head=()) -> None:
    backend.store(ref.at[(*first, rows.at, *head, columns.at)], value, mask=_mask(rows, columns))
