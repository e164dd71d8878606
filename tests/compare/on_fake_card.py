"""Our side of a measurement on a card that is not there: the steps run, on the CPU; the allocator's counts are made up.

`python on_fake_card.py < request.json`. After compilation its highest mark is 1 GiB, after init 2, after the steps 3; the
allocator holds 4. Whoever started it must have seen to it that JAX takes only what it needs, of the first card alone.
"""

import os
import pathlib
import sys

WANTED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3"}
for name, value in WANTED.items():
    if os.environ.get(name) != value:
        sys.exit(f"error: {name}={os.environ.get(name)}")

from jaxvram.compare import measured_side  # noqa: E402
from jaxvram.vram import cards  # noqa: E402

GIB = 2**30
CARD = cards.find("rtx4070")


class Device:
    """What is asked of a JAX device."""

    device_kind, compute_capability, core_count = CARD.description, "8.9", CARD.multiprocessors
    looked = 0

    def memory_stats(self) -> dict:
        self.looked += 1
        limit = cards._memory_fraction() * CARD.capacity_bytes
        return {"peak_bytes_in_use": min(self.looked, 3) * GIB, "pool_bytes": 4 * GIB, "bytes_limit": limit}


if __name__ == "__main__":
    with pathlib.Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write("jaxvram\n")
    device = Device()
    cards.local_device = lambda: device
    sys.exit(measured_side.main())
