"""Runs the processes of a study: some at a time, each after what it needs, finished ones never again.

A run is locked while its process lives, by the process itself, so that two calls of one study, or the tasks of a job
array, share the work, and one that was killed leaves nothing to clean up.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moebed.errors import DivergedError, UserError
from moebed.machine.last_words import last_words
from moebed.machine.termination import StoppedError, asked_to_end
from moebed.study.code import code_so_far
from moebed.study.files import read_json, write_json
from moebed.study.identity import changes
from moebed.study.lock import HeldError, RunLock
from moebed.study.placement import Placement, visible_devices
from moebed.study.progress import StudyBar, status_path

POLL_SECONDS = 0.2
_NAME = re.compile(r"\b(runs|stages|tasks)/[^/\s]+/seed_\d+")  # of a run
GRACE_SECONDS = 20.0  # from the signal that asks a process to end to the one that ends it


class RunLike(Protocol):
    """What is read of a :class:`moebed.study.runs.Run`."""

    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> Sequence[str]: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...
    @property
    def hash(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def finished(self) -> str: ...
    @property
    def needs(self) -> str | None: ...
    @property
    def devices(self) -> int: ...


@dataclass
class Process:
    """A run under way."""

    run: RunLike
    process: subprocess.Popen[bytes]
    lock: RunLock
    log_begin: int  # bytes of the log that are of earlier processes
    started: float  # on the clock of time.monotonic


@dataclass
class Outcome:
    """What came of the runs, by name.

    Args:
        finished: Those that are done, now or earlier.
        diverged: Those whose loss was no longer finite, with what they said.
        failed: Those that ended otherwise, with what they said; a second call tries them again.
    """

    finished: list[str] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def why_failed(self) -> str:
        """What failed runs said, each thing once: what a run says of itself or of another one may name it."""
        alike: dict[str, list[str]] = {}
        for name, said in self.failed.items():
            alike.setdefault(_NAME.sub("", said), []).append(name)
        return "; ".join(
            f"{first}{f' and {len(more)} more' if more else ''} ({self.failed[first]})"
            for first, *more in alike.values()
        )


def moebed_command(run: RunLike) -> list[str]:
    """The run as a process of this very Python."""
    return [sys.executable, "-m", "moebed.cli", *run.arguments]


def check_unchanged(runs: Sequence[RunLike], out: Path) -> None:
    """Refuse to go on with runs that were begun with another config.

    Raises:
        UserError: Names the run and the settings that changed.
    """
    for run in runs:
        record = read_json(status_path(out, run.name, "json"))
        if not (out / run.name).exists() or (record is not None and record["hash"] == run.hash):
            continue
        if record is None:
            raise UserError(f"{out / run.name} was not begun by this study; delete it, or choose another --out")
        if changed := changes(record["identity"], run.identity):
            raise UserError(
                f"{out / run.name} was begun with another config ({'; '.join(changed[:3])}); choose another --out, or "
                "delete that folder to run it anew"
            )


def is_finished(run: RunLike, out: Path) -> bool:
    """Whether nothing is left to do: its last file is there, and if it trained, it came to its last step."""
    path = out / run.name / run.finished
    if not path.is_file():
        return False
    return not run.steps or read_json(path).get("step") == run.steps


def run_all(
    runs: Sequence[RunLike],
    out: Path,
    jobs: int = 1,
    command: Callable[[RunLike], list[str]] = moebed_command,
) -> Outcome:
    """Run what is not finished, at most ``jobs`` at a time; one that fails stops only those that need it.

    A run that trains on GPUs sees as many as it asks for, and those that the fewest other runs are on.

    Args:
        runs: In order, each after what it needs.
        out: The study's folder.
        jobs: Processes at a time.
        command: Makes the command line of a run.

    Returns:
        What came of each.

    Raises:
        UserError: A run was begun with another config.
        StoppedError: SIGINT or SIGTERM came; the processes have been ended, and the next call continues them.
    """
    check_unchanged(runs, out)
    outcome, running = Outcome(), dict[str, Process]()
    placement = Placement(visible_devices() if any(run.devices for run in runs) else ())
    waiting, waited_for = list(runs), set[str]()
    with asked_to_end() as signals, StudyBar(out, {run.name: run.steps for run in runs}) as bar:
        while waiting or running or signals:
            if signals:  # first: who sent it, as SLURM does, may have sent it to the runs too, which have not failed
                _end(running, out)
                raise StoppedError(signals[0], "the same command continues where the last checkpoints are")
            for name, process in list(running.items()):
                if process.process.poll() is not None:
                    del running[name]
                    placement.release(name)
                    _settle(process, out, outcome, bar)
            for run in list(waiting):
                if _settled_already(run, out, outcome, bar):
                    waiting.remove(run)
                elif len(running) < jobs and (run.needs is None or run.needs in outcome.finished):
                    started = _start(run, out, jobs, command, waited_for, bar, placement)
                    if started is not None:
                        waiting.remove(run)
                        running[run.name] = started
            bar.show(running)
            time.sleep(POLL_SECONDS)
    return outcome


def _settled_already(run: RunLike, out: Path, outcome: Outcome, bar: StudyBar) -> bool:
    """Note a run that is finished, that diverged before, or that can never start."""
    if is_finished(run, out):
        outcome.finished.append(run.name)
        bar.end(run.name, finished=True)
        return True
    record = read_json(status_path(out, run.name, "json"))
    if record is not None and record.get("exit_code") == DivergedError.exit_code and (out / run.name).exists():
        outcome.diverged[run.name] = record["said"]
    elif run.needs in outcome.failed or run.needs in outcome.diverged:
        outcome.failed[run.name] = f"not started: it needs {run.needs}"
    else:
        return False
    bar.end(run.name, finished=False)
    return True


def _start(
    run: RunLike,
    out: Path,
    jobs: int,
    command: Callable[[RunLike], list[str]],
    waited_for: set[str],
    bar: StudyBar,
    placement: Placement,
) -> Process | None:
    """Start a process, unless another one has the run, which is said once."""
    log = status_path(out, run.name, "log")
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = RunLock(status_path(out, run.name, "lock"))
    except HeldError:
        if run.name not in waited_for:
            waited_for.add(run.name)
            bar.say(f"waiting: another process has {run.name}")
        return None
    if is_finished(run, out):  # the other process came to its end between the two looks
        lock.release()
        return None
    path = status_path(out, run.name, "json")
    before = read_json(path) or {}
    record = {"hash": run.hash, "identity": dict(run.identity), "seconds": before.get("seconds", 0.0)}
    write_json(path, record | {"code": code_so_far(before)})
    environment = {**os.environ, **placement.take(run.name, run.devices)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with log.open("ab") as file:
        begin = file.tell()
        # A session of its own: Ctrl-C reaches the study alone, which then ends its processes. The lock stays held for
        # as long as the process lives, even if the study is killed.
        inherited: dict[str, Any] = {"pass_fds": (lock.descriptor,)} if os.name == "posix" else {}
        process = subprocess.Popen(
            command(run), env=environment, stdout=file, stderr=file, start_new_session=True, **inherited
        )
    return Process(run, process, lock, begin, time.monotonic())


def _settle(process: Process, out: Path, outcome: Outcome, bar: StudyBar) -> None:
    """Note what came of a process that has ended, and how long it took, with those that it went on from."""
    name, code = process.run.name, process.process.returncode
    path, record = status_path(out, name, "json"), _note_time(process, out)
    process.lock.release()
    finished = code == 0 and is_finished(process.run, out)
    bar.end(name, finished)
    if finished:
        outcome.finished.append(name)
        bar.say(f"done: {name}")
        return
    said = last_words(status_path(out, name, "log"), process.log_begin)
    write_json(path, {**record, "exit_code": code, "said": said})
    if code == DivergedError.exit_code:
        outcome.diverged[name] = said
    else:
        outcome.failed[name] = f"exit code {code}: {said}"
    bar.say(f"{'diverged' if code == DivergedError.exit_code else f'failed with exit code {code}'}: {name}: {said}")


def _note_time(process: Process, out: Path) -> dict[str, Any]:
    """Add how long a process ran to what those before it took of its run; returns the run's record."""
    path = status_path(out, process.run.name, "json")
    record: dict[str, Any] = read_json(path)
    record["seconds"] += time.monotonic() - process.started
    write_json(path, record)
    return record


def _end(running: Mapping[str, Process], out: Path) -> None:
    """Ask all processes to end, and after a while make them; what they took counts for who goes on."""
    for gently in (True, False):
        for process in running.values():
            if process.process.poll() is not None:
                continue
            if hasattr(os, "killpg"):  # with whatever it started
                os.killpg(process.process.pid, signal.SIGTERM if gently else signal.SIGKILL)
            elif gently:
                process.process.terminate()
            else:
                process.process.kill()
        end = time.monotonic() + GRACE_SECONDS
        for process in running.values():
            try:
                process.process.wait(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
    for process in running.values():
        _note_time(process, out)
        process.lock.release()
