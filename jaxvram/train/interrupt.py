"""SIGTERM and Ctrl-C end a run after the step at hand, with a checkpoint; a second Ctrl-C ends it at once."""

import contextlib
import signal


class Interrupt:
    """`received` is the signal that asked the run to stop, or None."""

    def __init__(self):
        self.received: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self):
        """Handlers are put back at the end; outside the main thread, where Python allows none, nothing is listened to."""
        before = {}

        def handle(number, frame):
            if self.received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = signal.Signals(number)

        with contextlib.suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, handle)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
