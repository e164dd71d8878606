"""Batches made ahead of the train loop by a few threads."""

import sys
from collections.abc import Iterator

import grain

THREADS = 2
AHEAD = 2  # groups of batches kept ready
GROUP_NUMBERS = 1 << 17  # a step too short for a hand-over between threads (0.1 to 0.2 ms) gets several batches in one


def batches(
    source, split: str, first_step: int, batch_size: int, rows: slice = slice(None)
) -> Iterator[tuple[int, dict]]:
    """Yields (n, source.batch(split, n, batch_size, rows)) for n = first_step, first_step + 1, ... without end.

    The numpy work runs beside the loop; in the loop's own thread a batch costs a few microseconds.
    """
    made = range(batch_size)[rows]
    group = max(1, min(16, GROUP_NUMBERS // max(1, len(made) * source.example_size)))

    def make(first: int):
        return [(n, source.batch(split, n, batch_size, rows)) for n in range(first, first + group)]

    # a range, and not a stateful dataset: where to go on after a restart is the argument first_step
    groups = grain.MapDataset.range(first_step, sys.maxsize - group, group).map(make)
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    for ready in groups.to_iter_dataset(options):
        yield from ready
