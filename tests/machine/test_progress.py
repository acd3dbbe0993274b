"""What a log is told of work that takes long."""

import sys
import time

import pytest

from moebed.machine import progress
from moebed.machine.progress import Lines, Progress, duration, waiting
from moebed.machine.units import human


def _wait_for(capsys, words, seconds=5.0):
    """What was said until the words came."""
    said, end = "", time.monotonic() + seconds
    while words not in said:
        assert time.monotonic() < end, f"{words!r} was not said, but {said!r}"
        time.sleep(0.005)
        said += capsys.readouterr().err
    return said


def test_a_silence_is_broken_and_a_line_puts_it_off(capsys):
    count = iter(range(100))
    lines = Lines(lambda: f"still {next(count)}", first=0.05, silence=0.05)
    try:
        said = _wait_for(capsys, "still 1")
        lines._silence = 60
        lines.say("a line")
        capsys.readouterr()
        time.sleep(0.15)
        assert capsys.readouterr().err == ""
        assert not lines.is_due()
        assert lines.is_due(ahead=10.0)
    finally:
        lines.close()
    assert said.splitlines()[:2] == ["still 0", "still 1"]
    assert not lines._thread.is_alive()


def test_waiting_says_so_and_ends(capsys, monkeypatch):
    monkeypatch.setattr(Lines.__init__, "__defaults__", (0.05, 0.05))
    with waiting("preparing text"):
        _wait_for(capsys, "preparing text: 0 s so far")
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


def test_a_log_gets_whole_lines_of_amount_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(Lines.__init__, "__defaults__", (0.05, 0.05))
    with Progress(8 * 10**9, "B", initial=10**9) as work:
        work.describe("layer 3", "two of them")
        work.update(3 * 10**9)
        said = _wait_for(capsys, "left")
        work.say("done: a run")
        assert "done: a run\n" in capsys.readouterr().err
    line = said.splitlines()[-1]
    assert line.startswith("layer 3: 3 GB of 8 GB, ")
    assert "B/s, " in line
    assert line.endswith(" left, two of them")
    assert "\r" not in said


def test_time_left_is_by_what_was_done_since_the_start(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "Lines", lambda standing: None)
    work = Progress(100, "step", initial=40, description="2 of 5 runs")
    assert work.standing() == "2 of 5 runs: 40 of 100 steps, 0 s so far"
    clock[0] += 20
    work.update(50)
    assert work.standing() == "2 of 5 runs: 50 of 100 steps, 0.5 steps/s, 1 min 40 s left"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(10, "step") as work:
        work.update(4)
        work.update(7)
        assert (work._bar.n, work._lines) == (7, None)


def test_a_bar_counts_bytes_as_all_else_does(monkeypatch):
    """In powers of a thousand, as the plan and a file's size have them."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(1_494_242_960, "B") as work:
        assert "/1.49G " in str(work._bar)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_494_242_960, "1.49 GB"),
        (999_499_999, "999 MB"),
        (999_960_000, "1 GB"),
        (999.7, "1 kB"),
        (12, "12 B"),
        (0, "0 B"),
    ],
)
def test_sizes_have_three_digits(value, text):
    assert human(value, "B") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (42, "42 s"),
        (200, "3 min 20 s"),
        (15_850, "4 h 24 min"),
        (3 * 86400 + 7300, "3 d 2 h"),
        (-1, "0 s"),
    ],
)
def test_durations_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text
