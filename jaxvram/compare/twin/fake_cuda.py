"""Fake CUDA tensors in a PyTorch that has no CUDA: build the shim on first use, load it, and mend what looks for a GPU.

`load` must be called before torch is imported: the registries that fake_cuda.cpp enters are read once.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from problems import TwinError

SOURCE = pathlib.Path(__file__).with_name("fake_cuda.cpp")


def load() -> None:
    """After this, `FakeTensorMode` knows the device "cuda", whether torch was built with it or not."""
    if "torch" in sys.modules:
        raise TwinError("torch was imported before fake_cuda.load()")
    folder = pathlib.Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    if not list((folder / "lib").glob("libtorch_cuda.*")):  # a build for CUDA has a true guard, which would clash
        library = build(folder)
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(folder / "lib" / name), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _mend()


def build(torch_folder: pathlib.Path) -> pathlib.Path:
    """The shim for this version of torch, compiled unless the cache has it."""
    version = importlib.metadata.version("torch")
    mark = hashlib.sha256(SOURCE.read_bytes() + str(torch_folder).encode()).hexdigest()[:12]
    cache = pathlib.Path(os.environ.get("JAXVRAM_CACHE") or pathlib.Path.home() / ".cache" / "jaxvram").expanduser()
    library = cache / "twin" / f"fake_cuda-{version}-{mark}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        wanted = os.environ.get("CXX") or "g++"
        raise TwinError(
            f"planning PyTorch's memory without a GPU compiles 50 lines of C++ once, and there is no {wanted}: "
            "install g++ (Debian: apt-get install g++) or name a compiler in CXX"
        )
    print(f"compiling {library} (once)", file=sys.stderr)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # two processes may come at once
        made = pathlib.Path(scratch) / "shim.so"
        command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}", str(SOURCE)]
        command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
            raise TwinError(f"{compiler} could not compile fake_cuda.cpp against torch {version}: {lines[0]}")
        os.replace(made, library)
    return library


def _mend() -> None:
    """What asks for a GPU from Python; a fake one is enough."""
    import torch

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # else torch.autocast("cuda") turns itself off
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.synchronize = lambda device=None: None  # bitsandbytes waits after each update
