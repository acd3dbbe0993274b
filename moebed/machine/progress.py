"""How far a piece of work is, on standard error: a bar on a terminal, and in a log lines, never far apart."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

from moebed.machine.units import human
from moebed.ranks import starts_first

SECONDS = 10.0  # between lines


def say(text: str) -> None:
    """A line for the person who started a command, on standard error as the progress bar is; of several ranks one."""
    from lightning_utilities.core.rank_zero import (
        rank_zero_only,  # Lightning sets its rank, where it is imported at all
    )

    if getattr(rank_zero_only, "rank", 0) in (None, 0):
        print(text, file=sys.stderr, flush=True)


class Lines:
    """Lines of a log. A thread says how things stand whenever nothing was said for a while.

    Args:
        standing: Makes that line from what is known; it is called from the thread, so it computes nothing.
        first: Seconds to the first line.
        silence: Seconds after a line until the thread says one of its own.
    """

    def __init__(self, standing: Callable[[], str], first: float = SECONDS, silence: float = SECONDS) -> None:
        self._standing, self._silence = standing, silence
        self._last, self._next = time.monotonic(), time.monotonic() + first
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress lines")
        self._thread.start()

    def say(self, text: str) -> None:
        """A line now."""
        with self._lock:
            print(text, file=sys.stderr, flush=True)
            self._last = time.monotonic()
            self._next = self._last + self._silence

    def is_due(self, ahead: float = 0.0) -> bool:
        """Whether the line before would be too long ago ``ahead`` seconds from now."""
        return time.monotonic() + ahead - self._last >= SECONDS

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(max(0.01, self._next - time.monotonic())):
            if time.monotonic() >= self._next:
                self.say(self._standing())


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says every ten seconds that something of unknown length is still going on; of several ranks one does."""
    if not starts_first():
        yield
        return
    begin = time.monotonic()
    lines = Lines(lambda: f"{what}: {duration(time.monotonic() - begin)} so far")
    try:
        yield
    finally:
        lines.close()


class Progress:
    """A number of things done, of a total: tqdm's bar on a terminal, else a line every ten seconds; a context.

    Args:
        total: How many there are.
        unit: Their name; of bytes, B, which are shown in kB, MB and so on, a thousand to the next, as everywhere.
        initial: How many were done before.
        description: What is being done.
    """

    def __init__(self, total: int, unit: str, initial: int = 0, description: str = "") -> None:
        self.total, self.done, self._initial = total, initial, initial
        self._unit, self._description, self._detail = unit, description, ""
        self._begin = time.monotonic()
        self._bar: tqdm | None = None
        self._lines: Lines | None = None
        if sys.stderr.isatty():
            # Where things come in bursts the mean since the start is the better forecast, hence no smoothing.
            scale = {"unit_scale": True} if unit == "B" else {"smoothing": 0}
            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=unit,
                desc=description or None,
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.2,
                **scale,
            )
        else:
            self._lines = Lines(self.standing)

    def describe(self, description: str, detail: str = "") -> None:
        """What is being done now."""
        self._description, self._detail = description, detail
        if self._bar is not None:
            self._bar.set_description(description, refresh=False)
            self._bar.set_postfix_str(detail, refresh=False)

    def update(self, done: int, total: int | None = None) -> None:
        """So many are done by now, in all; of so many, where that has changed."""
        self.total = self.total if total is None else total
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(done - self.done)
        self.done = done

    def say(self, text: str) -> None:
        """A line beside."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._lines is not None:
            self._lines.say(text)

    def standing(self) -> str:
        """How things stand, as a line."""
        elapsed, new = time.monotonic() - self._begin, self.done - self._initial
        done = self._amount(self.done) if self._unit == "B" else f"{self.done:,}"
        parts = [f"{done} of {self._amount(self.total)}"]
        if new > 0:
            rate = f"{self._amount(new / elapsed)}/s" if self._unit == "B" else f"{new / elapsed:.3g} {self._unit}s/s"
            parts += [rate, f"{duration((self.total - self.done) * elapsed / new)} left"]
        else:
            parts.append(f"{duration(elapsed)} so far")
        parts += [self._detail] if self._detail else []
        return (f"{self._description}: " if self._description else "") + ", ".join(parts)

    def _amount(self, number: float) -> str:
        if self._unit == "B":
            return human(number, "B")
        return f"{number:,.0f} {self._unit}s"

    def close(self) -> None:
        """No more comes."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines is not None:
            self._lines.close()
        self._bar = self._lines = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 4 h 24 min, 5 d 3 h."""
    whole = round(max(0.0, seconds))
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"
