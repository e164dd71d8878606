"""No test here may reach the network, or find data that happens to lie on the machine."""

import os
import socket
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty cache, and connections to this machine only."""
    monkeypatch.setenv("JAXVRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXVRAM_DATA", raising=False)
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost"):
            raise OSError(f"a test asked for {address}")
        return connect(self, address)

    def no_names(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost"):
            raise socket.gaierror(f"a test asked for {host}")
        return getaddrinfo(host, *args, **kwargs)

    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", no_names)


@pytest.fixture
def shakespeare(monkeypatch):
    """The real text, where it is at hand: named by JAXVRAM_DATA."""
    if not SHAKESPEARE.is_file():
        pytest.skip(f"no {SHAKESPEARE}")
    monkeypatch.setenv("JAXVRAM_DATA", str(SHAKESPEARE.parent))
    return SHAKESPEARE
