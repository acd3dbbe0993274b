"""A folder of finished things: each is built beside its place and renamed into it, so none is ever half there."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from moebed.errors import UserError
from moebed.machine import storage

FORMAT_VERSION = 2


def cache_folder(configured: str | Path | None) -> Path:
    """Returns the folder to use: the one configured, else ``$MOEBED_CACHE``, else ``~/.cache/moebed``."""
    return Path(configured or os.environ.get("MOEBED_CACHE") or "~/.cache/moebed").expanduser().absolute()


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Returns 16 hex digits that stand for plain data; the cache's format version counts with it."""
    text = json.dumps({"format": FORMAT_VERSION} | dict(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_or_build(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Returns the folder ``cache/key``, building it first if it is not there.

    Any number of processes may ask at once: one builds, and the others wait for it and say so. Where files cannot be
    locked each builds in a folder of its own, the first to finish renames it into place, and the others drop theirs.

    Args:
        cache: The cache folder; made if need be.
        key: Name of the thing, which must stand for all that decides its content.
        build: Fills the empty folder it is given.

    Returns:
        The finished folder.

    Raises:
        UserError: If the cache cannot be written.
    """
    final = cache / key
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _turn(cache, key):
            if final.is_dir():  # made while this process waited
                return final
            with storage.new_folder(final) as temporary:
                build(temporary)
    except storage.NotWritten as error:
        if not final.is_dir():  # otherwise another process was first, and its folder is as good
            raise _unwritable(cache, error.reason) from error
    except OSError as error:
        raise _unwritable(cache, error.strerror or str(error)) from error
    return final


def _unwritable(cache: Path, reason: str) -> UserError:
    return UserError(
        f"cannot write the cache folder {cache}: {reason}; set MOEBED_CACHE, or for text data.cache_dir, to another"
    )


@contextmanager
def _turn(cache: Path, key: str) -> Iterator[None]:
    """This process's turn to build; at once where the file system has no locks."""
    path = cache / f".{key}.lock"
    with ExitStack() as held:
        lock = filelock.FileLock(path)
        try:
            try:
                held.enter_context(lock.acquire(timeout=0))
            except filelock.Timeout:
                print(f"waiting: another process makes {key} in {cache}", file=sys.stderr, flush=True)
                held.enter_context(lock.acquire())
        except (OSError, NotImplementedError) as error:
            if not os.access(cache, os.W_OK):
                raise
            print(f"note: {cache} has no locks ({error}); {key} may be made twice", file=sys.stderr, flush=True)
        try:
            yield
        finally:  # who waits for it has it open, and who comes later finds the folder or builds anew
            with suppress(OSError):
                path.unlink()
