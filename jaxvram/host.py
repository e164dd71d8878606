"""The machine round the accelerator: how its memory is handed out, and where compiled programs are kept."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory that a program gives back, for training on a CPU; elsewhere does nothing.

    glibc hands every large block back to the system, and XLA:CPU takes its temporaries anew each step: a third of a small
    model's step went into page faults (11,900 a step for nanoGPT's CPU recipe, 600 with this). Call it before JAX starts
    its threads, as each would get an arena of its own.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        m_mmap_max, m_trim_threshold, m_arena_max = -4, -1, -8
        for parameter, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_arena_max, 1)):
            libc.mallopt(parameter, value)


def keep_compiled_programs() -> None:
    """JAX's own cache of what took over a second to compile, in our cache folder unless one is set already."""
    import jax

    from jaxvram.data.download import cache_dir

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
