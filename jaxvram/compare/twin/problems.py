"""What can be said in one line: to who asked, and about a variant."""


class TwinError(Exception):
    """The request cannot be answered at all; main.py prints the line and exits with status 2."""


class Refused(Exception):
    """One variant does not exist, or does not fit; the others may. The line goes into the answer."""
