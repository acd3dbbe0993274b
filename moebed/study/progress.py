"""How far the runs of a study are: small files below ``OUT/status``, and progress on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from moebed.machine.progress import Progress


def status_path(out: Path, run: str, kind: str) -> Path:
    """What is known of a run: ``json`` its identity and outcome, ``log`` what it said, ``step``, ``lock``."""
    return out / "status" / f"{run}.{kind}"


def steps_done(out: Path, run: str) -> int:
    """Optimizer steps that a run has finished, as it last said."""
    try:
        return int(status_path(out, run, "step").read_text(encoding="utf-8") or 0)
    except (FileNotFoundError, ValueError):
        return 0


class StudyBar:
    """Steps of all runs together, with those that are under way; a context."""

    def __init__(self, out: Path, steps: Mapping[str, int]) -> None:
        self._out, self._steps = out, steps
        self._ended: dict[str, bool] = {}
        done = sum(min(steps_done(out, name), limit) for name, limit in steps.items())
        self._progress = Progress(sum(steps.values()), "step", done)

    def end(self, run: str, finished: bool) -> None:
        """A run has come to its last step, or will take no more steps although it has not."""
        self._ended[run] = finished

    def show(self, running: Iterable[str]) -> None:
        """Read how far the runs are."""
        done = {
            name: limit if self._ended.get(name) else min(steps_done(self._out, name), limit)
            for name, limit in self._steps.items()
        }
        to_do = sum(done[name] if name in self._ended else limit for name, limit in self._steps.items())
        finished = sum(self._ended.values())
        stopped = f", {len(self._ended) - finished} stopped" if finished < len(self._ended) else ""
        names = [f"{name.partition('/')[2]} {done[name]}/{self._steps[name]}" for name in running]
        self._progress.describe(f"{finished} of {len(self._steps)} runs{stopped}", ", ".join(names))
        self._progress.update(sum(done.values()), to_do)

    def standing(self) -> str:
        """How things stand, as a line."""
        return self._progress.standing()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._progress.say(text)

    def __enter__(self) -> StudyBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
