"""Ranks that end together at once, wherever each of them is: once nothing of their run can be lost any more."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

SECONDS = 0.5  # between two looks at what other ranks have heard
PATIENCE = 10.0  # seconds for the other ranks to hear of it, and then for this one to end by itself
_STOP = 0  # no signal has this number


class LeavingTogether:
    """Ends this rank soon after any of a run's ranks has heard a signal.

    Python runs a signal's handler between two of its own instructions, and a rank that waits within a collective comes
    to none: but the signal's number is written to a pipe at once. A thread reads it there and puts it into the store
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
        self._store = _new_client()
        self._number = _STOP
        self._all_know = threading.Event()
        self._pipe, self._end = os.pipe()
        os.set_blocking(self._end, False)
        self._before = signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="leaving together")
        self._thread.start()

    def wait(self) -> int:
        """Until all ranks know, or do not answer; the signal on which they leave."""
        self._all_know.wait()
        return self._number

    def stop(self, is_last: bool) -> None:
        """Listen no more.

        Args:
            is_last: Whether this rank needs no other one from now on, nor is needed: who leaves does not wait for it.
        """
        if self._all_know.is_set():
            return  # it is ending
        signal.set_wakeup_fd(self._before)
        os.write(self._end, bytes([_STOP]))
        self._thread.join()
        if is_last and self._store is not None:
            with suppress(RuntimeError):
                self._store.set(self._own_key, "")
        os.close(self._pipe)
        os.close(self._end)

    def _listen(self) -> None:
        own = None
        while self._number == _STOP:
            ready, _, _ = select.select([self._pipe], [], [], SECONDS)
            own = os.read(self._pipe, 1)[0] if ready else None
            self._number = self._agreed(own if own in self._numbers else None)
            if self._number == own == _STOP:
                return
        self._all_know.set()
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
