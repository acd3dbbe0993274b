"""Several ranks of a `moebed` command on one machine: forked from this process, so that none imports anything anew."""

import faulthandler
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.figure  # noqa: F401 - what ranks need is imported before the fork
import torch
import torch.distributed as dist
import torch.utils.tensorboard

import moebed.commands.training_run  # noqa: F401
import probes.report.page  # noqa: F401


@dataclass
class Ranks:
    """Running ranks; what each prints goes to a file."""

    pids: list[int]
    logs: list[Path]

    def wait(self, limit: float) -> list[int]:
        """Exit code of every rank, -9 for one that was killed; those still there after `limit` seconds are killed."""
        codes: dict[int, int] = {}
        end = time.monotonic() + limit
        while len(codes) < len(self.pids) and time.monotonic() < end:
            for pid in set(self.pids) - set(codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        hung = [pid for pid in self.pids if pid not in codes]
        for pid in hung:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert not hung, f"ranks {[self.pids.index(pid) for pid in hung]} still ran after {limit} s\n{self.said}"
        return [codes[pid] for pid in self.pids]

    @property
    def said(self) -> str:
        """What all ranks printed."""
        return "\n".join(f"[{rank}] {log.read_text()}" for rank, log in enumerate(self.logs) if log.exists())


def begin(work: Callable[..., None], world_size: int, folder: Path, *arguments: Any) -> Ranks:
    """Begin work(rank, world_size, *arguments) on so many ranks, which can talk to each other."""

    def joined() -> int:
        if world_size == 1:
            work(0, 1, *arguments)
            return 0
        with _joined():
            work(dist.get_rank(), world_size, *arguments)
        return 0

    return _fork(joined, world_size, folder)


def call(work: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """The same to its end; none may fail."""
    with TemporaryDirectory() as folder:
        ranks = begin(work, world_size, Path(folder), *arguments)
        codes = ranks.wait(120)
        assert codes == [0] * world_size, f"{codes}\n{ranks.said}"


@contextmanager
def _joined() -> Iterator[None]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


class StandingRanks:
    """Ranks that stay, for many calls: what PyTorch makes at its first use, and their group, is made once.

    They are those of this process at the first call, and new ones after a call that failed.
    """

    def __init__(self, world_size: int, folder: Path):
        self.world_size, self.folder = world_size, folder
        self._ranks: Ranks | None = None
        self._pipes: list[tuple[Connection, Connection]] = []

    def call(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call work(rank, world_size, *arguments), which all can be pickled, on every rank; none may fail."""
        if self._ranks is None:
            self._pipes = [Pipe() for _ in range(self.world_size)]
            self._ranks = _fork(self._serve, self.world_size, self.folder)
            for _, theirs in self._pipes:
                theirs.close()  # so that a rank that is gone is seen to be
        for ours, _ in self._pipes:
            ours.send((work, arguments))
        end = time.monotonic() + 120
        if not all([_answer(ours, end) for ours, _ in self._pipes]):
            said = self._ranks.said
            self.close()
            raise AssertionError(f"a rank failed, or took longer than 120 s\n{said}")

    def close(self) -> None:
        """End them."""
        for pid in self._ranks.pids if self._ranks is not None else []:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for ours, _ in self._pipes:
            ours.close()
        self._ranks, self._pipes = None, []

    def _serve(self) -> int:
        rank = int(os.environ["RANK"])
        pipe = self._pipes[rank][1]
        for end in (end for both in self._pipes for end in both if end is not pipe):
            end.close()  # so that a process that is gone is seen to be, whichever it is
        with _joined():
            while True:
                try:
                    work, arguments = pipe.recv()
                except EOFError:  # who called is gone, without a word
                    return 0
                try:
                    work(rank, self.world_size, *arguments)
                except BaseException:
                    traceback.print_exc()
                    pipe.send(False)
                    raise
                pipe.send(True)


def _answer(pipe: Connection, end: float) -> bool:
    try:
        return pipe.poll(max(0.0, end - time.monotonic())) and pipe.recv()
    except EOFError:
        return False


def start(arguments: list[str], world_size: int, folder: Path, before: Callable[[int], None] | None = None) -> Ranks:
    """Start a command on so many ranks, as torchrun would; each calls before(rank) first."""
    from moebed.cli import main

    def command() -> int:
        if before is not None:
            before(int(os.environ.get("RANK", "0")))
        return main(arguments)

    return _fork(command, world_size, folder)


def _fork(work: Callable[[], int], world_size: int, folder: Path) -> Ranks:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    ranks = Ranks([], [folder / f"rank{rank}.log" for rank in range(world_size)])
    for rank in range(world_size):
        pid = os.fork()
        if pid:
            ranks.pids.append(pid)
            continue
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if world_size > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "GROUP_RANK": "0",
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "test",
                }
            torch.set_num_threads(1)
            with open(ranks.logs[rank], "w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                faulthandler.enable(log)  # where a rank that dies in C was
                try:
                    code = work()
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else 1
                except BaseException:  # noqa: BLE001 - what it was is in the log, and the exit code tells
                    traceback.print_exc(file=log)
        finally:
            os._exit(code)
    return ranks


def run(arguments: list[str], world_size: int, folder: Path, limit: float = 300) -> str:
    """The same, to its end; every rank must end with 0. Returns what they printed."""
    ranks = start(arguments, world_size, folder)
    codes = ranks.wait(limit)
    assert codes == [0] * world_size, f"{codes}\n{ranks.said}"
    return ranks.said
