"""Several ranks of a `moebed` command on one machine: forked from this process, so that none imports anything anew."""

import os
import signal
import socket
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

import moebed.training  # noqa: F401 - imported before the fork


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


def start(arguments: list[str], world_size: int, folder: Path) -> Ranks:
    """Start a command on so many ranks, as torchrun would."""
    from moebed.cli import main

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
                try:
                    code = main(arguments)
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else 1
                except BaseException:
                    traceback.print_exc(file=log)
        finally:
            os._exit(code)
    return ranks


def run(arguments: list[str], world_size: int, folder: Path, limit: float = 120) -> str:
    """The same, to its end; every rank must end with 0. Returns what they printed."""
    ranks = start(arguments, world_size, folder)
    codes = ranks.wait(limit)
    assert codes == [0] * world_size, f"{codes}\n{ranks.said}"
    return ranks.said
