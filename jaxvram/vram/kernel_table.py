"""Our kernels at representative shapes, compiled for a card that need not be there: what each takes, and its least time.

Bytes are what must cross the memory bus once; FLOPs are those of the products. Both divided by the card's peaks give the
times that no kernel can beat; the longer one is its limit.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxvram.kernels import (
    attention_pallas,
    bit_linear_pallas,
    grouped_matmul_pallas,
    linear_cross_entropy_pallas,
    nf4,
    nf4_pallas,
    retention_pallas,
    scalar_decay_pallas,
    selective_scan_pallas,
    ternary,
    wkv4_pallas,
    wkv6_pallas,
    wkv7_pallas,
)
from jaxvram.kernels.attention import attention
from jaxvram.kernels.attention_mask import Rule
from jaxvram.kernels.attention_xla import Scores
from jaxvram.kernels.backend import Tile
from jaxvram.kernels.bit_linear import packed_linear
from jaxvram.kernels.grouped_matmul import grouped_matmul
from jaxvram.kernels.linear_cross_entropy import chunk_length, linear_cross_entropy
from jaxvram.kernels.retention import log_gammas, retention_tiled
from jaxvram.kernels.scalar_decay import scalar_decay
from jaxvram.kernels.selective_scan import selective_scan
from jaxvram.kernels.wkv4 import wkv4
from jaxvram.kernels.wkv6 import wkv6
from jaxvram.kernels.wkv7 import wkv7
from jaxvram.vram.cards import Card
from jaxvram.vram.compile import compile_for


@dataclasses.dataclass(frozen=True)
class Work:
    tile: Tile
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """One call, forward and backward, and the work of each kernel in it by name."""

    shape: str
    fn: Callable
    args: tuple
    work: dict[str, Work]


def attention_probe(what: str, B, T, S, H, G, K, *, backward=True, **options) -> Probe:
    """bf16; `options` as `attention` has them."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    q, k = spec(B, T, H, K), spec(B, S, G, K)
    causal, window = options.get("causal", True), options.get("window")
    rule, scores = Rule(causal, window), Scores(K**-0.5, options.get("soft_cap"))
    seen = [min(t + 1, window or S) if causal and T == S else S for t in range(T)]
    pairs, queries, keys, rows = B * H * sum(seen), 2 * B * T * H * K, 2 * B * S * G * K, 4 * B * T * H
    tile = lambda table: attention_pallas.tile_for(table, rule, scores, q, S)
    forward = tile(attention_pallas.FORWARD)
    if T * (H // G) <= attention_pallas.DECODE_ROWS:
        forward = dataclasses.replace(forward, rows=attention_pallas.DECODE_ROWS)
    work = {"flash_attention_forward": Work(forward, 4 * K * pairs, 2 * queries + 2 * keys + rows)}
    attend = lambda q, k, v: attention(q, k, v, **options)
    fn = attend
    if backward:
        reads = 2 * queries + 2 * keys + 2 * rows
        kv, by_q = tile(attention_pallas.BACKWARD_KV), tile(attention_pallas.BACKWARD_Q)
        work["flash_attention_backward_kv"] = Work(kv, 8 * K * pairs, reads + 2 * keys)
        work["flash_attention_backward_q"] = Work(by_q, 6 * K * pairs, reads + queries)
        fn = jax.value_and_grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
    return Probe(f"{what} {B}x{T}{f'->{S}' if S != T else ''}, {H}/{G} heads of {K}", fn, (q, k, k), work)


def cross_entropy_probe(what: str, N, D, V) -> Probe:
    """bf16 hidden states, an fp32 head (V, D) of which a bf16 copy is read."""
    spec, tile = jax.ShapeDtypeStruct, linear_cross_entropy_pallas.TILES[2]
    C = chunk_length(2, 1, N, V)
    head, rows = 2 * V * D, 2 * D + 16
    work = {
        "linear_cross_entropy_statistics": Work(tile, 2 * N * D * V, head + N * rows),
        "linear_cross_entropy_dlogits": Work(tile, 2 * C * D * V, head + C * rows + 2 * C * V),
    }
    fn = jax.value_and_grad(lambda h, w, y: linear_cross_entropy(h, w, y)[0].sum(), (0, 1))
    args = spec((N, D), jnp.bfloat16), spec((V, D), jnp.float32), spec((N,), jnp.int32)
    return Probe(f"{what} {N} x {D}, vocabulary {V} (dlogits: {C} rows)", fn, args, work)


def selective_scan_probe(what: str, B, T, E, N) -> Probe:
    """bf16, gated. It has no products for tensor cores: its limits are bytes, and the exponentials that bytes hide."""
    spec, bf16, f32 = jax.ShapeDtypeStruct, jnp.bfloat16, jnp.float32
    tables = selective_scan_pallas.FORWARD, selective_scan_pallas.BACKWARD
    forward, backward = (selective_scan_pallas.tile_for(table, B, T, E, N) for table in tables)
    channels, tokens, states = B * T * E, B * T * N, 4 * B * -(-T // selective_scan_pallas.CHUNK) * E * N
    partials = selective_scan_pallas.partial_bytes(backward, B, T, E, N)
    work = {
        "selective_scan_forward": Work(forward, 0, 8 * channels + 4 * tokens + states),
        "selective_scan_backward": Work(backward, 0, 14 * channels + 4 * tokens + states + partials),
    }
    args = (
        spec((B, T, E), bf16), spec((B, T, E), bf16), spec((E, N), f32), spec((B, T, N), bf16), spec((B, T, N), bf16),
        spec((E,), f32), spec((B, T, E), bf16),
    )  # fmt: skip
    fn = jax.value_and_grad(lambda *a: selective_scan(*a)[0].astype(f32).sum(), tuple(range(len(args))))
    return Probe(f"{what} {B}x{T}, {E} channels of {N} states", fn, args, work)


def scalar_decay_probe(what: str, B, T, G, H, P, N, *, retention=False) -> Probe:
    """bf16; with weights or, in retention, constant decays. States and their gradients at chunks' ends go through memory."""
    spec, bf16, f32 = jax.ShapeDtypeStruct, jnp.bfloat16, jnp.float32
    v, k, g = spec((B, T, H, P), bf16), spec((B, T, G, N), bf16), spec((B, T, H), f32)
    tiles = scalar_decay_pallas.tiles_for(v, N)
    C, tokens = tiles.states.rows, B * T * H
    values, keys, rows = 2 * tokens * P, 2 * B * T * G * N, 4 * tokens
    states = 2 * B * H * -(-T // C) * N * P
    per_pair, per_state = 2 * tokens * C, 2 * tokens * N * P  # FLOPs of a product of two tokens, by width; with a state
    walk = Work(tiles.states, per_state, values + keys + rows + states)
    outputs = Work(tiles.outputs, per_pair * (N + P) + per_state, 2 * values + 2 * keys + 4 * rows + states)
    forward = Work(tiles.forward, per_pair * (N + P) + 2 * per_state, 2 * values + 2 * keys + 5 * rows)
    by_head = Work(
        tiles.by_head, per_pair * (N + 2 * P + C) + 2 * per_state, 3 * values + 2 * keys + 7 * rows + 2 * states
    )
    by_group = Work(
        tiles.by_group, per_pair * (P + 2 * N * G // H) + 2 * per_state, 2 * values + 4 * keys + 5 * rows + 2 * states
    )
    work = {"forward": forward} if tiles.forward else {"outputs": outputs}
    work |= {"states_from_start": walk, "states_from_end": walk}
    work |= ({"dv": outputs} if retention else {"by_head": by_head}) | {"by_group": by_group}
    work = {f"scalar_decay_{name}": each for name, each in work.items()}
    args, gammas = ((k, k, v), (log_gammas(H),)) if retention else ((k, k, v, g, g), ())
    loss = lambda *a: scalar_decay(*a, *gammas)[0].astype(f32).sum()
    fn = jax.value_and_grad(loss, tuple(range(len(args))))
    return Probe(f"{what} {B}x{T}, {H} heads of {P}, {G} x {N} keys", fn, args, work)


def wkv4_probe(what: str, B, T, D) -> Probe:
    """bf16. No products: its limits are bytes, and what a step waits for the one before."""
    spec, bf16, f32 = jax.ShapeDtypeStruct, jnp.bfloat16, jnp.float32
    forward, backward = wkv4_pallas.FORWARD, wkv4_pallas.BACKWARD
    channels, states = B * T * D, 12 * B * -(-T // backward.rows) * D
    work = {
        "wkv4_forward": Work(forward, 0, 6 * channels),
        "wkv4_states": Work(backward, 0, 4 * channels + states),
        "wkv4_backward": Work(backward, 0, 10 * channels + states),
    }
    args = (spec((D,), f32), spec((D,), f32), spec((B, T, D), bf16), spec((B, T, D), bf16))
    fn = jax.value_and_grad(lambda *a: wkv4(*a)[0].astype(f32).sum(), (0, 1, 2, 3))
    return Probe(f"{what} {B}x{T}, {D} channels", fn, args, work)


def retention_probe(what: str, B, T, H, P, K) -> Probe:
    """bf16, the parallel form by tiles. FLOPs of the blocks that are within the heads' reach."""
    k, v = (jax.ShapeDtypeStruct((B, T, H, width), jnp.bfloat16) for width in (K, P))
    arrays = {"forward": (k, v), "dq": (v, k), "dk": (v, k), "dv": (k, v)}  # what scores are made of, and what is added up
    work = {}
    for name, (x, z) in arrays.items():
        tile = retention_pallas.tile_for(x, z)
        pairs = B * retention_pallas.pairs(log_gammas(H), T, tile.rows) * tile.rows**2
        work[f"retention_{name}"] = Work(tile, 2 * (K + P) * pairs, 4 * B * T * H * (K + P))
    loss = lambda *qkv: retention_tiled(*qkv, log_gammas(H)).astype(jnp.float32).sum()
    return Probe(f"{what} {B}x{T}, {H} heads of {P}, {K} keys", jax.value_and_grad(loss, (0, 1, 2)), (k, k, v), work)


def wkv7_probe(what: str, B, T, H, N) -> Probe:
    """bf16. States and their gradients at the chunks' bounds go through memory in the backward pass."""
    spec, bf16, f32 = jax.ShapeDtypeStruct, jnp.bfloat16, jnp.float32
    channels, C = B * T * H * N, wkv7_pallas.CHUNK
    inputs, state, products = 14, 2 * N // C, (2 * N, 2 * C)  # bytes a channel; FLOPs of a product with a state, in a chunk
    of = lambda tile, states, pairs, count: Work(
        tile, channels * (states * products[0] + pairs * products[1]), channels * (inputs + count)
    )
    work = {
        "wkv7_forward": of(wkv7_pallas.FORWARD, 4, 8, 2),
        "wkv7_states": of(wkv7_pallas.STATES, 3, 4, 2 + state),
        "wkv7_states_back": of(wkv7_pallas.STATES_BACK, 3, 4, 4 + state),
        "wkv7_gradients": of(wkv7_pallas.GRADIENTS, 3, 11, 16 + 2 * state),
        "wkv7_gradients_of_removal": of(wkv7_pallas.GRADIENTS, 2, 7, 18 + 2 * state),
    }
    shape = (B, T, H, N)
    args = tuple(spec(shape, f32 if i == 1 else bf16) for i in range(6))
    fn = jax.value_and_grad(lambda *a: wkv7(*a)[0].astype(f32).sum(), tuple(range(6)))
    return Probe(f"{what} {B}x{T}, {H} heads of {N}", fn, args, work)


def wkv6_probe(what: str, B, T, H, N, *, constant=False) -> Probe:
    """bf16. States and their gradients at the chunks' bounds go through memory in the backward pass; `constant`: decays."""
    spec, bf16, f32 = jax.ShapeDtypeStruct, jnp.bfloat16, jnp.float32
    channels, C = B * T * H * N, wkv6_pallas.GRADIENTS.rows
    x, g, state, pairs = 2, 0 if constant else 4, 2 * N // C, 2 * C / N  # bytes a token and channel
    levels, parts = C.bit_length() - 1, 0 if constant else 2  # products with masks that make an exponent
    of = lambda tile, states, in_chunk, count: Work(
        tile, channels * (states * 2 * N + in_chunk * 2 * C), int(channels * count)
    )
    work = {
        "wkv6_pairs": of(wkv6_pallas.PAIRS, 0, 1 + levels * (1 + parts), 2 * x + g + pairs),
        "wkv6_forward": of(wkv6_pallas.FORWARD, 2, 1 + 3 * parts, 4 * x + g + pairs),
        "wkv6_states": of(wkv6_pallas.STATES, 2, 4 * parts, 4 * x + 2 * g + 2 * state),
        "wkv6_gradients": of(
            wkv6_pallas.GRADIENTS, 3, 3 + levels * (3 + 2 * parts) + 5 * parts, 7 * x + 2 * g + 2 * state
        ),
    }
    decay = (H, N) if constant else (B, T, H, N)
    args = (*(spec(shape, d) for shape, d in (((B, T, H, N), bf16), (decay, f32))), *[spec((B, T, H, N), bf16)] * 2)
    fn = jax.value_and_grad(lambda *a: wkv6(*a)[0].astype(f32).sum(), tuple(range(5)))
    return Probe(f"{what} {B}x{T}, {H} heads of {N}", fn, (*args, spec((H, N), f32)), work)


def nf4_probe(what: str, N, F, D, *, backward=True) -> Probe:
    """bf16. Codes and decoded absmax are read by each block of rows; the rest, of few rows, is next to nothing."""
    rows = jax.ShapeDtypeStruct((N, D), jnp.bfloat16)
    apply = lambda x, w: nf4.nf4_linear(x, w, F)

    def work(plan, width):
        tile, splits = plan
        weights = -(-N // tile.rows) * (F * D // 2 + 4 * F * D // nf4.BLOCK)
        return Work(tile, 2 * N * F * D, weights + 2 * N * (F + D) + (4 * N * width * splits if splits > 1 else 0))

    found = {"nf4_linear_forward": work(nf4_pallas.forward_plan(N, F, D, 2), F)}
    fn = apply
    if backward:
        found["nf4_linear_backward"] = work(nf4_pallas.backward_plan(N, F, D, 2), D)
        fn = jax.value_and_grad(lambda x, w: apply(x, w).astype(jnp.float32).sum())
    return Probe(f"{what} {N} x {D} -> {F}, weights in NF4", fn, (rows, nf4.abstract((F, D))), found)


def grouped_matmul_probe(what: str, N, D, F, E) -> Probe:
    """bf16. Each row meets one matrix; all matrices are read."""
    spec, bf16 = jax.ShapeDtypeStruct, jnp.bfloat16
    tile, rows, matrices = grouped_matmul_pallas.product_tile(N, 2), 2 * N * (D + F), 2 * E * D * F
    product = Work(tile, 2 * N * D * F, rows + matrices)
    work = dict.fromkeys(("grouped_matmul_forward", "grouped_matmul_transposed"), product)
    work["grouped_matmul_gradient"] = dataclasses.replace(product, tile=grouped_matmul_pallas.GRADIENT[2])
    fn = jax.value_and_grad(lambda *a: grouped_matmul(*a).astype(jnp.float32).sum(), (0, 1))
    args = spec((N, D), bf16), spec((E, D, F), bf16), spec((E,), jnp.int32)
    return Probe(f"{what} {N} rows in {E} groups, {D} -> {F}", fn, args, work)


def packed_probe(what: str, N, F, D, storage: str) -> Probe:
    """bf16 in and out; int8 products. Bytes are read by each block of rows, sums written and read once for each split."""
    R = ternary.packed_rows(F, storage)
    tile, splits = bit_linear_pallas.plan(N, R, D)
    moved = -(-N // tile.rows) * R * D + N * D + 4 * N * F * splits
    args = (
        jax.ShapeDtypeStruct((N, D), jnp.bfloat16), jax.ShapeDtypeStruct((R, D), jnp.uint8),
        jax.ShapeDtypeStruct((), jnp.float32),
    )  # fmt: skip
    fn = lambda x, packed, scale: packed_linear(x, packed, scale, F, storage)
    work = {f"packed_linear_{storage}": Work(tile, 2 * N * F * D, moved)}
    return Probe(f"{what} {N} x {D} -> {F}, ternary weights in {storage}", fn, args, work)


def probes() -> list[Probe]:
    return [
        attention_probe("GPT-2", 8, 1024, 1024, 12, 12, 64),
        attention_probe("Llama", 1, 2048, 2048, 32, 8, 128),
        attention_probe("DiT, full", 8, 256, 256, 16, 16, 72, causal=False),
        attention_probe("PixArt, cross", 4, 1024, 120, 16, 16, 72, causal=False),
        attention_probe("Gemma 2, window and cap", 1, 2048, 2048, 8, 4, 256, window=1024, soft_cap=50.0),
        attention_probe("one token to a cache", 1, 1, 8192, 32, 8, 128, backward=False, causal=False),
        cross_entropy_probe("GPT-2", 8192, 768, 50304),
        selective_scan_probe("Mamba 130M", 8, 2048, 1536, 16),
        scalar_decay_probe("Mamba-2 130M", 8, 2048, 1, 24, 64, 128),
        scalar_decay_probe("RetNet medium", 4, 2048, 4, 4, 432, 256, retention=True),
        wkv4_probe("RWKV-4 169M", 8, 1024, 768),
        retention_probe("RetNet medium, short", 16, 512, 4, 432, 256),
        wkv6_probe("RWKV-6", 8, 1024, 12, 64),
        wkv6_probe("RWKV-5, constant decay", 8, 1024, 12, 64, constant=True),
        wkv7_probe("RWKV-7 0.1B", 16, 512, 12, 64),
        grouped_matmul_probe("Grok, 8 experts", 16384, 768, 2048, 8),
        nf4_probe("Llama, one token", 1, 11008, 4096, backward=False),
        nf4_probe("Llama", 64, 11008, 4096),
        packed_probe("BitNet 3B, one token", 1, 8640, 3200, "2bit"),
        packed_probe("BitNet 3B, one token", 1, 8640, 3200, "base3"),
        packed_probe("BitNet 3B", 64, 8640, 3200, "2bit"),
    ]


HEADER = (
    "kernel", "rows x columns", "warps", "loads", "registers", "spill B", "shared KiB", "blocks/SM", "mma", "GFLOP", "MB",
    "bus us", "tensor us",
)  # fmt: skip


def rows_of(probe: Probe, card: Card) -> list[tuple]:
    """A row of HEADER for each kernel of the call."""
    found = compile_for(card, probe.fn, probe.args, kernels=True).kernels
    rows = []
    for name, work in probe.work.items():
        kernel = next(k for k in found if k.name.removeprefix("pallas_").split("__")[0] == name)
        t = work.tile
        rows.append((
            name, f"{t.rows} x {t.columns}", t.warps, t.stages, kernel.registers, kernel.spill_bytes,
            f"{kernel.shared_bytes / 1024:.0f}", kernel.blocks_per_multiprocessor(card), kernel.tensor_core_instructions,
            f"{work.flops / 1e9:.1f}", f"{work.bytes / 1e6:.1f}", f"{work.bytes / card.bandwidth * 1e6:.0f}",
            f"{work.flops / card.tensor_tflops / 1e6:.0f}",
        ))  # fmt: skip
    return rows


def text(card: Card, progress: Callable[[str], None] = lambda _: None) -> str:
    """The table of all probes for `card`."""
    lines = [f"{card.description}: {card.bandwidth / 1e9:.0f} GB/s, {card.tensor_tflops} TFLOP/s in bf16", ""]
    widths = (33, 15, 6, 6, 10, 8, 11, 10, 5, 8, 8, 7, 10)
    format_row = lambda row: "".join(
        f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    for probe in probes():
        progress(f"compiling {probe.shape}")
        lines += [probe.shape, format_row(HEADER), *map(format_row, rows_of(probe, card)), ""]
    return "\n".join(lines)
