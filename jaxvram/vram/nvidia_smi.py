"""What the driver says about a GPU, by nvidia-smi: asking it takes no memory of the card, and starts no CUDA here."""

import dataclasses
import subprocess


@dataclasses.dataclass(frozen=True)
class Seen:
    name: str
    driver: str  # its version
    used_bytes: int | None  # of the card, by all processes; None: this card does not tell


def look(gpu: str) -> Seen | None:
    """None where there is no nvidia-smi, or it does not know the GPU.

    Args:
      gpu: number on the bus, or UUID.
    """
    query = ["--query-gpu=name,driver_version,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(["nvidia-smi", f"--id={gpu}", *query], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = [field.strip() for field in done.stdout.split(",")]
    if done.returncode or len(fields) != 3:
        return None
    name, driver, used_mib = fields
    return Seen(name, driver, int(used_mib) * 2**20 if used_mib.isdecimal() else None)
