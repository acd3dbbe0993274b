"""What a person sees while a checkpoint is written: bytes, rate, time left."""

from __future__ import annotations

from types import TracebackType

from moebed.machine.progress import Progress


class WritingBar:
    """Progress on standard error, as a context."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def start(self, total: int) -> None:
        """Begin with a number of bytes."""
        self._progress = Progress(total, "B", description="writing")

    def update(self, count: int) -> None:
        """Some bytes more are written."""
        if self._progress is not None:
            self._progress.update(self._progress.done + count)

    def __enter__(self) -> WritingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.close()
