"""Silence for the C++ side of JAX. Imports nothing of JAX: importing that, with the planner installed, already speaks."""

import contextlib
import os
import sys


@contextlib.contextmanager
def quiet():
    """Keeps what libraries write straight to stderr (no driver found, slow constant folding) off the terminal."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
