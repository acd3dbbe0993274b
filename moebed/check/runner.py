"""Climbs the ladder: a process a step, ended when its time is over; what is kept is not measured again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from moebed.check.contract import MINUTES, Finding, Ladder, Step, Verdict
from moebed.check.record import Record
from moebed.check.worker import AGAIN, NO_GPU, record_path
from moebed.errors import UserError
from moebed.machine.progress import Lines, duration, say
from moebed.machine.termination import asked_to_end
from moebed.study.runner import last_words

POLL_SECONDS = 0.1
LONGEST_TICK = 1.0  # between two looks; what is longer, this process did not have, and neither had the steps
LEAST_SECONDS = 5.0  # a step that would have less is not begun
IDENTITY_SECONDS = 120.0


class StoppedError(UserError):
    """A person stopped the check."""

    exit_code = 130


class Running:
    """The process of a step.

    Args:
        step: The step.
        record: What is kept of it.
        out: The folder of the whole check.
        ladder: The module that the process finds the step in.
        seconds: Its time.
        row_seconds: Time of one row.
        environment: Of the process.
    """

    def __init__(
        self,
        step: Step,
        record: Record,
        out: Path,
        ladder: str,
        seconds: float,
        row_seconds: float,
        environment: Mapping[str, str],
    ) -> None:
        self.step, self.record, self.out, self.ladder = step, record, out, ladder
        self.seconds, self.row_seconds, self.environment = seconds, row_seconds, environment
        self.used = 0.0
        self._quiet, self._written = 0.0, 0
        self._log = out / "logs" / f"{step.name}.log"
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._quiet, self._begin = 0.0, self._log.stat().st_size if self._log.exists() else 0
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return start_worker([self.ladder, self.step.name, str(self.out)], log, log, self.environment)

    def look(self, seconds: float) -> bool:
        """So many seconds have passed; returns whether the step is done with."""
        self.used += seconds
        written = self._last_written()
        if written != self._written:
            self._written, self._quiet = written, 0.0
            self.record = Record.load(self.record.path, self.record.identity)
        self._quiet += seconds
        code = self._process.poll()
        if code is None and self._quiet < self.row_seconds and self.used < self.seconds:
            return False
        if code is None:
            self.end()
        self.record = Record.load(self.record.path, self.record.identity)
        if code is None:
            self._note_time_is_over()
        elif code not in (0, AGAIN) and not self.record.is_complete:
            self._note_ending(f"({_ending(code)}): {self._last_words()}")
        if code == 0 or self.record.is_complete or not self.record.names or self.record.stopped:
            return True
        if self.used + LEAST_SECONDS > self.seconds:
            self._stop()
            return True
        self._process = self._start()
        return False

    def standing(self) -> str:
        """What it is at."""
        ended, row = len(self.record.findings), self.record.under_way
        return f"{self.step.name}: {ended} rows in {self.used:.0f} s{', at ' + row if row else ''}"

    def _note_ending(self, said: str) -> None:
        if self.record.under_way is not None:
            self._note(Verdict.WRONG, f"its process ended {said}")
        else:
            self.record.stop(f"its process ended before a row began {said}", is_broken=True)

    def _note_time_is_over(self) -> None:
        if self._quiet < self.row_seconds:
            self._stop()
        elif self.record.under_way is not None:
            self._note(Verdict.SLOW, f"had not ended after {duration(self.row_seconds)}, and was ended")
        elif not self.record.names:
            self.record.stop(f"began no row in {duration(self.row_seconds)}", is_broken=True)

    def _note(self, verdict: Verdict, said: str) -> None:
        assert self.record.under_way is not None
        self.record.end(Finding(self.record.under_way, verdict, said))

    def _stop(self) -> None:
        self.record.stop(f"the step's {duration(self.seconds)} were over; the same command goes on")

    def _last_written(self) -> int:
        with suppress(OSError):
            return self.record.path.stat().st_mtime_ns
        return 0

    def _last_words(self) -> str:
        return last_words(self._log, self._begin)[:300]

    def end(self) -> None:
        """End the process, and whatever it started."""
        for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            if hasattr(os, "killpg"):
                with suppress(OSError):
                    os.killpg(self._process.pid, number)
            else:
                self._process.terminate()
            with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps its process from any signal
                self._process.wait(timeout=2.0)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def start_worker(
    arguments: list[str], stdout: int | IO[bytes], stderr: IO[bytes] | None, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """A process of ``moebed.check.worker``, which ends when this one does: it has its standard input from here."""
    return subprocess.Popen(
        [sys.executable, "-m", "moebed.check.worker", *arguments],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def find_identity() -> dict[str, Any]:
    """What figures hold for here, asked in a process of its own: torch may be broken, or hang.

    Raises:
        UserError: It does not say.
    """
    process = start_worker(["identity"], subprocess.PIPE, None, {})
    try:
        said, _ = process.communicate(timeout=IDENTITY_SECONDS)
        return json.loads(said.decode().strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        process.kill()
        raise UserError(
            f"this machine cannot be looked at ({type(error).__name__}); what `{sys.executable} -m moebed.check.worker"
            " identity` prints is wrong: mend the installation first"
        ) from error


Records = dict[str, Record]


def climb(
    module: str,
    ladder: Ladder,
    out: Path,
    minutes: float,
    fresh: bool = False,
    only: Collection[str] = (),
    after_rung: Callable[[Records], object] = lambda records: None,
) -> Records:
    """Run the steps of a ladder, rung after rung.

    Args:
        module: Where ``ladder`` is found as LADDER, by the steps' own processes.
        ladder: The steps.
        out: The folder of the check.
        minutes: For all of it; the steps' own times are scaled to it.
        fresh: Measure again what is kept.
        only: Names of the steps to run; all, if none is given.
        after_rung: Called with what there is so far.

    Returns:
        Every step's record by name, those that were not run included.

    Raises:
        StoppedError: SIGINT or SIGTERM came; what was measured is kept.
    """
    identity, left = find_identity(), 60.0 * minutes
    has_gpu, records = bool(identity["gpus"]), Records()
    for step in (step for rung in ladder for step in rung):
        path, is_chosen = record_path(out, step.name), not only or step.name in only
        records[step.name] = Record(path, identity) if fresh and is_chosen else Record.load(path, identity)
    for rung in ladder:
        chosen = [step for step in rung if not only or step.name in only]
        waiting = [step for step in chosen if not _is_settled(step, records[step.name], has_gpu)]
        left -= _climb_rung(waiting, records, out, module, minutes, left, has_gpu)
        after_rung(records)
    return records


def _is_settled(step: Step, record: Record, has_gpu: bool) -> bool:
    """Whether there is nothing to run: all is kept, or needs a GPU."""
    if step.needs_gpu and not has_gpu:
        record.names, record.findings = ["all"], {"all": Finding("all", Verdict.NOT_RUN, NO_GPU)}
        record.save()
        return True
    if record.is_complete:
        say(f"{step.name}: kept, {record.tally()}")
    return record.is_complete


def _climb_rung(
    waiting: list[Step],
    records: Records,
    out: Path,
    module: str,
    minutes: float,
    left: float,
    has_gpu: bool,
) -> float:
    """Run the steps of one rung; returns the seconds that it took."""
    side_by_side = max(1, min(_cores(), len(waiting)))
    running: dict[str, Running] = {}
    used, last = 0.0, time.monotonic()
    lines = Lines(lambda: "; ".join([each.standing() for each in list(running.values())]))
    try:
        with asked_to_end() as signals:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    step = waiting.pop(0)
                    started = _begin(step, records[step.name], out, module, minutes, left - used, has_gpu, side_by_side)
                    if started is not None:
                        running[step.name] = started
                time.sleep(POLL_SECONDS)
                now = time.monotonic()
                tick, last = min(now - last, LONGEST_TICK), now
                used += tick if running else 0.0
                for name, each in list(running.items()):
                    if each.look(tick):
                        records[name] = running.pop(name).record
                        said = records[name].stopped
                        lines.say(f"{name}: {records[name].tally()}, in {duration(each.used)}{said and f'; {said}'}")
                if signals:
                    raise StoppedError("stopped; the same command goes on where it was")
    finally:
        for each in running.values():
            each.end()
        lines.close()
    return used


def _begin(
    step: Step, record: Record, out: Path, module: str, minutes: float, left: float, has_gpu: bool, side_by_side: int
) -> Running | None:
    scale = minutes / MINUTES
    seconds = min(step.seconds * scale, left)
    if seconds < LEAST_SECONDS:
        record.stop(f"the {minutes:g} minutes were over; the same command goes on")
        return None
    record.stop("")
    say(f"{step.name}: {step.question}")
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // side_by_side)), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    environment = {name: value for name, value in environment.items() if name not in os.environ}
    environment |= {**step.environment, **({} if has_gpu else step.without_gpu)}
    return Running(step, record, out, module, seconds, step.row_seconds * max(1.0, scale), environment)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
