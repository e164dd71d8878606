"""Our kernels on the GPU of this machine, beside XLA and cuDNN: correct first, then time, as ratios.

  python benchmarks/kernels.py [--out=benchmarks/results/kernels_CARD.json]      # --minutes=7 at the most
  python benchmarks/kernels.py --only='wkv|retention'                            # these; the file keeps its other rows

Attention, forward and forward + backward: ours, the XLA path, and jax.nn.dot_product_attention(implementation='cudnn').
Linear cross-entropy, Mamba's selective scan, Mamba-2's chunks, the recurrences of RWKV, products with NF4 and with packed
ternary weights, the same: ours, and the XLA path. Retention: both our forms, whichever `retention` would take at that
length, and the XLA path. Grouped products of a mixture of experts: jax.lax.ragged_dot as well. Nothing is timed whose result
differs from the definition's in fp32 by more than bf16 explains. The sides take turns, each turn long enough to swamp a
launch; a ratio is taken within a round.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxvram.kernels import ternary  # noqa: E402
from jaxvram.kernels.attention import attention, attention_reference  # noqa: E402
from jaxvram.kernels.bit_linear import mixed, packed_linear  # noqa: E402
from jaxvram.kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference  # noqa: E402
from jaxvram.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference  # noqa: E402
from jaxvram.kernels.nf4 import nf4_linear, nf4_linear_reference, quantize  # noqa: E402
from jaxvram.kernels.retention import log_gammas, retention_parallel, retention_tiled  # noqa: E402
from jaxvram.kernels.scalar_decay import scalar_decay, scalar_decay_reference  # noqa: E402
from jaxvram.kernels.selective_scan import selective_scan, selective_scan_reference  # noqa: E402
from jaxvram.kernels.wkv4 import wkv4, wkv4_reference  # noqa: E402
from jaxvram.kernels.wkv6 import wkv6, wkv6_reference  # noqa: E402
from jaxvram.kernels.wkv7 import wkv7, wkv7_reference  # noqa: E402

ATTENTION = [  # B, T, H, G, K, causal
    (4, 1024, 12, 12, 64, True),
    (2, 4096, 16, 16, 128, True),
    (1, 2048, 32, 8, 128, True),
    (8, 256, 16, 16, 72, False),
]
CROSS_ENTROPY = [(8192, 768, 50304), (4096, 2048, 32000)]  # N, D, V
SELECTIVE_SCAN = [(2, 2048, 1536, 16)]  # B, T, E, N
SCALAR_DECAY = [(2, 2048, 1, 24, 64, 128)]  # B, T, G, H, P, N
RETENTION = [  # B, T, H, P, N; the last as flash-linear-attention has it
    (8, 512, 4, 432, 256),
    (4, 2048, 4, 432, 256),
    (8, 2048, 32, 256, 256),
]
WKV4 = [(8, 1024, 768)]  # B, T, D
WKV6 = [(8, 1024, 12, 64, False), (8, 1024, 12, 64, True)]  # B, T, H, N, whether the decay is constant (RWKV-5)
WKV7 = [(16, 512, 12, 64)]  # B, T, H, N
NF4_LINEAR = [(1, 11008, 4096), (64, 11008, 4096)]  # N, F, D
GROUPED_MATMUL = [(16384, 768, 2048, 8), (16384, 768, 2048, 64)]  # N, D, F, E
PACKED_LINEAR = [(1, 8640, 3200, "2bit"), (1, 8640, 3200, "base3"), (64, 8640, 3200, "2bit")]  # N, F, D, storage
OURS_AND_XLA = ("pallas", "xla")
ROUNDS, TURN_SECONDS = 7, 0.06
RMS_LIMIT = 1e-2


def rms_error(got, want) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))


def with_gradients(f, count: int):
    """f and the gradients of its sum by the first `count` arguments."""
    return jax.jit(jax.value_and_grad(lambda *args: f(*args).astype(jnp.float32).sum(), tuple(range(count))))


def attention_sides(B, T, H, G, K, causal):
    keys = jax.random.split(jax.random.key(0), 3)
    args = tuple(
        jax.random.normal(key, (B, T, heads, K), jnp.bfloat16) for key, heads in zip(keys, (H, G, G), strict=True)
    )
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    sides = {name: functools.partial(attention, causal=causal, implementation=name) for name in OURS_AND_XLA}
    return sides | {"cudnn": cudnn}, functools.partial(attention_reference, causal=causal), args, 3


def cross_entropy_sides(N, D, V):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (N, D), jnp.bfloat16)
    head = jax.random.normal(keys[1], (V, D)) * D**-0.5
    args = hidden, head, jax.random.randint(keys[2], (N,), 0, V)
    loss = lambda name: lambda h, w, y: linear_cross_entropy(h, w, y, implementation=name)[0]
    reference = lambda h, w, y: linear_cross_entropy_reference(h, w, y)[0]
    return {name: loss(name) for name in OURS_AND_XLA}, reference, args, 2


def selective_scan_sides(B, T, E, N):
    """Inputs as a fresh Mamba has them: steps between 0.001 and 0.1 before they are told apart by the token."""
    bf16, keys = jnp.bfloat16, jax.random.split(jax.random.key(0), 6)
    x, z = (jax.random.normal(key, (B, T, E), bf16) for key in keys[:2])
    dt = jax.random.uniform(keys[2], (B, T, E), minval=-7.0, maxval=-2.0).astype(bf16)
    A = -jnp.broadcast_to(jnp.arange(1.0, N + 1), (E, N))
    enters, reads = (jax.random.normal(key, (B, T, N), bf16) for key in keys[3:5])
    y = lambda scan, **options: lambda *args: scan(*args, **options)[0]
    sides = {name: y(selective_scan, implementation=name) for name in OURS_AND_XLA}
    return sides, y(selective_scan_reference), (x, dt, A, enters, reads, jnp.ones(E), z), 7


def scalar_decay_sides(B, T, G, H, P, N):
    bf16, keys = jnp.bfloat16, jax.random.split(jax.random.key(0), 5)
    q, k = (N**-0.25 * jax.random.normal(key, (B, T, G, N), bf16) for key in keys[:2])
    v = jax.random.normal(keys[2], (B, T, H, P), bf16)
    weight = jnp.exp(jax.random.uniform(keys[3], (B, T, H), minval=-7.0, maxval=-2.0))
    log_decay = -weight * jax.random.uniform(keys[4], (H,), minval=1.0, maxval=16.0)
    o = lambda scan, **options: lambda *args: scan(*args, **options)[0]
    sides = {name: o(scalar_decay, implementation=name) for name in OURS_AND_XLA}
    return sides, o(scalar_decay_reference), (q, k, v, log_decay, weight), 5


def retention_sides(B, T, H, P, N):
    keys, gammas = jax.random.split(jax.random.key(0), 3), log_gammas(H)
    q, k, v = (
        jax.random.normal(key, (B, T, H, width), jnp.bfloat16) for key, width in zip(keys, (N, N, P), strict=True)
    )
    chunks = lambda name: lambda q, k, v: scalar_decay(q, k, v, gammas, implementation=name)[0]
    sides = {
        "parallel-pallas": lambda q, k, v: retention_tiled(q, k, v, gammas, implementation="pallas"),
        "chunks-pallas": chunks("pallas"),
        "xla": chunks("xla"),
    }
    return sides, lambda q, k, v: retention_parallel(q, k, v, gammas), (q, N**-0.5 * k, v), 3


def wkv4_sides(B, T, D):
    """Decays and bonuses as a fresh RWKV-4 has them in its middle layers."""
    bf16, keys, n = jnp.bfloat16, jax.random.split(jax.random.key(0), 2), jnp.arange(D)
    k, v = (jax.random.normal(key, (B, T, D), bf16) for key in keys)
    log_decay, first = -jnp.exp(-5 + 8 * (n / (D - 1)) ** 1.35), jnp.log(0.3) + 0.5 * ((n + 1) % 3 - 1)
    y = lambda scan, **options: lambda *args: scan(*args, **options)[0]
    sides = {name: y(wkv4, implementation=name) for name in OURS_AND_XLA}
    return sides, y(wkv4_reference), (log_decay, first, k, v), 4


def wkv6_sides(B, T, H, N, constant):
    """Decays as a fresh model has them: log decays from -exp(-6) to -exp(-1), a head's channels apart."""
    bf16, keys = jnp.bfloat16, jax.random.split(jax.random.key(0), 5)
    r, k, v = (jax.random.normal(key, (B, T, H, N), bf16) for key in keys[:3])
    decay = jnp.linspace(-6.0, -1.0, H * N).reshape(H, N)
    log_decay = -jnp.exp(decay if constant else decay + 0.5 * jax.random.normal(keys[3], (B, T, H, N)))
    y = lambda scan, **options: lambda *args: scan(*args, **options)[0]
    sides = {name: y(wkv6, implementation=name) for name in OURS_AND_XLA}
    return sides, y(wkv6_reference), (r, log_decay, N**-0.5 * k, v, jax.random.normal(keys[4], (H, N))), 5


def wkv7_sides(B, T, H, N):
    """Inputs as a fresh RWKV-7 has them, but for keys that are as large as values."""
    bf16, keys = jnp.bfloat16, jax.random.split(jax.random.key(0), 6)
    r, k, v, kappa = (jax.random.normal(key, (B, T, H, N)) for key in keys[:4])
    kappa /= jnp.linalg.norm(kappa, axis=-1, keepdims=True)
    log_decay = -0.6065 * jax.nn.sigmoid(jax.random.uniform(keys[4], (B, T, H, N), minval=-6.0, maxval=3.0))
    a = jax.nn.sigmoid(jax.random.normal(keys[5], (B, T, H, N)))
    y = lambda scan, **options: lambda *args: scan(*args, **options)[0]
    sides = {name: y(wkv7, implementation=name) for name in OURS_AND_XLA}
    args = (r.astype(bf16), log_decay, *(x.astype(bf16) for x in (N**-0.5 * k, v, kappa, a)))
    return sides, y(wkv7_reference), args, 6


def nf4_linear_sides(N, F, D):
    keys = jax.random.split(jax.random.key(0), 2)
    weight = quantize(0.02 * jax.random.normal(keys[0], (F, D)))
    y = lambda name: lambda x: nf4_linear(x, weight, F, implementation=name)
    x_NxD = jax.random.normal(keys[1], (N, D), jnp.bfloat16)
    return {name: y(name) for name in OURS_AND_XLA}, lambda x: nf4_linear_reference(x, weight, F), (x_NxD,), 1


def grouped_matmul_sides(N, D, F, E):
    """Groups of uneven sizes: the largest has about twice the mean."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_NxD, w_ExDxF = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, ((N, D), (E, D, F)), strict=False))
    ends_E = jnp.round(jnp.cumsum(jax.random.dirichlet(keys[2], jnp.full(E, 6.0))) * N).astype(jnp.int32).at[-1].set(N)
    sizes_E = jnp.diff(ends_E, prepend=0)
    sides = {name: lambda x, w, name=name: grouped_matmul(x, w, sizes_E, implementation=name) for name in OURS_AND_XLA}
    sides["ragged_dot"] = lambda x, w: jax.lax.ragged_dot(x, w, sizes_E)
    return sides, lambda x, w: grouped_matmul_reference(x, w, sizes_E), (x_NxD, w_ExDxF), 2


def packed_linear_sides(N, F, D, storage):
    """Beside the same codes in a bf16 matrix, which is what full precision would read."""
    keys = jax.random.split(jax.random.key(0), 2)
    codes, scale = ternary.codes_of(jax.random.normal(keys[0], (F, D)))
    packed, w_FxD = ternary.pack(codes, storage), (codes * scale).astype(jnp.bfloat16)
    y = lambda name: lambda x: packed_linear(x, packed, scale, F, storage, name)
    rounded = lambda x: x + jax.lax.stop_gradient(mixed(x, codes, 1.0)[0] - x)
    sides = {name: y(name) for name in OURS_AND_XLA} | {"bf16": lambda x: rounded(x) @ w_FxD.T}
    x_NxD = jax.random.normal(keys[1], (N, D), jnp.bfloat16)
    return sides, lambda x: rounded(x) @ (codes * scale).T, (x_NxD,), 1


@dataclasses.dataclass
class Compiled:
    """The programs of a case: `wanted` gives the definition's results in fp32, `programs[side]` is forward and both ways."""

    wanted: Callable
    programs: dict[str, tuple[Callable, Callable]]
    refused: dict[str, str]  # side -> why
    names: list[str]  # of the sides, ours first


def in_fp32(args) -> list:
    return [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in args]


def compile_case(make) -> Compiled:
    sides, reference, args, count = make()
    compiled = Compiled(None, {}, {}, [*sides])
    results = lambda *args: (reference(*args), *with_gradients(reference, count)(*args)[1])
    with jax.default_matmul_precision("highest"):
        compiled.wanted = jax.jit(results).lower(*in_fp32(args)).compile()
    for name, side in sides.items():
        try:
            both = [f.lower(*args).compile() for f in (jax.jit(side), with_gradients(side, count))]
            compiled.programs[name] = tuple(both)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # cuDNN does not take every shape
            compiled.refused[name] = " ".join(str(error).split())[:200]
    return compiled


def measure(compiled: Compiled, args) -> dict:
    """Errors of each side, and the median time of each of its two programs in microseconds."""
    want, timed = compiled.wanted(*in_fp32(args)), {}
    result = {}
    for name, (forward, both) in compiled.programs.items():
        errors = [rms_error(g, w) for g, w in zip((forward(*args), *both(*args)[1]), want, strict=True)]
        result[name] = {"rms_errors": errors}
        if max(errors) < RMS_LIMIT:
            timed |= {(name, "forward"): forward, (name, "forward_backward"): both}
    del want
    for (name, what), samples in take_turns(timed, args).items():
        result[name][f"{what}_us"] = statistics.median(samples)
    result |= {name: {"refused": why} for name, why in compiled.refused.items()}
    return {name: result[name] for name in compiled.names}


def take_turns(programs, args) -> dict:
    """{program: microseconds a call, of each round}."""
    calls = {}
    for key, program in programs.items():
        jax.block_until_ready(program(*args))
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        calls[key] = max(3, int(TURN_SECONDS / (time.perf_counter() - start)))
    samples = {key: [] for key in programs}
    for _ in range(ROUNDS):
        for key, program in programs.items():
            start = time.perf_counter()
            for _ in range(calls[key]):
                out = program(*args)
            jax.block_until_ready(out)
            samples[key].append((time.perf_counter() - start) / calls[key] * 1e6)
    return samples


def ratios(result: dict) -> str:
    """The first side, ours, against each other one: above 1, ours is faster."""
    words, first = [], next(iter(result))
    for what in ("forward_us", "forward_backward_us"):
        ours = result[first].get(what)
        others = [f"{name} {r[what] / ours:.2f}" for name, r in result.items() if ours and name != first and what in r]
        words.append(f"{what.removesuffix('_us')} {f'{ours:.0f} us, times: ' + ', '.join(others) if ours else 'WRONG'}")
    return "; ".join(words)


def cases() -> list[tuple]:
    """(name, what makes its sides) of each."""
    kinds = {
        "attention": (attention_sides, ATTENTION),
        "linear_cross_entropy": (cross_entropy_sides, CROSS_ENTROPY),
        "selective_scan": (selective_scan_sides, SELECTIVE_SCAN),
        "scalar_decay": (scalar_decay_sides, SCALAR_DECAY),
        "retention": (retention_sides, RETENTION),
        "wkv4": (wkv4_sides, WKV4),
        "wkv6": (wkv6_sides, WKV6),
        "wkv7": (wkv7_sides, WKV7),
        "nf4_linear": (nf4_linear_sides, NF4_LINEAR),
        "grouped_matmul": (grouped_matmul_sides, GROUPED_MATMUL),
        "packed_linear": (packed_linear_sides, PACKED_LINEAR),
    }
    return [
        (f"{kind} {shape}", functools.partial(sides, *shape)) for kind, (sides, shapes) in kinds.items() for shape in shapes
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--only", default="", help="a regular expression that finds the names of cases")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case is begun after these")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        print("this machine has no GPU to measure on; --mode=kernels of launch.py says what a compiler can", file=sys.stderr)
        return 2
    card = device.device_kind
    default = ROOT / f"benchmarks/results/kernels_{card.removeprefix('NVIDIA ').lower().replace(' ', '_')}.json"
    out = pathlib.Path(options.out or default)
    kept = json.loads(out.read_text())["results"] if out.exists() else {}
    chosen = {name: make for name, make in cases() if re.search(options.only, name)}
    started, results = time.monotonic(), {}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # nothing is timed before all are done
        compiled = {name: pool.submit(compile_case, make) for name, make in chosen.items()}
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    for name, make in chosen.items():
        if time.monotonic() - started > 60 * options.minutes:
            print(f"{name}: left out, {options.minutes} minutes are over", flush=True)
            continue
        results[name] = measure(compiled.pop(name).result(), make()[2])
        print(f"{name}: {ratios(results[name])}", flush=True)
        record = {"card": card, "jax": jax.__version__, "results": kept | results}
        out.write_text(json.dumps(record, indent=2) + "\n")  # after each: whatever ends the run, they stay
    print(out)
    ours = [side for result in results.values() for name, side in result.items() if name.endswith("pallas")]
    return 0 if all("forward_us" in side for side in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
