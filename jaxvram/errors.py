"""The one exception that is meant for a person: launch.py prints it as a single line and exits with status 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: a path, a name, a number, a damaged file. The message says how."""


def nearest(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` when an option is close to `word`, then the options: the tail of an error message."""
    options = sorted(str(option) for option in options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (valid: {', '.join(options)})"
