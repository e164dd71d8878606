import numpy as np
import pytest

from jaxvram.data import DataConfig, load
from jaxvram.data.pipeline import batches
from jaxvram.errors import UserError


def test_batches_come_in_order_from_any_step_and_are_the_sources():
    source = load(DataConfig(name="adder"), 6, seed=0)
    for first, rows in ((0, slice(None)), (37, slice(1, 3))):
        ahead = batches(source, "train", first, 4, rows)
        for n in range(first, first + 40):  # more than one group
            got, batch = next(ahead)
            expected = source.batch("train", n, 4, rows)
            assert got == n and all((batch[k] == expected[k]).all() for k in expected)
        ahead.close()


def test_an_error_in_a_worker_thread_arrives_as_it_is():
    class Source:
        example_size = 4

        def batch(self, split, n, batch_size, rows):
            if n == 20:
                raise UserError("token 7 is too large")
            return {"tokens": np.zeros((batch_size, 4), np.int32)}

    with pytest.raises(UserError, match="token 7"):
        list(zip(range(100), batches(Source(), "train", 0, 2), strict=False))
