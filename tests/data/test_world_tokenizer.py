"""RWKV's world vocabulary: greedy, as the `rwkv` package does it, on any text; and what a damaged file says."""

import importlib.util

import numpy as np
import pytest

from jaxvram import data
from jaxvram.data.text import named_tokenizer
from jaxvram.data.world_tokenizer import FILE, world_tokenizer
from jaxvram.errors import UserError

needs_rwkv = pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="needs rwkv")


@pytest.fixture
def small(tmp_path):
    """Every byte, and a few longer tokens, in the format of the real file."""
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abcd", " hello world", "é\n", b"\xe2\x82"]
    as_bytes = lambda t: t.encode() if isinstance(t, str) else t
    lines = [f"{i} {t!r} {len(as_bytes(t))}\n" for i, t in enumerate(tokens, 1)]
    (tmp_path / FILE).write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_the_longest_token_that_fits_is_taken(small):
    tokenizer = world_tokenizer(small)
    assert tokenizer.encode("abcabcd hello worlds").tolist() == [257, 100, 258, 259, 116]
    for text in ("", "abc", "é\n€ \U0001f600\x00", "ab" * 50):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, 257, 65535]) == "ab\ufffd" and tokenizer.vocab_size == 65536 and tokenizer.eot == 0
    assert named_tokenizer("world", str(small / FILE)).identity == tokenizer.identity and "world" in data.TOKENIZERS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("'abcd' 4", "'abcd' 5"), "id 258 has 4 bytes, and should have 5"),
        (lambda text: text.replace("'abcd'", "open('x')"), "is damaged or is not RWKV's"),
        (lambda text: text.split("\n", 1)[1], "must have every byte"),
    ],
)
def test_damaged_files_are_told(small, change, message):
    text = (small / FILE).read_text().replace("b'abcd'", "'abcd'")
    (small / FILE).write_text(change(text))
    with pytest.raises(UserError, match=message):
        world_tokenizer(small)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"there is no such file\. RWKV's vocabulary is not on this machine"):
        world_tokenizer(tmp_path)


@needs_rwkv
def test_equals_the_rwkv_package():
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    folder = importlib.util.find_spec("rwkv").submodule_search_locations[0]
    theirs, ours = TRIE_TOKENIZER(f"{folder}/{FILE}"), world_tokenizer()
    random = np.random.RandomState(0)
    texts = ["hello world", "Größe 数学 \U0001f600\r\n\t  x = f(y)", "".join(map(chr, range(1, 3000)))]
    texts += ["".join(map(chr, random.randint(1, 0xD7FF, 300))) for _ in range(5)]
    for text in texts:
        assert ours.encode(text).tolist() == theirs.encode(text) and ours.decode(theirs.encode(text)) == text
    assert ours.encode("hello world").tolist() == [34550, 40213]
