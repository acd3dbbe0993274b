"""Step ``ranks``: FSDP2 and expert parallelism beside one process, on one rank, and on 2 and 4 where there are GPUs.

``python -m moebed.check.ranks FOLDER LAYOUT DEVICE`` is one rank, which finds the others as torchrun's do.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moebed.check.contract import Found, NotRun, Place, Row, Verdict
from moebed.machine import storage
from moebed.parallel.config import ParallelConfig

STEPS, GLOBAL_BATCH = 4, 8
SECONDS = 90.0
NOTED = "steps.json"
LAYOUTS = {
    "FSDP2, 1 rank": ParallelConfig(1, 1),
    "FSDP2, 2 ranks": ParallelConfig(2, 1),
    "EP, 2 ranks": ParallelConfig(1, 2),
    "EP by all-gather, 2 ranks": ParallelConfig(1, 2, exchange="all_gather"),
    "FSDP2 and EP, 4 ranks": ParallelConfig(2, 2),
    "FSDP2, 4 ranks": ParallelConfig(4, 1),
    "EP, 4 ranks": ParallelConfig(1, 4),
    "FSDP2 and EP by all-gather, 4 ranks": ParallelConfig(2, 2, exchange="all_gather"),
    "EP by all-gather, 4 ranks": ParallelConfig(1, 4, exchange="all_gather"),
}


def rows(place: Place) -> Sequence[Row]:
    """Of the step."""

    @functools.cache
    def alone() -> dict[int, Sequence[float]]:
        return run_ranks(place, "alone")

    def one_process() -> Found:
        wanted = alone()
        return Found(f"{STEPS} steps, loss {wanted[1][0]:.4f} to {wanted[STEPS][0]:.4f}", {"steps": wanted})

    return [
        Row("one process", one_process),
        *(Row(name, functools.partial(beside, place, name, alone)) for name in LAYOUTS),
    ]


def beside(place: Place, layout: str, alone: Callable[[], dict[int, Sequence[float]]]) -> Found:
    """The steps of a layout beside those of one process: every layout sees the same batches."""
    from moebed.check.runs import LAID_OUT, largest_difference

    needed = _world(layout)
    here = place.gpus if place.device == "cuda" else 2 if (os.cpu_count() or 1) > 1 else 1
    if needed > here:
        what = f"{place.gpus} GPU{'s' * (place.gpus != 1)}" if place.gpus else "no GPU, and few cores"
        raise NotRun(f"needs {needed} ranks; {what}")
    off = largest_difference(run_ranks(place, layout), alone())
    allowed = LAID_OUT[place.device]
    said = f"losses and gradient norms of {STEPS} steps differ by {off:.1e} from those of one process"
    return Found(said, {"difference": off, "allowed": allowed}, Verdict.WORKS if off <= allowed else Verdict.WRONG)


def run_ranks(place: Place, layout: str) -> dict[int, Sequence[float]]:
    """Loss and gradient norm by step of a layout, whose ranks are processes.

    Raises:
        RuntimeError: A rank failed, or they did not end.
    """
    world, folder = _world(layout), place.folder / layout.replace(" ", "_").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    port, logs, processes = _free_port(), [folder / f"rank{rank}.log" for rank in range(world)], []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "moebed.check.ranks", str(folder), layout, place.device],
                        stdin=subprocess.PIPE,
                        stdout=file,
                        stderr=file,
                        env={**os.environ, **environment(rank, world, port)},
                    )
                )
        end = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() not in (None, 0) for process in processes):
                break  # the others would wait for it
            time.sleep(0.05)
        for process, log in zip(processes, logs, strict=True):
            if process.poll() != 0:
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
                print("\n".join(said), file=sys.stderr)
                ended = "did not end" if process.poll() is None else f"exit code {process.poll()}"
                raise RuntimeError(f"rank {processes.index(process)} of {world}: {ended}: {said[-1][:300]}")
    finally:
        for process in processes:
            with suppress(OSError):
                process.kill()
            process.wait()
    found = json.loads((folder / NOTED).read_text(encoding="utf-8"))
    return {int(step): values for step, values in found.items()}


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    named = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world > 1:
        named["TORCHELASTIC_RUN_ID"] = "check"  # by which Lightning knows that the other ranks are started already
    return {**{name: str(number) for name, number in numbers.items()}, **named} if world > 1 else named


def _world(layout: str) -> int:
    parallel = LAYOUTS.get(layout)
    return 1 if parallel is None else parallel.data * parallel.expert


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(arguments: Sequence[str]) -> int:
    """One rank; the first writes what was noted."""
    from moebed.check.runs import Run, steps
    from moebed.check.worker import end_with_parent

    end_with_parent()
    folder, layout, device = Path(arguments[0]), arguments[1], arguments[2]
    parallel = replace(LAYOUTS[layout], timeout_minutes=1.0) if layout in LAYOUTS else None
    world = _world(layout)
    found, _ = steps(Run(folder, device, STEPS, parallel=parallel, devices=world, batch_size=GLOBAL_BATCH // world))
    if os.environ.get("RANK", "0") == "0":
        storage.write_text(folder / NOTED, json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
