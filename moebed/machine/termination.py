"""How a command that keeps its work as it goes ends when it is asked to: soon and in order."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from moebed.errors import UserError


class StoppedError(UserError):
    """A signal ended a command that keeps its work as it goes; the exit code is what a shell makes of the signal.

    Args:
        number: The signal.
        then: What the same command does next.
    """

    def __init__(self, number: int, then: str) -> None:
        super().__init__(f"stopped; {then}")
        self.exit_code = 128 + number


def take_over(number: int, handler: Callable[[int, Any], Any]) -> Any:
    """Handle a signal from now on, unless it is ignored: so shells start a job in the background, for Ctrl-C.

    Returns:
        What it was before, to give it back.
    """
    before = signal.getsignal(number)
    if before is not signal.SIG_IGN:
        signal.signal(number, handler)
    return before


def give_back(number: int, before: Any) -> None:
    """Let a signal be handled as it was before, as :func:`take_over` says it.

    What C has set, and not Python, it says nothing of (None): the signal does by itself what it does then.
    """
    signal.signal(number, signal.SIG_DFL if before is None else before)


_came_early: list[int] = []


def note_early(number: int) -> None:
    """Have a signal that would end this process be noted, for who acts on it later by what ``came_early`` has.

    What this process starts does not hear it from now on, a compiler for example: SLURM sends it to all of them. So it
    is blocked, which they inherit, and a thread waits for it, and has the main one handle it as if it had come.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "sigwait"):
        return
    take_over(number, lambda number, _frame: _came_early.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])

    def hand_on() -> None:
        while True:
            _thread.interrupt_main(signal.Signals(signal.sigwait([number])))

    threading.Thread(target=hand_on, daemon=True, name="waits for a signal").start()


def came_early() -> Collection[int]:
    """The signals that were noted and that nobody has acted on yet; they are asked for once."""
    came = tuple(_came_early)
    _came_early.clear()
    return came


def first_on_sigterm(action: Callable[[], Any]) -> None:
    """Have SIGTERM do this before it ends the process at once, until somebody else handles it."""

    def end(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        action()
        os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        take_over(signal.SIGTERM, end)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """End the process with exit code 143 on SIGTERM as soon as Python gets to act, whatever it is at.

    Nothing changes where somebody handles it already, nor in another thread than the main one, which alone may ask for
    signals.
    """

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: what is open is being closed
        raise SystemExit(143)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def asked_to_end() -> Iterator[list[int]]:
    """The signals that asked to end, SIGINT and SIGTERM, in their order, while the block lasts; it looks by itself."""
    came: list[int] = []
    before = {number: take_over(number, lambda n, _: came.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            give_back(number, handler)
