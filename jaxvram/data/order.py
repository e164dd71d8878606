"""Which examples make batch n: a function of (seed, split, n) alone, so any n costs the same and nothing is stored."""

import numpy as np

from jaxvram.data.magic_prime import window_of

SPLITS = ("train", "val")
ORDERS = ("random", "shuffled", "magic_prime")
_VAL_SEED = 0x6A617876  # the val batches are the same for every seed, so that runs can be compared


def generator(seed: int, split: str, n: int) -> np.random.Generator:
    """A stream of its own for each (seed, split, n): Philox keyed by seed and split, its counter set to n * 2^128."""
    key = (seed if split == "train" else _VAL_SEED) % 2**64
    words = lambda *w: np.array(w, np.uint64)  # a plain list of large integers would become floats
    return np.random.Generator(np.random.Philox(key=words(key, SPLITS.index(split)), counter=words(0, 0, n, 0)))


def example_indices(order: str, seed: int, split: str, n: int, batch_size: int, rows: slice, count: int) -> np.ndarray:
    """The indices in [0, count) of `rows` of batch n, int64.

    random: drawn with replacement, as nanoGPT and minGPT do. shuffled: train sees every example once an epoch, in an
    order of the epoch's own; val goes through the examples in order, as llm.c does. magic_prime: train as RWKV's authors,
    in one order for every seed; val likewise in order.
    """
    if order == "random":
        return generator(seed, split, n).integers(count, size=batch_size)[rows]
    index_B = n * batch_size + np.arange(batch_size)[rows]
    if split == "val":
        return index_B % count
    if order == "magic_prime":
        return window_of(index_B, count)
    # here, not above: worker processes of prepare.py would pay two seconds for an import that they do not use
    from grain.experimental import index_shuffle

    def shuffled(epoch, position):  # a pseudo-random permutation computed pointwise: no table of 10^7 windows
        epoch_seed = int(np.random.SeedSequence((seed % 2**64, epoch)).generate_state(1)[0])
        return index_shuffle(position, max_index=count - 1, seed=epoch_seed, rounds=4)

    return np.array([shuffled(*divmod(int(i), count)) for i in index_B], np.int64)
