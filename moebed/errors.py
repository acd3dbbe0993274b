"""Errors that a person can cause: one clear line, and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user asked for cannot be done.

    The message is one line that says what is wrong, where, and what to do. The command line prints it and
    exits with ``exit_code``; the traceback is shown with ``-v`` only.
    """

    exit_code = 2


class ConfigError(UserError):
    """A configuration that no model or run can be built from."""


class SharedError(UserError):
    """An error that every rank of a run raises at the same moment; the first one says it for all.

    Args:
        message: The line.
        rank: This process.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.said_elsewhere = rank != 0


class DivergedError(SharedError):
    """The loss of a run is no longer finite. Its own exit code tells who started the run that it is no use to retry."""

    exit_code = 3


def did_you_mean(word: object, known: Iterable[str], otherwise: str = "") -> str:
    """``did you mean 'softmax'?`` where a known name is near to what was written, else ``otherwise``."""
    near = difflib.get_close_matches(str(word), list(known), 1)
    return f"did you mean {near[0]!r}?" if near else otherwise
