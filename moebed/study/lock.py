"""One process at a time for a run: a lock that lives as long as the process that inherits it."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class HeldError(Exception):
    """Another process holds the lock."""


class RunLock:
    """The lock of a run, held from here on.

    The system lets go of it when the last process that inherited ``descriptor`` has ended, however it ended. Where
    there are no such locks, on Windows and on some network file systems, this is said once and nothing is locked.

    Args:
        path: File of the lock; made if need be.

    Raises:
        HeldError: Another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # some file systems call a held lock a matter of permission
            self.release()
            raise HeldError from None
        except OSError as error:
            _say_unlocked(path.parent, error.strerror or str(error))

    def release(self) -> None:
        """Let go of it here; a process that inherited it still holds it."""
        os.close(self.descriptor)


@cache
def _say_unlocked(folder: Path, why: str) -> None:
    print(
        f"note: {folder} has no locks ({why}); do not run this study twice at the same time",
        file=sys.stderr,
        flush=True,
    )
