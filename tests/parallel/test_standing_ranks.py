"""Ranks that stay for many calls do not stay behind."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel.forked import StandingRanks


def _sum(rank: int, world_size: int, wanted: int) -> None:
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    assert total == wanted


def _is_running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells which processes there are")
def test_they_end_with_the_process_that_called_them_even_if_it_is_killed(tmp_path):
    told = tmp_path / "pids"
    caller = os.fork()
    if not caller:
        with suppress(BaseException):
            ranks = StandingRanks(2, tmp_path)
            ranks.call(_sum, 3)
            told.with_suffix(".new").write_text(" ".join(map(str, ranks._ranks.pids)), encoding="utf-8")
            told.with_suffix(".new").rename(told)
            time.sleep(100)
        os._exit(1)
    end = time.monotonic() + 60
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(caller, signal.SIGKILL)
    os.waitpid(caller, 0)
    pids = [int(pid) for pid in told.read_text(encoding="utf-8").split()]
    end = time.monotonic() + 20
    while any(map(_is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in pids if _is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(pids) == 2
    assert not left
