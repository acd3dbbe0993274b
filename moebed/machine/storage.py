"""The one place where moebed writes what it keeps: every file and folder is there whole, or not at all.

What is written lies beside its place as ``.NAME.OWNER.PID.partial``, is flushed to the disk and only then takes the
name. A killed process leaves such a partial thing, file or folder; the next writer of the same name removes it. Where
a folder is replaced, or replaced by a file, the older one is called ``.NAME.old`` between two renames: ``standing``
finds it there, and ``recover`` gives it its name again.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import psutil

from moebed.errors import SharedError, UserError

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

ADVICE = "make room or choose another folder"
_END = ".partial"
_STALE_SECONDS = 24 * 3600  # a partial thing of another machine that nothing was written to for so long


class NotWritten(UserError):
    """A file or folder could not be written.

    Args:
        path: It.
        reason: What the system says.
        advice: What a person should do.
    """

    def __init__(self, path: Path, reason: str, advice: str) -> None:
        before = "; what was there before is whole" if os.path.lexists(standing(path)) else ""
        super().__init__(f"{path} could not be written ({reason}); {advice}{before}")
        self.reason = reason


def checkpoint_advice(path: Path) -> str:
    """What to do about a checkpoint of a run that could not be written: go on from an earlier one, if there is any."""
    earlier = any(os.path.lexists(standing(one)) for one in (path, path.with_name("last.ckpt")))
    return f"{ADVICE}, then {'continue with --ckpt_path last' if earlier else 'start again: there is none before it'}"


def reason_of(error: BaseException) -> str:
    """What the system said, though a library met it and raised something else over it; else the error's first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def new_file(path: Path, advice: str = ADVICE, sole: bool = False) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    Args:
        path: A file, or what a folder gives way to; folders above it are made.
        advice: What the error tells a person to do.
        sole: The name belongs to this writer alone: whatever was left of it goes, whoever left it and of either kind.

    Raises:
        NotWritten: It cannot be.
    """
    with _new(path, advice, sole) as partial:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path, advice: str = ADVICE, sole: bool = False) -> Iterator[Path]:
    """The same of a folder: an empty one to write into, which takes the place of ``path``.

    Raises:
        NotWritten: It cannot be.
    """
    with _new(path, advice, sole) as partial:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)


@contextmanager
def _new(path: Path, advice: str, sole: bool) -> Iterator[Path]:
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path, sole)
        yield partial
        take_place(partial, path, sole)
    except BaseException as error:
        with suppress(OSError):
            remove(partial)
        if isinstance(error, OSError):
            raise NotWritten(path, error.strerror or str(error), advice) from error
        raise


def write_bytes(path: Path, content: bytes, advice: str = ADVICE) -> Path:
    """Write a file."""
    with new_file(path, advice) as file:
        file.write(content)
    return path


def write_text(path: Path, text: str, advice: str = ADVICE) -> Path:
    """Write a text in UTF-8."""
    return write_bytes(path, text.encode(), advice)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], note: str = "", compressed: bool = True) -> Path:
    """Write arrays as ``.npz``: the same arrays in the same order give the same bytes.

    Args:
        path: The file.
        arrays: By name.
        note: Kept as the archive's comment, where ``read_note`` finds it and ``numpy.load`` does not mind it.
        compressed: Whether to deflate arrays of less than 64 kB; larger ones never are, so that they can be mapped.
    """
    import zipfile

    import numpy as np

    from moebed.machine.mapped import LARGE

    with new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.comment = note.encode()
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            array = np.asanyarray(array)
            is_stored = array.nbytes >= LARGE or not compressed
            entry.compress_type = zipfile.ZIP_STORED if is_stored else zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as part:
                np.lib.format.write_array(part, array, allow_pickle=False)
    return path


def read_note(path: Path) -> str:
    """The note that ``write_arrays`` put into a file; empty where there is none or the file is damaged."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode(errors="replace")
    except (OSError, zipfile.BadZipFile):
        return ""


# Names ----------------------------------------------------------------------------------------------------------------


def partial_name(path: Path) -> Path:
    """Where this process writes what will be called ``path``."""
    return path.with_name(f".{path.name}.{_owner()}.{os.getpid()}{_END}")


def old_name(path: Path) -> Path:
    """What the thing at ``path`` is called while another takes its place."""
    return path.with_name(f".{path.name}.old")


def _owner() -> str:
    """This machine, and the space in which its process numbers count: containers of one machine have their own."""
    with suppress(OSError):
        return f"{socket.gethostname()[:48]}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()[:48]


def leftovers(path: Path, sole: bool = False) -> list[Path]:
    """Partial things, files or folders, of the name ``path`` that no living process is writing.

    Args:
        path: The finished thing.
        sole: Nobody else writes this name, so all of them.
    """
    start = f".{path.name}."
    found = []
    for name in os.listdir(path.parent) if path.parent.is_dir() else ():
        if name.startswith(start) and name.endswith(_END):
            owner, _, number = name[len(start) : -len(_END)].rpartition(".")
            if sole or _is_abandoned(path.with_name(name), owner, number):
                found.append(path.with_name(name))
    former = path.with_name(path.name + _END)  # as versions before wrote it
    return [*found, former] if os.path.lexists(former) else found


def _is_abandoned(partial: Path, owner: str, number: str) -> bool:
    if owner != _owner() or not number.isdecimal():
        return time.time() - _last_written(partial) > _STALE_SECONDS
    return int(number) == os.getpid() or not psutil.pid_exists(
        int(number)
    )  # an earlier process may have had our number


def _last_written(path: Path) -> float:
    """When something in a file or folder was changed last."""
    latest = 0.0
    for one in (path, *(path.rglob("*") if path.is_dir() else ())):
        with suppress(OSError):
            latest = max(latest, one.lstat().st_mtime)
    return latest


def remove_leftovers(path: Path, sole: bool = False) -> None:
    """Remove what killed processes left of the name ``path``, files and folders."""
    for leftover in leftovers(path, sole):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; fine if there is none, or if it goes meanwhile."""
    while path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
    path.unlink(missing_ok=True)


# Replacing ------------------------------------------------------------------------------------------------------------


def take_place(partial: Path, path: Path, sole: bool = False) -> None:
    """Give what was written the name of the older file or folder, which goes once the new one has it.

    Args:
        partial: What was written.
        path: The name. A folder that holds something, and a file where a folder shall be, give way only if ``sole``.
        sole: See ``new_file``.

    Raises:
        OSError: It cannot be.
    """
    is_folder = path.is_dir() and not path.is_symlink()
    if not sole and ((is_folder and os.listdir(path)) or (partial.is_dir() and os.path.isfile(path))):
        raise FileExistsError(errno.EEXIST, "there is a folder that is not empty" if is_folder else "there is a file")
    if is_folder or (partial.is_dir() and os.path.lexists(path)):
        old = old_name(path)
        remove(old)
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(old, path)
            raise
        remove(old)
    else:
        os.replace(partial, path)
    with suppress(OSError):  # not every file system can
        _flush(path.parent)


def _flush(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def standing(path: Path) -> Path:
    """Where to read what is called ``path``: there, or where it was put aside by a writer that was stopped.

    Nothing is changed, so that a reader takes nothing away from a run that is writing.
    """
    return old_name(path) if not os.path.lexists(path) and os.path.lexists(old_name(path)) else path


def recover(folder: Path) -> None:
    """Give everything in a folder its name again whose replacement was stopped between two renames.

    For the process that will write there, before it looks at what is there; other ranks use ``wait_for_recovery``.
    """
    for path in _put_aside(folder):
        if os.path.lexists(path):
            remove(old_name(path))
        else:
            os.rename(old_name(path), path)


def wait_for_recovery(folder: Path, seconds: float = 60.0) -> None:
    """Wait until another process has called ``recover``, and this one sees what it did."""
    end = time.monotonic() + seconds
    while any(not os.path.lexists(path) for path in _put_aside(folder)) and time.monotonic() < end:
        time.sleep(0.05)


def _put_aside(folder: Path) -> list[Path]:
    """The names of what was put aside in a folder."""
    names = os.listdir(folder) if folder.is_dir() else ()
    return [folder / name[1 : -len(".old")] for name in names if name.startswith(".") and name.endswith(".old")]


# Ranks ----------------------------------------------------------------------------------------------------------------


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def on_first_rank(action: Callable[[], T]) -> T:
    """Have the first rank do something; every rank gets what it returned, or raises what it raised.

    Without other processes it is no more than the call.

    Raises:
        SharedError: It failed, on every rank with the same words.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    error: BaseException | None = None
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[1] = action()
        except Exception as caught:  # noqa: BLE001 - all ranks are told
            error, outcome = caught, [_words(caught), None]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise SharedError(outcome[0], dist.get_rank()) from error
    return outcome[1]


def agree(
    error: BaseException | None,
    words: Callable[[int, str], str] = lambda rank, said: said,
    say: Callable[[BaseException], str] = _words,
) -> None:
    """After something that each rank did for itself: go on if it went well on all, or raise the same error on all.

    Args:
        error: What this rank met.
        words: The message, from the first rank that failed and what it said.
        say: What a rank says of an error.

    Raises:
        SharedError: A rank failed.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        if isinstance(error, UserError):
            raise error
        failed, rank = [(0, say(error))] if error is not None else [], 0
    else:
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, None if error is None else say(error))
        failed, rank = [(rank, text) for rank, text in enumerate(said) if text is not None], dist.get_rank()
    if failed:
        raise SharedError(words(*failed[0]), rank) from error
