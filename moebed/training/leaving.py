"""Ranks that end together at once, wherever each of them is: once nothing of their run can be lost any more."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

SECONDS = 0.5  # between two looks at what other ranks have heard
PATIENCE = 10.0  # seconds for the other ranks to hear of it, and then for this one to end by itself
BRIEFLY = 2.0  # seconds that a run's end waits for a store that has not answered yet, to say that it is through
_STOP = 0  # no signal has this number


class LeavingTogether:
    """Ends this rank soon after any of a run's ranks has heard a signal.

    Python runs a signal's handler between two of its own instructions, and a rank that waits within a collective comes
    to none: but the signal's number is written to a socket at once. A thread reads it there and puts it into the store
    at which the ranks met, where the other ranks' threads look, and send it to themselves; so no collective is needed,
    which a rank that is about to leave would have to be at. A handler waits until all ranks know: whatever a rank meets
    of those that leave before it, its own handler ends it. One that still waits for them is ended here.

    Args:
        rank: This process's number.
        world_size: How many there are.
        numbers: The signals that it listens to; the handler of each calls ``wait``, and ends the process.
        last_words: Called where the handler has not come to it; gives the exit code.
    """

    def __init__(self, rank: int, world_size: int, numbers: Collection[int], last_words: Callable[[int], int]) -> None:
        self._numbers, self._last_words = numbers, last_words
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store stays when it starts ranks again
        self._key = f"moebed/leaving/{attempt}"
        self._keys = [f"{self._key}/{one}" for one in range(world_size)]  # of the ranks that know of it
        self._own_key = self._keys[rank]
        self._store: dist.Store | None = None
        # A port that takes connections and says nothing holds up who connects, far longer than the timeout it is told.
        self._connecting = threading.Thread(target=self._connect, daemon=True, name="meeting the other ranks")
        self._connecting.start()
        self._number = _STOP
        self._has_ended = threading.Event()
        self._heard, self._told = socket.socketpair()
        self._heard.settimeout(SECONDS)
        self._told.setblocking(False)
        self._before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._process = os.getpid()
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # it would tell of its own signals
        threading.Thread(target=self._listen, daemon=True, name="leaving together").start()

    def wait(self) -> int | None:
        """Until all ranks know, or do not answer; the signal on which they leave.

        None where it was stopped, and in a process that was forked from this one.
        """
        if os.getpid() == self._process:
            self._has_ended.wait()
        return self._number or None

    def stop(self, is_last: bool) -> None:
        """Listen no more.

        Args:
            is_last: Whether this rank needs no other one from now on, nor is needed: who leaves does not wait for it.
        """
        if self._has_ended.is_set():
            return  # the process ends
        signal.set_wakeup_fd(self._before)
        self._told.send(bytes([_STOP]))
        if (number := self.wait()) is not None:
            raise SystemExit(self._last_words(number))
        if is_last:
            self._connecting.join(BRIEFLY)
        if is_last and self._store is not None:
            with suppress(RuntimeError):
                self._store.set(self._own_key, "")
        self._told.close()
        self._heard.close()

    def _connect(self) -> None:
        self._store = _new_client()

    def _listen(self) -> None:
        own: int | None = None
        while self._number == _STOP:
            try:
                own = self._heard.recv(1)[0]
            except TimeoutError:
                own = None
            self._number = self._agreed(own if own in self._numbers else None)
            if own == _STOP:
                break
        self._has_ended.set()
        if self._number == _STOP:
            return
        time.sleep(PATIENCE)
        code = self._last_words(self._number)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # the process ends, whatever it is
                stream.flush()
        os._exit(code)

    def _agreed(self, own: int | None) -> int:
        """The signal on which all ranks leave, once they know of it.

        Args:
            own: What this rank has just heard.
        """
        number = self._asked(own)
        if number == _STOP:
            return number
        if own is None:
            os.kill(os.getpid(), number)
        if self._store is not None:
            with suppress(RuntimeError):  # a rank does not answer, or the first one, which has the store, is gone
                self._store.set(self._own_key, "")
                self._store.wait(self._keys)
        return number

    def _asked(self, own: int | None) -> int:
        """The signal that any rank heard first; without a store, each is for itself."""
        if own is not None:
            self._connecting.join(PATIENCE)
        try:
            if self._store is not None and own is not None:
                return int(self._store.compare_set(self._key, "", str(own)))
            if self._store is not None and self._store.check([self._key]):
                return int(self._store.get(self._key))
        except RuntimeError:  # the first rank, which has it, is gone
            self._store = None
        return own or _STOP


def _new_client() -> dist.Store | None:
    """A client of the ranks' store, of this rank's own, as a call that waits holds up all others of a client.

    None where ranks did not meet by ``MASTER_ADDR`` and ``MASTER_PORT``: each then acts on its own signals.
    """
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    except (KeyError, ValueError, RuntimeError):
        return None


class EndingStartedRanks:
    """SIGTERM ends a process as it ends any, and before it the ranks that it has started, which would wait for it.

    Args:
        trainer: Whose ranks they are, if Lightning has started them; torchrun and SLURM send signals to each of theirs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._handles = False

    def take_over(self) -> None:
        """Handle it from now on, where nobody does already; in the main thread, which alone may."""
        is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if is_free and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._end)
            self._handles = True

    def give_back(self) -> None:
        """Give it back."""
        if self._handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._handles = False

    def _end(self, number: int, _frame: Any) -> None:
        if (launcher := self._trainer.strategy.launcher) is not None:
            launcher.kill(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
