"""The clock keeps its accounts apart; a terminal gets a bar, a pipe gets lines, never both."""

import io

import pytest

from jaxvram.train.progress import Clock, Progress, amount, duration


class Time:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


@pytest.fixture
def now():
    return Time()


def run(progress, now, steps, seconds=0.5, **metrics):
    for step in steps:
        now.seconds += seconds
        progress.update(step, {"loss": 2.0, **metrics})


def test_compile_training_and_pause_are_separate_accounts(now):
    clock = Clock(now)
    with clock.pause():
        now.seconds += 5  # an evaluation before the first step
    now.seconds += 20
    assert clock.tick(1) is None  # the first step compiles
    now.seconds += 1
    assert clock.tick(1) == 1
    now.seconds += 0.25
    with clock.pause():
        now.seconds += 60
        with clock.pause():
            now.seconds += 40
        now.seconds += 1
    now.seconds += 0.75
    assert clock.tick(2) == 1  # 101 s of pause in its middle left out
    assert clock.state() == {"compile_seconds": 20, "train_seconds": 2, "pause_seconds": 106, "timed_steps": 3}


def test_state_within_a_pause_counts_it_and_leaves_the_step_in_flight(now):
    clock = Clock(now)
    clock.tick(1)
    now.seconds += 3
    clock.tick(1)
    now.seconds += 7  # in flight
    with clock.pause():
        now.seconds += 2
        assert clock.state()["pause_seconds"] == 2 and clock.state()["train_seconds"] == 3
    assert clock.state()["pause_seconds"] == 2
    assert clock.tick(1) == 7


def test_totals_survive_a_restart(now):
    before = Progress(100, tokens_per_step=10, now=now, stream=io.StringIO())
    run(before, now, range(1, 12))
    saved = before.state()
    assert all(type(value) is float for value in saved.values())
    after = Progress(100, start_step=11, tokens_per_step=10, now=now, stream=io.StringIO())
    now.seconds += 30  # compiles again
    after.update(12, {})
    after.restore(saved)  # adds, whenever it comes
    run(after, now, range(13, 23), seconds=1.0)
    assert after.state() == {"compile_seconds": 30.5, "train_seconds": 15, "pause_seconds": 0, "timed_steps": 20}
    assert after.tokens_per_second == pytest.approx(10 * 20 / 15)


def test_update_returns_the_rate_since_the_last_one(now):
    progress = Progress(100, tokens_per_step=1000, now=now, stream=io.StringIO())
    assert progress.tokens_per_second is None
    assert progress.update(1, {}) is None
    now.seconds += 2
    assert progress.update(5, {}) == pytest.approx(4 * 1000 / 2)
    progress.rewind(3)  # rolled back: two steps have to be done again
    now.seconds += 1
    assert progress.update(4, {}) == pytest.approx(1000)


def test_a_pipe_gets_plain_lines(now):
    out = io.StringIO()
    progress = Progress(25, tokens_per_step=6144, every=10, now=now, stream=out)
    run(progress, now, range(1, 20))
    progress.note("val loss 1.9")
    run(progress, now, range(20, 26), skipped=3)
    progress.close()
    assert out.getvalue().splitlines() == [
        "step 10/25, loss 2.0000, 12.3k tokens/s, 0:08 left",
        "val loss 1.9",
        "step 20/25, loss 2.0000, 12.3k tokens/s, 0:02 left, 3 skipped",
        "step 25/25, loss 2.0000, 12.3k tokens/s, 0:00 left, 3 skipped",
    ]


def test_the_rate_on_show_is_a_recent_one(now):
    out = io.StringIO()
    progress = Progress(60, tokens_per_step=100, every=60, now=now, stream=out)
    run(progress, now, range(1, 31), seconds=2)
    run(progress, now, range(31, 61), seconds=0.5)
    assert " 200 tokens/s" in out.getvalue()


def test_time_left_expects_as_many_pauses_as_before(now):
    out = io.StringIO()
    progress = Progress(100, every=50, now=now, stream=out)
    run(progress, now, range(1, 26), seconds=1)
    with progress.pause():
        now.seconds += 49 / 2  # half as long as all the training up to step 50
    run(progress, now, range(26, 51), seconds=1)
    assert "1:15 left" in out.getvalue()


def test_a_terminal_gets_a_bar_and_notes_stand_above_it(now):
    out = Terminal()
    progress = Progress(100, start_step=10, tokens_per_step=100, unit="images", every=1, now=now, stream=out)
    run(progress, now, range(11, 31))
    progress.note("a sample")
    run(progress, now, range(31, 41))
    progress.close()
    screen = out.getvalue()
    assert "40/100" in screen and " 40%" in screen and "loss 2.0000, 200 images/s, 0:30 left" in screen
    assert "\ra sample\n" in screen  # on a line that was cleared for it
    assert "step 40" not in screen  # no plain lines
    assert screen.count("\n") == 2  # the note, and the end of the bar


def test_the_bar_is_not_redrawn_at_every_step(now):
    out = Terminal()
    progress = Progress(10**6, now=now, stream=out)
    run(progress, now, range(1, 1001), seconds=0.001)
    assert out.getvalue().count("\r") < 30
    progress.close()


def test_peak_memory_is_shown_where_the_device_knows_it(now):
    for device, shown in ((Device({"peak_bytes_in_use": 3 * 2**29}), True), (Device(None), False), (Device({}), False)):
        out = io.StringIO()
        run(Progress(1, every=1, device=device, now=now, stream=out), now, [1])
        assert ("peak 1.50 GiB" in out.getvalue()) == shown


def test_inactive_is_silent_but_keeps_time(now):
    for out in (io.StringIO(), Terminal()):
        progress = Progress(10, every=1, now=now, stream=out, active=False)
        run(progress, now, range(1, 11))
        progress.note("x")
        progress.close()
        assert out.getvalue() == "" and progress.state()["train_seconds"] == 4.5


def test_numbers_for_people():
    assert [amount(x) for x in (0.1234, 12.34, 950.4, 999.6, 1234, 45678, 456789, 999_999, 1.02e6)] == [
        "0.123", "12.3", "950", "1.00k", "1.23k", "45.7k", "457k", "1.00M", "1.02M"
    ]  # fmt: skip
    assert [duration(x) for x in (7.4, 59.6, 754, 11100)] == ["0:07", "1:00", "12:34", "3:05:00"]
