"""RWKV's world vocabulary: 65,529 tokens of bytes, and the longest one that fits is taken, from left to right."""

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from jaxvram.errors import UserError

FILE = "rwkv_vocab_v20230424.txt"
ROWS = 65536  # of the tables of all models that read it; ids from 65,530 on mean nothing
NO_WORLD = (
    f"RWKV's vocabulary is not on this machine. Two ways out: `pip install --no-deps rwkv`, which ships it; or set "
    f"data.vocab_path to {FILE} of ChatRWKV, or a folder with it"
)


class WorldTokenizer:
    """`tokens` are the bytes of each id; id 0 stands before each document."""

    name, vocab_size, eot = "world", ROWS, 0

    def __init__(self, tokens: dict[int, bytes]):
        self._tokens = {0: b"", **tokens}
        digest = hashlib.sha256(b"".join(b"%d %d " % (i, len(t)) + t for i, t in sorted(tokens.items()))).hexdigest()
        self.identity = f"RWKV's world vocabulary, {digest[:12]}"
        self._root: list = [{}, None]  # a node: children by byte, and the id that ends here
        for i, token in tokens.items():
            node = self._root
            for byte in token:
                node = node[0].setdefault(byte, [{}, None])
            node[1] = i

    def encode(self, text: str) -> np.ndarray:
        """Every byte is a token, so any text has an encoding."""
        source, ids, start = text.encode("utf-8", "surrogatepass"), [], 0
        while start < len(source):
            node, at = self._root, start
            while at < len(source) and (node := node[0].get(source[at])) is not None:
                at += 1
                if node[1] is not None:
                    found, end = node[1], at
            ids.append(found)
            start = end
        return np.asarray(ids, np.int32)

    def decode(self, ids) -> str:
        nothing = "\ufffd".encode()
        return b"".join(self._tokens.get(int(i), nothing) for i in np.asarray(ids).ravel()).decode("utf-8", "replace")


def world_tokenizer(vocab_path: str | None = None) -> WorldTokenizer:
    """From the file or folder `vocab_path`, else from the `rwkv` package, which is not imported."""
    if vocab_path is None:
        package = importlib.util.find_spec("rwkv")
        folders = package.submodule_search_locations if package else None
        if not folders:
            raise UserError(NO_WORLD)
        vocab_path = folders[0]
    path = Path(vocab_path).expanduser()
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: there is no such file. {NO_WORLD}")
    return _read(file)


@functools.lru_cache(maxsize=1)
def _read(file: Path) -> WorldTokenizer:
    """A line is an id, a Python string or bytes, and how many bytes these are."""
    tokens = {}
    try:
        for line in file.read_text(encoding="utf-8").split("\n"):
            if not line:
                continue
            i, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            token = ast.literal_eval(literal)
            token = token.encode("utf-8") if isinstance(token, str) else token
            if len(token) != int(length) or not token:
                raise ValueError(f"id {i} has {len(token)} bytes, and should have {length}")
            tokens[int(i)] = token
    except (OSError, ValueError, SyntaxError, AttributeError, TypeError) as error:
        raise UserError(f"{file} is damaged or is not RWKV's vocabulary: {error}") from error
    if not {bytes([b]) for b in range(256)} <= set(tokens.values()) or max(tokens) >= ROWS or min(tokens) < 1:
        raise UserError(f"{file} is not RWKV's vocabulary: it must have every byte, and ids from 1 to {ROWS - 1:,}")
    return WorldTokenizer(tokens)
