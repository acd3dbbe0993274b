"""Whether results can lie where a person wants them, found out before any work and without PyTorch."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from moebed.errors import UserError
from moebed.machine.units import human


def require_writable(folder: Path, option: str) -> None:
    """Find out before any work whether a folder, which need not be there yet, can be written into; leaves no trace.

    Args:
        folder: Where results are to lie.
        option: Which another one is given by.

    Raises:
        UserError: It cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        raise UserError(
            f"the output folder {folder} cannot be written ({error.strerror}); choose another with {option}"
        ) from error


def require_file_writable(path: Path, option: str) -> None:
    """The same of a file, which may be there: it is written anew."""
    if path.is_dir():
        raise UserError(f"{option} {path}: it is a folder; give a file")
    require_writable(path.parent, option)


def require_file(path: Path, called: str, advice: str, begins: bytes = b"") -> None:
    """Find out before any work whether a file is there, can be read and has something in it.

    Args:
        path: The file.
        called: What an error begins with, such as the option and what it was given.
        advice: What the error tells a person to do.
        begins: What a file of its kind begins with.

    Raises:
        UserError: It is not so.
    """
    start = b""
    try:
        if path.is_dir():
            cause = "it is a folder"
        elif path.exists() and not path.is_file():
            cause = "it is no plain file"
        else:
            with path.open("rb") as file:
                start = file.read(max(1, len(begins)))
            cause = "it is empty" if not start else "it is of another kind"
    except FileNotFoundError:
        cause = "there is no such file"
    except (OSError, ValueError) as error:  # of a name with a NUL in it
        cause = f"it cannot be read ({getattr(error, 'strerror', None) or error})"
    if not start or not start.startswith(begins):
        raise UserError(f"{called}: {cause}; {advice}")


def require_empty(folder: Path) -> None:
    """Raise UserError if there is something at ``folder`` already, or if a checkpoint cannot be written there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise UserError(f"{folder} {what}; choose another folder for the checkpoint")
    require_writable(folder, "--out")


def require_room(folder: Path, num_bytes: int, what: str, advice: str = "make room or choose another folder") -> int:
    """Bytes that are free where a folder is or will be.

    Args:
        folder: The folder.
        num_bytes: What will be written there.
        what: Of it, for the error: "the checkpoint takes".
        advice: What the error tells a person to do.

    Raises:
        UserError: There is less.
    """
    existing = _existing(folder)
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(f"{existing} has {human(free, 'B')} free but {what} {human(num_bytes, 'B')}; {advice}")
    return free


def _existing(folder: Path) -> Path:
    """The folder, or what is there of those above it."""
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())
