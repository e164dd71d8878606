"""What a person sees while it trains (a bar on a terminal, plain lines elsewhere), and where the time went."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from tqdm import tqdm

REDRAW_SECONDS = 0.1
RATE_SECONDS = 5.0  # the rate on show is the mean over about this long


class Clock:
    """Seconds of compiling, training and pausing (evaluation, samples, checkpoints), each on its own account.

    The time until the first step has finished is compilation: it is no measure of speed. Every later interval between
    two `tick`s is training, less what `pause` took.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.compile_seconds = self.train_seconds = self.pause_seconds = 0.0
        self.timed_steps = 0.0  # the steps that train_seconds paid for
        self._now = now
        self._since = now()
        self._training = 0.0  # seconds since the last tick, before the pauses in between
        self._compiled = self._paused = False

    def tick(self, steps: int) -> float | None:
        """`steps` more steps have finished: the seconds they took, or None where that was compilation."""
        seconds, self._training = self._training + self._lap(), 0.0
        if not self._compiled:
            self._compiled = True
            self.compile_seconds += seconds
            return None
        self.train_seconds += seconds
        self.timed_steps += steps
        return seconds

    @contextlib.contextmanager
    def pause(self):
        """A pause inside a pause is one pause."""
        if self._paused:
            yield
            return
        self._training += self._lap()
        self._paused = True
        try:
            yield
        finally:
            self.pause_seconds += self._lap()
            self._paused = False

    def state(self) -> dict[str, float]:
        """The totals up to now; only a step in flight is left out."""
        if self._paused:
            self.pause_seconds += self._lap()
        names = ("compile_seconds", "train_seconds", "pause_seconds", "timed_steps")
        return {name: float(getattr(self, name)) for name in names}

    def restore(self, state: Mapping[str, float]) -> None:
        """Add the totals of the runs before this one."""
        for name, value in state.items():
            setattr(self, name, getattr(self, name) + value)

    def _lap(self) -> float:
        since, self._since = self._since, self._now()
        return self._since - since


class Progress:
    """A bar (on a terminal) or a line every `every` steps (elsewhere), never both; silent with `active=False`.

    Call `update` when a step's metrics have arrived, and before a `pause` let the step in flight arrive too, or its
    time is booked as pause. `tokens_per_step` counts whatever `unit` names (tokens, images); `device`, when given, is
    asked for its peak memory.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        tokens_per_step: int = 1,
        unit: str = "tokens",
        every: int = 100,
        device=None,
        stream=None,
        active: bool = True,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.clock = Clock(now)
        self._now, self._device, self._stream = now, device, stream or sys.stdout
        self._total_steps, self._step, self._every = total_steps, start_step, every
        self._tokens_per_step, self._unit = tokens_per_step, unit
        self._recent: deque[tuple[int, float]] = deque()  # (steps, seconds) of the last RATE_SECONDS
        self._recent_steps, self._recent_seconds = 0, 0.0
        self._drawn = float("-inf")
        self._active = active
        self._bar = None
        if active and self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar:20}| {percentage:3.0f}%{postfix}",
            )

    def update(self, step: int, metrics: Mapping) -> float | None:
        """Steps up to `step` have finished; shows `loss`, and `skipped` (so far, in all) where it is not 0, from `metrics`.

        Returns the tokens/s since the last update, or None where that time was compilation.
        """
        steps, self._step = step - self._step, step
        seconds = self.clock.tick(steps)
        if seconds is not None:
            self._remember(steps, seconds)
        if self._active:
            self._show(metrics)
        return None if seconds is None else self._tokens_per_step * steps / max(seconds, 1e-9)

    def rewind(self, step: int) -> None:
        """Go back to an earlier step (a roll back); the time of the lost steps stays on the clock."""
        self._step = step

    def pause(self):
        """`with progress.pause(): evaluate(...)`: this time does not count as training."""
        return self.clock.pause()

    def note(self, text: str) -> None:
        """Print a line (or several) above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._active:
            print(text, file=self._stream, flush=True)

    @property
    def tokens_per_second(self) -> float | None:
        """Over all the training time of this run, earlier starts included; None before the second step."""
        seconds = self.clock.train_seconds
        return self._tokens_per_step * self.clock.timed_steps / seconds if seconds else None

    def state(self) -> dict[str, float]:
        """Totals for the checkpoint: a flat dict of floats."""
        return self.clock.state()

    def restore(self, state: Mapping[str, float]) -> None:
        """Carry on from `state()` of an earlier start."""
        self.clock.restore(state)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _remember(self, steps: int, seconds: float) -> None:
        self._recent.append((steps, seconds))
        self._recent_steps += steps
        self._recent_seconds += seconds
        while len(self._recent) > 1 and self._recent_seconds - self._recent[0][1] > RATE_SECONDS:
            steps, seconds = self._recent.popleft()
            self._recent_steps -= steps
            self._recent_seconds -= seconds

    def _show(self, metrics: Mapping) -> None:
        last = self._step >= self._total_steps
        if self._bar is None:
            if self._step % self._every == 0 or last:
                width = len(str(self._total_steps))
                line = ", ".join([f"step {self._step:>{width}}/{self._total_steps}", *self._words(metrics)])
                print(line, file=self._stream, flush=True)
        elif last or self._now() - self._drawn >= REDRAW_SECONDS:
            self._drawn = self._now()
            self._bar.n = self._step
            self._bar.set_postfix_str(", ".join(self._words(metrics)), refresh=False)
            self._bar.refresh()

    def _words(self, metrics: Mapping) -> list[str]:
        words = [f"loss {float(metrics['loss']):.4f}"] if "loss" in metrics else []
        if self._recent_seconds > 0:
            rate = self._recent_steps / self._recent_seconds
            words.append(f"{amount(rate * self._tokens_per_step)} {self._unit}/s")
            # Pauses will go on taking their share of the time.
            share = 1 + self.clock.pause_seconds / self.clock.train_seconds
            words.append(f"{duration((self._total_steps - self._step) / rate * share)} left")
        if (peak := peak_bytes(self._device)) is not None:
            words.append(f"peak {peak / 2**30:.2f} GiB")
        if skipped := int(metrics.get("skipped", 0)):
            words.append(f"{skipped} skipped")
        return words


def peak_bytes(device) -> int | None:
    """The most device memory that was ever in use, where the device says so (a GPU does, a CPU does not)."""
    return ((device.memory_stats() if device is not None else None) or {}).get("peak_bytes_in_use")


def amount(number: float) -> str:
    """Three figures and a unit: 950, 1.23k, 45.6k, 1.02M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * factor:
            scaled = number / factor
            return f"{scaled:.{max(0, 3 - len(str(int(abs(scaled)))))}f}{suffix}"
    return f"{number:.3g}" if abs(number) < 100 else f"{number:.0f}"


def duration(seconds: float) -> str:
    """0:07, 12:34, 3:05:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
