"""Compiles a program for a GPU that is not there, from its description, and keeps what the compiler says about memory.

All that differs between JAX versions, and everything that must be arranged so that the compiler answers exactly and in
silence, is in this file.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
import time

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxvram.errors import UserError
from jaxvram.quiet import quiet
from jaxvram.vram import hlo, ptx
from jaxvram.vram.cards import Card, local_device
from jaxvram.vram.flops import matmul_flops

INSTALL = "pip install -e '.[plan]'   (that is: pip install 'jax[cuda12-local]' nvidia-cuda-nvcc-cu12; about 560 MB)"

# JAX >= 0.11 asks which GPU a Triton kernel is lowered for, by a name in its own short table; only the compute capability
# behind the name counts.
NAMES_JAX_KNOWS = {
    (8, 0): "NVIDIA A100-SXM4-40GB",
    (8, 6): "NVIDIA A10",
    (8, 9): "NVIDIA GeForce RTX 4090",
    (9, 0): "NVIDIA H100 80GB HBM3",
    (12, 0): "NVIDIA RTX PRO 6000",
}

# Unable to autotune, XLA gives every matrix product one tiling, which some of few rows (sampling) can't hold; on the card
# it would try cuBLAS, and so does the second attempt.
WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}

DUMPS = "jaxvram-plan-"  # names of temporary folders begin so, then comes the process


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about one program on one card. Bytes of device memory."""

    argument_bytes: int
    temporary_bytes: int  # with the program's constants
    output_bytes: int
    aliased_bytes: int  # outputs that lie where a donated argument was
    module: hlo.Module  # the optimised program and its buffer assignment
    output_paths: tuple[str, ...]  # of the flattened outputs, as jax.tree_util.keystr writes them
    matmul_flops: int
    kernels: tuple[ptx.Kernel, ...] = ()  # our own, where asked for

    @property
    def peak_bytes(self) -> int:
        # Not the compiler's own peak_memory_in_bytes: that one counts host buffers, and leaves out temporaries on a CPU.
        return self.argument_bytes + self.temporary_bytes + self.output_bytes - self.aliased_bytes


def settle_platform() -> None:
    """On a machine without an NVIDIA GPU tells JAX so, and lets it look for devices quietly.

    With the planner installed, JAX would otherwise try the CUDA plugin, fail with a traceback on stderr, and drop it; even
    told, its libraries say on stderr that they found no driver. Call it before anything looks for devices, and after
    `jax.distributed.initialize`.
    """
    if gpu_visible():
        return
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    with quiet():
        jax.default_backend()


def gpu_visible() -> bool:
    """Whether the NVIDIA driver shows a device (/dev/dxg: under Windows' Linux subsystem)."""
    return any(pathlib.Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def compile_for(card: Card, fn, args: tuple, donate_argnums: tuple[int, ...] = (), kernels: bool = False) -> Compiled:
    """Compiles fn(*args) for `card`; for the card itself, autotuned, where it is in this machine.

    Args:
      fn: a function of arrays. Not one that jax.jit returned with donation or shardings of its own: they would be lost.
      args: pytrees of ShapeDtypeStruct or arrays; only shapes and dtypes are read.
      donate_argnums: arguments whose memory the outputs may take over.
      kernels: read registers, spills and shared memory of our kernels as well; takes longer.
    Raises:
      UserError: the planner's compiler is not installed, or the card's compiler refuses the program.
    """
    settle_platform()
    device = local_device()
    if device is not None and device.device_kind == card.description:
        sharding, options, lowering = SingleDeviceSharding(device), {}, contextlib.nullcontext()
    else:
        # Autotuning runs kernels on the card itself; without this option the compile would fail.
        sharding, options, lowering = _described(card), {"xla_gpu_autotune_level": 0}, _abstract_device(card)

    def on_card(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    jitted = jax.jit(fn, donate_argnums=donate_argnums, out_shardings=sharding)
    with lowering:
        traced = jitted.trace(*jax.tree.map(on_card, args))
        lowered = traced.lower()
    outputs = jax.tree_util.tree_flatten_with_path(lowered.out_info)[0]
    memory, module, found = _compile(lowered, options, card, kernels)
    constants = sum(a.bytes for a in module.allocations if a.is_constant)  # the compiler's own sum leaves them out
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + constants,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        module,
        tuple(jax.tree_util.keystr(path) for path, _ in outputs),
        matmul_flops(traced.jaxpr),
        found,
    )


def _compile(lowered, options: dict, card: Card, kernels: bool = False):
    """(sizes, the optimised program with its buffer assignment, our kernels in it)."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{DUMPS}{os.getpid()}-") as dump:
        options = options | {"xla_dump_to": dump, "xla_dump_hlo_as_proto": True}
        if kernels:
            options |= {"xla_dump_hlo_as_text": True, "xla_dump_emitter_re": "ptx"}
        try:
            with _no_compilation_cache(), quiet():
                memory = lowered.compile(compiler_options=options).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "output tile sizes" in str(error) and WITHOUT_TRITON.items() - options.items():
                return _compile(lowered, options | WITHOUT_TRITON, card, kernels)
            reason = str(error).splitlines()[0]
            raise UserError(f"the compiler for {card.description} refuses this program: {reason}") from error
        # Autotuning on a real card compiles, and dumps, fragments of the program too: the program is the largest.
        found = ptx.read(pathlib.Path(dump), card) if kernels else ()
        protos = [path.read_bytes() for path in pathlib.Path(dump).glob("*gpu_after_optimizations.hlo.pb")]
    if not protos:
        raise RuntimeError("XLA wrote no buffer assignment; is XLA_FLAGS changing its dumps?")
    return memory, hlo.read(max(protos, key=len)), found


def _sweep() -> None:
    """Removes the dumps of plans that were killed: no process of theirs could."""
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{DUMPS}*-*"):
        pid = folder.name.removeprefix(DUMPS).partition("-")[0]
        with contextlib.suppress(OSError):
            # An hour, since a process of another container may have a number that none has here.
            if pid.isdigit() and not _alive(int(pid)) and time.time() - folder.stat().st_mtime > 3600:
                shutil.rmtree(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _described(card: Card) -> NamedSharding:
    """A sharding over one GPU that exists only as a description."""
    try:
        with quiet():
            topology = topologies.get_topology_desc(
                "1x1x1", platform="cuda", target_config=card.target_config(), topology="1x1x1"
            )
    except NotImplementedError as error:  # JAX has no CUDA plugin, or dropped it because its libraries did not load
        raise UserError(f"planning for a GPU needs its compiler. Install it: {INSTALL}") from error
    ptx.ptxas()  # or a line that says how to get it
    return NamedSharding(topologies.make_mesh(topology, (1,), ("card",)), PartitionSpec())


def _abstract_device(card: Card):
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
    except ImportError:  # JAX 0.10 does not ask
        return contextlib.nullcontext()
    kind = NAMES_JAX_KNOWS.get(card.compute_capability, card.description)
    device = AbstractDevice(device_kind=kind, num_cores=card.multiprocessors, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@contextlib.contextmanager
def _no_compilation_cache():
    """A cached program comes without its dump, and one for a card that is not there cannot be read back from the cache."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether it caches; this makes it ask again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
