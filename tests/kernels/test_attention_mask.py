"""Spans of blocks: what they leave out is hidden, what they call whole is seen, and nothing is visited in vain."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvram.kernels import attention_mask as masks
from jaxvram.kernels.attention_mask import Data, Rule

RANDOM = np.random.RandomState(0)
SORTED, SHUFFLED = np.sort(RANDOM.randint(0, 3, (2, 40)), -1), RANDOM.randint(0, 3, (2, 40))
CASES = {
    "causal": (Rule(), Data()),
    "full": (Rule(causal=False), Data()),
    "offset": (Rule(offset=11), Data()),
    "before_the_keys": (Rule(offset=-9), Data()),
    "traced": (Rule(offset=None), Data(offset=jnp.int32(13))),
    "window": (Rule(window=7), Data()),
    "window_offset": (Rule(window=3, offset=20), Data()),
    "lengths": (Rule(lengths=True), Data(lengths_B=jnp.array([17, 0]))),
    "lengths_full": (Rule(causal=False, lengths=True), Data(lengths_B=jnp.array([40, 13]))),
    "segments": (
        Rule(segments=True),
        Data(query_segments_BxT=jnp.asarray(SORTED[:, :33]), key_segments_BxS=jnp.asarray(SORTED)),
    ),
    "segments_in_disorder": (
        Rule(causal=False, segments=True),
        Data(query_segments_BxT=jnp.asarray(SHUFFLED[:, :33]), key_segments_BxS=jnp.asarray(SHUFFLED)),
    ),
    "all": (
        Rule(window=15, offset=4, lengths=True, segments=True),
        Data(
            lengths_B=jnp.array([30, 40]),
            query_segments_BxT=jnp.asarray(SORTED[:, :33]),
            key_segments_BxS=jnp.asarray(SORTED),
        ),
    ),
}
B, T, S = 2, 33, 40


def seen(rule, data):
    mask = masks.visible(rule, data, 0, T, S)
    return np.broadcast_to(True if mask is None else np.asarray(mask)[:, 0, 0], (B, T, S))


def test_visible_is_what_it_says():
    rule, data = CASES["all"]
    for b, t, s in np.ndindex(B, T, S):
        p = 4 + t
        expected = s <= p and s > p - 15 and s < data.lengths_B[b] and SORTED[b, t] == SORTED[b, s]
        assert seen(rule, data)[b, t, s] == expected


@pytest.mark.parametrize("blocks", [(8, 4), (4, 8), (16, 16)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["keys", "queries"])
def test_spans(name, blocks, side):
    (rule, data), (rows, columns) = CASES[name], blocks
    mask = seen(rule, data)
    if side == "keys":
        spans, mine, theirs = masks.key_spans(rule, data, B, T, S, rows, columns), rows, columns
    else:
        spans, mine, theirs = masks.query_spans(rule, data, B, T, S, rows, columns), columns, rows
        mask = mask.swapaxes(1, 2)
    assert spans.shape == (B, -(-mask.shape[1] // mine), 6)
    for b, i in np.ndindex(spans.shape[:2]):
        first, whole, whole_end, end = (int(n) for n in spans[b, i, :4])
        assert 0 <= first <= whole <= whole_end <= end <= -(-mask.shape[2] // theirs)
        block = mask[b, i * mine : (i + 1) * mine]
        by_block = [block[:, j * theirs : (j + 1) * theirs] for j in range(-(-mask.shape[2] // theirs))]
        some = [j for j, part in enumerate(by_block) if part.any()]
        assert all(first <= j < end for j in some), "a block that is seen is left out"
        for j in range(whole, whole_end):
            assert by_block[j].all() and by_block[j].shape[1] == theirs, "a block called whole hides something"
        if not rule.segments and rule.offset != -9:
            assert end - first <= (max(some) - min(some) + 1 if some else 0), "a block is visited in vain"


def test_heads_packed_into_rows_share_a_position():
    rule = Rule(offset=None)
    data = Data(offset=jnp.int32(5))
    spans = masks.key_spans(rule, data, 1, 12, 40, 16, 4, rows_per_token=4)  # three tokens of four heads, at 5, 6, 7
    assert spans[0, 0].tolist() == [0, 0, 1, 2, 5, 40]
