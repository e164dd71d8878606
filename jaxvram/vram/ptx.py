"""What a compiled program's kernels take of a multiprocessor: read from the compiler's dumps and from NVIDIA's assembler."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

from jaxvram.errors import UserError
from jaxvram.vram.cards import Card

REGISTERS = 65_536  # of a multiprocessor, every card here
CUDA = pathlib.Path("/usr/local/cuda/bin")
PREFIX = "pallas_"  # names of our own kernels begin so (kernels/backend.py)
TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    registers: int  # a thread
    spill_bytes: int  # a thread, stores
    shared_bytes: int  # a block
    grid: tuple[int, int, int]
    threads: int  # a block
    tensor_core_instructions: int  # in its code, not executed

    def blocks_per_multiprocessor(self, card: Card) -> int:
        """How many fit side by side: registers come in steps of 8 a thread, a block costs 1 KiB of shared memory more."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads)
        by_shared = card.shared_memory_per_multiprocessor // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, card.threads_per_multiprocessor // self.threads)


def read(dump: pathlib.Path, card: Card) -> tuple[Kernel, ...]:
    """Our kernels in a program that was compiled for `card` with its dumps in `dump`, in the order of their names."""
    launches = {}
    for path in dump.glob("*thunk_sequence.txt"):
        launches |= _launches(path.read_text())
    found = []
    for path in dump.glob("*.ptx"):
        text = path.read_text()
        names = re.findall(rf"\.entry ({PREFIX}\w+)", text)
        if not names:
            continue
        registers, spills = _assemble(path, card)
        for name in names:
            grid, threads, shared = launches[name]
            mma = len(TENSOR_CORE.findall(text))
            found.append(Kernel(name, registers[name], spills[name], shared, grid, threads, mma))
    return tuple(sorted(found, key=lambda kernel: kernel.name))


def _launches(text: str) -> dict:
    """{name: (grid, threads, shared bytes)} from XLA's list of what it launches."""
    pattern = rf"\b({PREFIX}\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+)"
    return {
        name: ((int(x), int(y), int(z)), int(threads), int(shared))
        for name, x, y, z, threads, shared in re.findall(pattern, text)
    }


def _assemble(path: pathlib.Path, card: Card) -> tuple[dict[str, int], dict[str, int]]:
    """Registers and spilled bytes of each function, as ptxas reports them."""
    arch = "sm_{}{}{}".format(*card.compute_capability, "a" if card.compute_capability == (9, 0) else "")
    command = [ptxas(), "-v", "--gpu-name", arch, str(path), "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = {}, {}
    for part in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)[1]
        registers[name] = int(re.search(r"Used (\d+) registers", part)[1])
        spills[name] = int(re.search(r"(\d+) bytes spill stores", part)[1])
    return registers, spills


@functools.cache
def ptxas() -> str:
    """NVIDIA's assembler, from its pip package or from a CUDA installation.

    Raises:
      UserError: there is none.
    """
    try:
        packaged = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        packaged = None
    folders = [pathlib.Path(p) / "bin" for p in (packaged.submodule_search_locations if packaged else [])]
    for folder in [*folders, CUDA]:
        if (folder / "ptxas").exists():
            return str(folder / "ptxas")
    if found := shutil.which("ptxas"):
        return found
    from jaxvram.vram.compile import INSTALL  # which imports this module

    raise UserError(f"planning for a GPU needs NVIDIA's assembler, ptxas. Install it: {INSTALL}")
