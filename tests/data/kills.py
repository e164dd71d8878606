"""A preparation that is killed between two files."""

import contextlib
import os

import pytest


@contextlib.contextmanager
def killed_after(files: int, monkeypatch):
    """Of what runs inside, so many files get their names, and no more: then it must die."""
    replace, left = os.replace, [None] * files

    def replace_some(part, file):
        if not left:
            raise RuntimeError("killed")
        left.pop()
        replace(part, file)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(os, "replace", replace_some)
        yield
