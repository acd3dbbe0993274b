"""What a person sees while a checkpoint is written: bytes, rate, time left."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class WritingBar:
    """A progress bar on standard error, as a context."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def start(self, total: int) -> None:
        """Open the bar for a number of bytes."""
        self._bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc="writing",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )

    def update(self, count: int) -> None:
        """Some bytes more are written."""
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> WritingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error as the bar is."""
    print(text, file=sys.stderr, flush=True)
