"""Climbs the ladder: a process a step, ended when its time is over; what is kept is not measured again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from moebed.check.contract import Finding, Ladder, Step, Verdict
from moebed.check.record import Record
from moebed.check.sharing import share
from moebed.check.worker import AGAIN, NO_GPU, SHOW_PLACE, record_path
from moebed.errors import UserError
from moebed.machine.last_words import last_words
from moebed.machine.progress import Lines, duration, say
from moebed.machine.termination import StoppedError, asked_to_end

POLL_SECONDS = 0.1
LONGEST_TICK = 1.0  # between two looks; what is longer, this process did not have, and neither had the steps
LEAST_SECONDS = 5.0  # a step that would have less, beside what it took to start before, is not begun
SHOWN_SECONDS = 0.2  # in which a process that is to be ended writes where it is
IDENTITY_SECONDS = 120.0


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
        self._folder = tempfile.TemporaryDirectory(prefix="moebed_check_", ignore_cleanup_errors=True)
        self._quiet, self._written = 0.0, 0
        self._log = out / "logs" / f"{step.name}.log"
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._quiet, self._begin = 0.0, self._log.stat().st_size if self._log.exists() else 0
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            folder = tempfile.mkdtemp(dir=self._folder.name)
            arguments = [self.ladder, self.step.name, str(self.out), folder, repr(time.time())]
            return start_worker(arguments, log, log, self.environment)

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
            self._kill()
        self.record = Record.load(self.record.path, self.record.identity)
        if code is None:
            self._note_time_is_over()
        elif code not in (0, AGAIN) and not self.record.is_complete:
            self._note_ending(f"({_ending(code)}): {self._last_words()}")
        is_done = code == 0 or self.record.is_complete or not self.record.names or bool(self.record.stopped)
        if not is_done and self.used + LEAST_SECONDS > self.seconds:
            self._stop()
            is_done = True
        if is_done:
            self.end()
        else:
            self._process = self._start()
        return is_done

    def standing(self) -> str:
        """What it is at."""
        ended, row = len(self.record.findings), self.record.under_way
        return f"{self.step.name}: {ended} rows in {self.used:.0f} s{', at ' + row if row else ''}"

    def ending(self) -> str:
        """What came of it, and in how long."""
        start, stopped = self.record.start_seconds, self.record.stopped
        said = f"{self.step.name}: {self.record.tally()}, in {duration(self.used)}"
        said += f", {duration(start)} of it to start" if start >= 1 else ""
        return said + (f"; {stopped}" if stopped else "")

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
        self.record.stop(f"the step's {duration(self.seconds)} were over; the same command goes on", after=self._quiet)

    def _last_written(self) -> int:
        with suppress(OSError):
            return self.record.path.stat().st_mtime_ns
        return 0

    def _last_words(self) -> str:
        return last_words(self._log, self._begin)[:300]

    def end(self) -> None:
        """End the process, and whatever it started; its folder goes."""
        self._kill()
        self._folder.cleanup()

    def _kill(self) -> None:
        """Not by a signal that a run obeys: it would stop, and be taken for one that had ended by itself."""
        if self._process.poll() is not None:
            return
        if SHOW_PLACE is not None:
            self._process.send_signal(SHOW_PLACE)
            time.sleep(SHOWN_SECONDS)
        if hasattr(os, "killpg"):
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
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
        minutes: For all of it, shared among the steps that have something to measure, by their own times.
        fresh: Measure again what is kept.
        only: Names of the steps to run; all, if none is given.
        after_rung: Called with what there is so far.

    Returns:
        Every step's record by name, those that were not run included.

    Raises:
        StoppedError: SIGINT or SIGTERM came; what was measured is kept.
    """
    begin = time.monotonic()
    identity = find_identity()
    left = 60.0 * minutes - (time.monotonic() - begin)
    has_gpu, records = bool(identity["gpus"]), Records()
    for step in (step for rung in ladder for step in rung):
        path, is_chosen = record_path(out, step.name), not only or step.name in only
        records[step.name] = Record(path, identity) if fresh and is_chosen else Record.load(path, identity)
    chosen = [[step for step in rung if not only or step.name in only] for rung in ladder]
    waiting = [[step for step in rung if not _is_settled(step, records[step.name], has_gpu)] for rung in chosen]
    while any(waiting):  # more than once where time is left over: for the rows that were cut
        used = 0.0
        for number, rung in enumerate(waiting):
            used += _climb_rung(rung, waiting[number + 1 :], records, out, module, left - used, has_gpu)
            after_rung(records)
        if not used:
            break
        left -= used
        waiting = [[step for step in rung if records[step.name].is_left] for rung in waiting]
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
    steps: Sequence[Step],
    later: Sequence[Sequence[Step]],
    records: Records,
    out: Path,
    module: str,
    left: float,
    has_gpu: bool,
) -> float:
    """Run the steps of one rung, with the rungs above it in mind; returns the seconds that it took."""
    waiting = list(steps)
    side_by_side = max(1, min(_cores(), len(waiting)))
    running: dict[str, Running] = {}
    used, last = 0.0, time.monotonic()
    lines = Lines(lambda: "; ".join([each.standing() for each in list(running.values())]))
    try:
        with asked_to_end() as signals:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    here = [*waiting, *(each.step for each in running.values())]
                    step = waiting.pop(0)
                    seconds = share(step, [here, *later], left - used, _cores())
                    started = _begin(step, records[step.name], out, module, seconds, has_gpu, side_by_side)
                    if started is not None:
                        running[step.name] = started
                time.sleep(POLL_SECONDS)
                now = time.monotonic()
                tick, last = min(now - last, LONGEST_TICK), now
                used += tick if running else 0.0
                for name, each in list(running.items()):
                    if each.look(tick):
                        records[name] = running.pop(name).record
                        lines.say(each.ending())
                if signals:
                    raise StoppedError(signals[0], "the same command goes on where it was")
    finally:
        for each in running.values():
            each.end()
        lines.close()
    return used


def _begin(
    step: Step, record: Record, out: Path, module: str, seconds: float, has_gpu: bool, side_by_side: int
) -> Running | None:
    if seconds < LEAST_SECONDS + record.start_seconds:
        if not record.is_left:
            record.stop(f"too little time was left ({duration(seconds)}); the same command goes on")
        return None
    record.stop("")
    say(f"{step.name}: {step.question}")
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // side_by_side)), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    environment = {name: value for name, value in environment.items() if name not in os.environ}
    environment |= {**step.environment, **({} if has_gpu else step.without_gpu)}
    row_seconds = step.row_seconds * max(1.0, seconds / step.seconds)
    return Running(step, record, out, module, seconds, row_seconds, environment)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
