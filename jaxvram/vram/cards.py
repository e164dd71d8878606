"""The cards a plan can be made for: what the compiler must know about each, and how much of it a program may use.

Sources. Multiprocessors, clocks, L2, bandwidth and bf16 rates: NVIDIA's whitepapers on GA102, Ada, RTX Blackwell, A100 and
H100, and the L4, H100 and H200 datasheets; a rate is dense, with fp32 accumulation. Shared memory and threads: CUDA C++
Programming Guide, table of compute capabilities. Capacity is what CUDA reports on Linux (`cudaMemGetInfo`; PyTorch prints
it when it runs out), which is less than the box says: on Ada by 0.37 GiB (reported: 7.63 of 8, 23.63 of 24), on Ampere by
0.24 to 0.31 (11.76 of 12, 23.69 of 24), on Blackwell by 0.63 of 32, on an L4, whose error correction takes a sixteenth,
by 2. None of these cards was at hand: a capacity is as good as those reports.
"""

import dataclasses
import os

from jaxvram.errors import UserError, nearest

GIB = 2**30

# What a plan does not see: the CUDA context with its libraries and loaded kernels (0.3 to 0.6 GiB), the workspaces that
# autotuning picks, the allocator's rounding; on a desktop, the screen. So CONTEXT_BYTES of every card stay out of a plan,
# and whatever JAX's allocator may not touch: it takes a fixed fraction of the card when it starts. JAX's own fraction is
# 0.75, which leaves 2.9 GiB of an RTX 4070 idle; launch.py sets this one, unless the user has set
# XLA_PYTHON_CLIENT_MEM_FRACTION.
CONTEXT_BYTES = int(0.6 * GIB)
MEMORY_FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Card:
    """One GPU. Rates are peaks, for the compiler's cost model and the estimate of time in a fit; no size depends on them."""

    name: str  # what the user types
    description: str  # CUDA's device name
    capacity_bytes: int  # of device memory, as CUDA reports it on Linux
    compute_capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float  # boost
    l2_bytes: int
    bandwidth: float  # bytes a second
    tensor_tflops: float  # bf16 products, dense
    memory_fraction: float = MEMORY_FRACTION  # of the capacity that JAX's allocator may take

    @property
    def reserved_bytes(self) -> int:
        return max(CONTEXT_BYTES, round((1 - self.memory_fraction) * self.capacity_bytes))

    @property
    def usable_bytes(self) -> int:
        return self.capacity_bytes - self.reserved_bytes

    @property
    def shared_memory_per_block(self) -> int:
        """Bytes of shared memory that one block may ask for (opt-in)."""
        return self.shared_memory_per_multiprocessor - 1024  # CUDA keeps 1 KiB a block

    @property
    def threads_per_multiprocessor(self) -> int:
        return 2048 if self.compute_capability in ((8, 0), (9, 0)) else 1536  # data-centre parts hold 64 warps, not 48

    @property
    def shared_memory_per_multiprocessor(self) -> int:
        return {(8, 0): 164, (9, 0): 228}.get(self.compute_capability, 100) * 1024

    def target_config(self) -> str:
        """XLA's TargetConfig, text form: all that its compiler asks of a GPU that it cannot see."""
        major, minor = self.compute_capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  shared_memory_per_core: {self.shared_memory_per_multiprocessor}
  threads_per_core_limit: {self.threads_per_multiprocessor}
  core_count: {self.multiprocessors}
  fpus_per_core: {64 if (major, minor) == (8, 0) else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.capacity_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.description}"
"""


def _card(name, description, gib, capability, multiprocessors, clock_ghz, l2_mib, gb_per_second, tflops):
    sizes = {"capacity_bytes": round(gib * GIB), "l2_bytes": l2_mib * 2**20}
    rates = {"clock_ghz": clock_ghz, "bandwidth": gb_per_second * 1e9, "tensor_tflops": tflops}
    return Card(name, description, compute_capability=capability, multiprocessors=multiprocessors, **sizes, **rates)


CARDS = {
    card.name: card
    for card in (
        #     name            CUDA's name                         GiB    sm       SMs  GHz    L2  GB/s   TFLOP/s
        _card("rtx3060", "NVIDIA GeForce RTX 3060", 11.76, (8, 6), 28, 1.777, 3, 360, 25.5),
        _card("rtx4060", "NVIDIA GeForce RTX 4060", 7.63, (8, 9), 24, 2.46, 24, 272, 30.2),
        _card("rtx4060ti16g", "NVIDIA GeForce RTX 4060 Ti", 15.63, (8, 9), 34, 2.535, 32, 288, 44.1),
        _card("rtx4070", "NVIDIA GeForce RTX 4070", 11.63, (8, 9), 46, 2.475, 36, 504.2, 58.3),
        _card("rtx4080", "NVIDIA GeForce RTX 4080", 15.63, (8, 9), 76, 2.505, 64, 716.8, 97.5),
        _card("rtx3090", "NVIDIA GeForce RTX 3090", 23.69, (8, 6), 82, 1.695, 6, 936.2, 71.0),
        _card("rtx4090", "NVIDIA GeForce RTX 4090", 23.63, (8, 9), 128, 2.52, 72, 1008, 165.2),
        _card("rtx5070", "NVIDIA GeForce RTX 5070", 11.5, (12, 0), 48, 2.512, 48, 672, 61.7),
        _card("rtx5090", "NVIDIA GeForce RTX 5090", 31.37, (12, 0), 170, 2.407, 96, 1792, 209.5),
        _card("a100-40g", "NVIDIA A100-SXM4-40GB", 39.42, (8, 0), 108, 1.41, 40, 1555.2, 312),
        _card("a100-80g", "NVIDIA A100-SXM4-80GB", 79.26, (8, 0), 108, 1.41, 40, 2039, 312),
        _card("l4", "NVIDIA L4", 22.03, (8, 9), 58, 2.04, 48, 300, 121),
        _card("h100", "NVIDIA H100 80GB HBM3", 79.11, (9, 0), 132, 1.98, 50, 3352.3, 989),
        _card("h200", "NVIDIA H200", 139.8, (9, 0), 132, 1.98, 60, 4800, 989),
    )
}


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 or count == 0 else f"{count / 2**20:.1f} MiB"


def find(name: str) -> Card:
    """The card of that name, spelt as in the table or as NVIDIA does ('RTX 4070', 'NVIDIA GeForce RTX 4070')."""
    key = "".join(name.lower().split())
    for card in CARDS.values():
        if key in (card.name, "".join(card.description.lower().split()), card.name.replace("-", "")):
            return card
    short = key.removeprefix("nvidia").removeprefix("geforce")
    if short in CARDS:
        return CARDS[short]
    raise UserError(f"card {name!r} is unknown{nearest(short, CARDS)}")


def table() -> str:
    """What `--card=list` prints."""
    rows = [("card", "GPU", "capacity", "reserved", "usable", "sm", "SMs", "GB/s", "bf16 TFLOP/s")]
    for card in CARDS.values():
        sizes = (card.capacity_bytes, card.reserved_bytes, card.usable_bytes)
        capability = "{}.{}".format(*card.compute_capability)
        rates = (str(card.multiprocessors), f"{card.bandwidth / 1e9:.0f}", f"{card.tensor_tflops:g}")
        rows.append((card.name, card.description, *(f"{n / GIB:.2f} GiB" for n in sizes), capability, *rates))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    justify = [str.ljust, str.ljust] + [str.rjust] * (len(widths) - 2)
    columns = list(zip(justify, widths, strict=True))
    cells = lambda row: (just(cell, width) for (just, width), cell in zip(columns, row, strict=True))
    note = (
        "Capacity is what CUDA reports on Linux; reserved is what no plan sees: context, libraries, workspaces, screen."
    )
    return "\n".join([*("  ".join(cells(row)).rstrip() for row in rows), note])


def local_card() -> Card | None:
    """The GPU of this machine, or None; one that the table lacks is described from what JAX says about it."""
    device = local_device()
    if device is None:
        return None
    known = {card.description: card for card in CARDS.values()}.get(device.device_kind)
    fraction = _memory_fraction()
    capacity = round(device.memory_stats()["bytes_limit"] / fraction)
    # An RTX 4060 Ti comes with 8 and with 16 GB under one name.
    if known and abs(capacity - known.capacity_bytes) < 0.1 * known.capacity_bytes:
        return dataclasses.replace(known, capacity_bytes=capacity, memory_fraction=fraction)
    capability = tuple(int(n) for n in str(device.compute_capability).split("."))
    older = [c for c in CARDS.values() if c.compute_capability <= capability] or list(CARDS.values())
    return dataclasses.replace(
        known or max(older, key=lambda c: c.compute_capability),  # its rates stand in for those of the card
        name="local",
        description=device.device_kind,
        capacity_bytes=capacity,
        compute_capability=capability,
        multiprocessors=device.core_count,
        memory_fraction=fraction,
    )


def local_device():
    """The first NVIDIA GPU that JAX computes on here, or None."""
    import jax  # not above: launch.py reads MEMORY_FRACTION before JAX may be imported

    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices()[0]
    return device if "nvidia" in device.device_kind.lower() else None


def _memory_fraction() -> float:
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    return float(next((os.environ[name] for name in names if os.environ.get(name)), 0.75))
