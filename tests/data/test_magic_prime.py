"""The order of RWKV's authors: their prime, their samples, each window once, and what is held out."""

import math

import numpy as np
import pytest

from jaxvram.data import DataConfig, load
from jaxvram.data.magic_prime import magic_prime, window_of
from jaxvram.data.order import example_indices
from jaxvram.data.shards import write_shard
from jaxvram.errors import UserError


def test_the_published_prime():
    """demo-training-run.sh: minipile, 1,498,226,207 tokens, ctx 512."""
    assert magic_prime((1_498_226_207 - 1) // 512) == 2_926_181


@pytest.mark.parametrize("T", [1, 4, 7])
def test_the_prime_is_the_authors_for_every_length(T):
    """The largest prime 3n + 2 below tokens / T - 1, by a sieve."""
    primes = [n for n in range(2, 400) if all(n % k for k in range(2, n)) and n % 3 == 2]
    for tokens in range(5 * T, 60 * T):
        if theirs := [p for p in primes if p < tokens / T - 1]:
            assert magic_prime((tokens - 1) // T) == theirs[-1], tokens


def test_samples_are_the_authors():
    """Their loops over epochs of 40320 samples, batches and a rank of one."""
    ctx_len, data_size, p, micro_bsz = 512, 1_498_226_207, 2_926_181, 16
    theirs = []
    for epoch, idx in [(0, i) for i in range(64)] + [(71, 40_319), (72, 0), (73, 12_345)]:
        ii = 1 + epoch * 40320 + (idx * 1) + 0
        theirs.append(((int(p * ((math.sqrt(5) - 1) / 2)) * ii * ii * ii) % p) * ctx_len)
    windows = (data_size - 1) // ctx_len
    of_batches = [example_indices("magic_prime", 7, "train", n, micro_bsz, slice(None), windows) for n in range(4)]
    assert (512 * np.concatenate(of_batches)).tolist() == theirs[:64]
    later = np.array([71 * 40320 + 40_319, 72 * 40320, 73 * 40320 + 12_345])
    assert (512 * window_of(later, windows)).tolist() == theirs[64:]
    assert (example_indices("magic_prime", 0, "train", 3, micro_bsz, slice(5, 9), windows) == of_batches[3][5:9]).all()


@pytest.mark.parametrize("windows", [3, 6, 1000, 4099])
def test_each_window_below_the_prime_once_then_again(windows):
    p = magic_prime(windows)
    once = window_of(np.arange(p), windows)
    assert sorted(once) == list(range(p)) and (window_of(np.arange(p, 2 * p), windows) == once).all()


def test_no_prime_in_too_short_a_text():
    with pytest.raises(UserError, match=r"at least 3 windows of model.block_size, not 2"):
        magic_prime(2)


@pytest.fixture
def shard(tmp_path):
    """Every token is its own position."""
    write_shard(tmp_path / "text.bin", np.arange(1000))
    return str(tmp_path / "text.bin")


def test_whole_text_as_the_authors_and_the_rest_held_out(shard):
    """62 windows of 16, of which p = 59 are read; val begins with the last token that a window's targets have."""
    source = load(DataConfig(path=shard, tokenizer="gpt2", order="magic_prime", val_fraction=0), 16, 0)
    assert source.description.endswith("; the order's prime is 59")
    rows = np.concatenate([source.batch("train", n, 8)["targets"] for n in range(8)])
    assert set(rows.ravel()) == set(range(1, 59 * 16 + 1))
    held_out = np.concatenate([source.batch("val", n, 1)["targets"] for n in range(3)])
    assert held_out.ravel().tolist() == list(range(59 * 16 + 1, 62 * 16 + 1))


def test_a_share_is_held_out_before_if_asked(shard):
    source = load(DataConfig(path=shard, tokenizer="gpt2", order="magic_prime", val_fraction=0.5), 16, 0)
    assert "500 tokens to train on, 500 held out" in source.description and source.description.endswith("prime is 29")
    assert source.batch("val", 0, 1)["tokens"][0, 0] == 500


def test_what_has_no_such_order_is_told(shard, tmp_path):
    for change, message in (
        ({"order": "shuffled", "val_fraction": 0}, "val_fraction=0 must lie between"),
        ({"name": "adder", "path": None}, "magic_prime is for data.name=text"),
    ):
        with pytest.raises(UserError, match=message):
            load(DataConfig(**({"path": shard, "tokenizer": "gpt2", "order": "magic_prime"} | change)), 16, 0)
    write_shard(tmp_path / "more.bin", np.arange(1000))
    with pytest.raises(UserError, match=r"reads one text, and .* has 2 to train on: join them"):
        load(DataConfig(path=str(tmp_path), tokenizer="gpt2", order="magic_prime"), 16, 0)
