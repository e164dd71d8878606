"""Parameters as two trees of one form: what is trained, and what is frozen.

Only the first has gradients and optimizer state, and only it is saved: the frozen part comes from where it came from at
first, a folder of weights or the seed.
"""

from collections.abc import Callable

from flax import traverse_util


def divide(params, is_trained: Callable[[str], bool]):
    """(trained, frozen): nested dicts with the leaves whose path `is_trained`, and with the others."""
    flat = traverse_util.flatten_dict(params)
    trained = {path for path in flat if is_trained("/".join(path))}
    part = lambda wanted: traverse_util.unflatten_dict({path: x for path, x in flat.items() if (path in trained) is wanted})
    return part(True), part(False)


def join(trained, frozen):
    """The parameters that `divide` divided."""
    if not frozen:
        return trained
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen))
