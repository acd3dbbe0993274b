"""Processes that stand while a step measures its rows: to start one, which imports everything anew, takes longer than
to train the few steps of a row.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple


class StandingRanks:
    """Ranks that find each other as torchrun's do, and stay for many calls; new ones stand after a call that failed.

    Whatever they print goes to where this process prints. They end with this process, or when nobody refers to this.

    Args:
        world: How many.
        seconds: Of a call, with the start of the ranks.
    """

    def __init__(self, world: int, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self._ranks: list[_Rank] = []

    def call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call work(*arguments), which can be pickled, on every rank; returns what the first one returns.

        Raises:
            RuntimeError: A rank failed.
            TimeoutError: They did not end.
        """
        if not self._ranks:
            self._ranks = _start(self.world)
            self._end = weakref.finalize(self, _end, self._ranks)
        try:
            for rank in self._ranks:
                with suppress(OSError):  # one that is gone is found below
                    rank.pipe.send((work, arguments))
            return self._answers()[0]
        except BaseException:  # whatever it was: the ranks may no longer wait for the same call
            self._end()
            self._ranks = []
            raise

    def _answers(self) -> Sequence[Any]:
        found: dict[int, Any] = {}
        pipes = {rank.pipe: number for number, rank in enumerate(self._ranks)}
        end = time.monotonic() + self.seconds
        while pipes:
            ready = wait(list(pipes), max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"rank {min(pipes.values())} of {self.world} had not ended after {self.seconds:.0f} s"
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                number = pipes.pop(pipe)
                try:
                    is_well, found[number] = pipe.recv()
                except EOFError:
                    process = self._ranks[number].process
                    process.join(5.0)
                    is_well, found[number] = False, f"it ended with exit code {process.exitcode}"
                if not is_well:  # the first that says so; others may fail for it
                    raise RuntimeError(f"rank {number} of {self.world}: {found[number]}")
        return [found[number] for number in range(self.world)]


class _Rank(NamedTuple):
    process: BaseProcess
    pipe: Connection


def _start(world: int) -> list[_Rank]:
    context, port = multiprocessing.get_context("spawn"), _free_port()
    ranks = []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, environment(rank, world, port)), daemon=True)
        process.start()
        theirs.close()  # so that a rank that is gone is seen to be
        ranks.append(_Rank(process, ours))
    return ranks


def _end(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        with suppress(OSError):
            rank.process.kill()
    for rank in ranks:
        rank.process.join(2.0)  # a driver that hangs keeps its process from any signal
        rank.pipe.close()


def _serve(pipe: Connection, variables: Mapping[str, str]) -> None:
    """One rank."""
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    os.environ.update(variables)
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, work(*arguments)
        except BaseException as error:  # noqa: BLE001 - whatever it was, who called says it
            traceback.print_exc()
            answer = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    named = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world > 1:
        named["TORCHELASTIC_RUN_ID"] = "check"  # by which Lightning knows that the other ranks are started already
    return {**{name: str(number) for name, number in numbers.items()}, **named}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
