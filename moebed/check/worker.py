"""The process of one step: ``python -m moebed.check.worker LADDER STEP OUT FOLDER BEGUN``, or ``identity``.

It measures what the step's record does not have yet, and writes the record before and after each row, so that whoever
waits for it knows what it was at when it hung or crashed. An error of CUDA that stays in the process ends it, so that
the rows after it are measured by a fresh one.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebed.check.contract import Finding, Found, Ladder, NotRun, Place, Row, Step, Verdict
from moebed.check.record import Record
from moebed.errors import UserError

AGAIN = 75  # exit code: rows are left, and this process can measure no more
NO_GPU = "no GPU"
OWN = ("moebed", "probes", "triton_kernels")
SHOW_PLACE = getattr(signal, "SIGUSR2", None)  # on which a process writes where it is into its log, and goes on


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    if arguments[0] == "identity":
        print(json.dumps(identity()), flush=True)
        return 0
    ladder, name, out, folder, begun = arguments
    end_with_parent()
    if SHOW_PLACE is not None:
        faulthandler.register(SHOW_PLACE)
    record = Record.load(record_path(Path(out), name), None)
    return work(step_of(importlib.import_module(ladder).LADDER, name), record, Path(folder), float(begun))


def record_path(out: Path, name: str) -> Path:
    """Of a step, in the folder of the whole check."""
    return out / "steps" / f"{name}.json"


def step_of(ladder: Ladder, name: str) -> Step:
    """A step by its name; KeyError if there is none."""
    return {step.name: step for rung in ladder for step in rung}[name]


def work(step: Step, record: Record, folder: Path, begun: float) -> int:
    """Measure the rows of a step that its record lacks.

    Args:
        step: The step.
        record: What is kept of it; its identity says how many GPUs there are.
        folder: For the step's own files.
        begun: When the process was asked for, as ``time.time()`` has it.

    Returns:
        The exit code.
    """
    gpus = int(record.identity.get("gpus", 0))
    place = Place("cuda" if gpus else "cpu", gpus, folder, record.findings)
    try:
        rows = list(step.rows_of(place))
    except Exception as error:  # noqa: BLE001 - what it was is the finding
        rows = [Row("rows", functools.partial(_raise, error))]
    record.names = [row.name for row in rows]
    record.start_seconds = round(time.time() - begun, 2)
    for row in sorted(rows, key=lambda row: row.gpus <= place.gpus):  # what is not here is said, whatever the time
        if row.name in record.findings:
            continue
        record.begin(row.name)
        finding = measure(row, place)
        record.end(finding)
        if finding.verdict != Verdict.NOT_RUN:
            gc.collect()  # a failed row's tensors hang in its traceback
            if is_poisoned(place):
                return AGAIN
    return 0


def _raise(error: Exception) -> Found:
    raise error


def measure(row: Row, place: Place) -> Finding:
    """What a row finds; whatever it raises is a finding."""
    if row.gpus > place.gpus:
        return Finding(row.name, Verdict.NOT_RUN, f"needs {row.gpus} GPUs, has {place.gpus}" if place.gpus else NO_GPU)
    begin = time.perf_counter()
    try:
        found = row.measure()
    except Exception as error:  # noqa: BLE001 - a ladder goes on whatever a row raises
        found = _raised(error)
    return Finding(row.name, found.verdict, found.said, found.figures, round(time.perf_counter() - begin, 2))


def _raised(error: Exception) -> Found:
    if isinstance(error, NotRun):
        return Found(str(error), verdict=Verdict.NOT_RUN)
    if isinstance(error, TimeoutError):  # on a busy machine, or since it hangs: which of the two is not known
        return Found(str(error), verdict=Verdict.SLOW)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] not in OWN:
        return Found(f"{error.name.partition('.')[0]} is not installed", verdict=Verdict.NOT_RUN)
    traceback.print_exception(error)  # into the step's log
    words = " ".join(str(error).split())[:600]
    said = words if isinstance(error, UserError) else f"{type(error).__name__}: {words}".rstrip(": ")
    return Found(said, {"traceback": "".join(traceback.format_exception(error))[-4000:]}, Verdict.WRONG)


def is_poisoned(place: Place) -> bool:
    """Whether CUDA gives nothing but errors in this process from here on, as after an illegal address."""
    torch = sys.modules.get("torch")
    if place.device != "cuda" or torch is None or not torch.cuda.is_initialized():  # to begin with CUDA takes seconds
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:  # noqa: BLE001 - of several unrelated types
        return True
    return False


def gpu_count() -> int:
    """GPUs that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def identity() -> dict[str, Any]:
    """What figures hold for: machine, versions, source."""
    from moebed.bench.command import machine
    from moebed.check.machine import driver, missing
    from moebed.machine.provenance import source

    here = machine()
    gpus = gpu_count()
    return {
        "processor": here["processor"],
        "cores": here["cores"],
        "gpu": here["gpu"],
        "gpus": gpus,
        "driver": driver() if gpus else None,
        "python": here["python"],
        "versions": here["versions"],
        "missing": missing(),
        "source": source(*OWN),
    }


def end_with_parent() -> None:
    """End this process when the one that started it is gone, which closes standard input."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1 << 16):  # not the buffer, whose lock would be held as Python ends
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
