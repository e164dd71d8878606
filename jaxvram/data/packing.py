"""Examples of different lengths into rows of one length, another way every epoch, in the same number of rows."""

import numpy as np


class Packing:
    """Which examples share a row.

    By best fit, the longest first: how many rows that takes, and of which lengths each is made, depends on the lengths
    alone. So an epoch is a draw of which examples of a length go where and of the order of the rows, and the rows before
    any epoch are known without packing those epochs.

    Args:
      together: False puts every example into a row of its own.
    """

    def __init__(self, length_N: np.ndarray, capacity: int, together: bool):
        self._length_N = length_N
        falling_N = np.sort(length_N)[::-1]
        row_N = best_fit(falling_N, capacity) if together else np.arange(len(length_N))
        self.rows = int(row_N.max()) + 1
        self._place_N = np.argsort(row_N, kind="stable")  # places in `falling_N`, row by row
        self._start_R = np.searchsorted(row_N[self._place_N], np.arange(self.rows + 1))

    def arranged(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The examples of each row, as `rng` draws them."""
        drawn_N = rng.permutation(len(self._length_N))
        example_N = drawn_N[np.argsort(-self._length_N[drawn_N], kind="stable")]  # of each place: one of its length
        rows = np.split(example_N[self._place_N], self._start_R[1:-1])
        return [rows[i] for i in rng.permutation(self.rows)]


def best_fit(falling_N: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each of these lengths, int64 (N,): the fullest one that has room for it, else a new one."""
    row_N = np.empty(len(falling_N), np.int64)
    with_room = [[] for _ in range(capacity + 1)]  # rows by the room that is left
    rooms = 0  # bit r: some row has room r; the lowest such bit from `length` on is found at the speed of an addition
    rows = 0
    for i, length in enumerate(falling_N.tolist()):
        if fits := rooms >> length:
            room = length + (fits & -fits).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, row, rows = capacity, rows, rows + 1
        if room > length:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
        row_N[i] = row
    return row_N
