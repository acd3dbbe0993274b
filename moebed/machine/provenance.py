"""What kept numbers were made from: results are mixed only where this is the same.

A record is plain data: the files, the text, the types, moebed's version and code. Its fingerprint stands for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from moebed.plugins import module_name, named_plugins

_PACKAGES = ("moebed", "probes")
_SAMPLES, _SAMPLE_BYTES = 4, 4096
_WHOLE_BYTES = 64 << 20


def fingerprint(record: Any) -> str:
    """Sixteen hex digits that stand for plain data."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def moebed_version() -> str:
    """The version that is installed."""
    try:
        return version("moebed")
    except PackageNotFoundError:
        return "unknown"


@lru_cache
def code() -> str:
    """Stands for moebed itself: its version, and the source of the packages that numbers come from."""
    return source(*_PACKAGES)


@lru_cache
def source(*packages: str) -> str:
    """Stands for moebed's version, and for the source of these packages, as it was when this process asked first."""
    return source_now(*packages)


def source_now(*packages: str, endings: tuple[str, ...] = (".py",)) -> str:
    """The same as it is now, of files with these endings."""
    digest = hashlib.sha256(moebed_version().encode())
    for package in packages:
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec is not None else None
        for folder in folders or ():
            for path in sorted(path for path in Path(folder).rglob("*") if path.suffix in endings):
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def source_of(kind: type) -> str:
    """Stands for what decides how a class computes: moebed, and the files of a plug-in that it comes from."""
    digest = hashlib.sha256(code().encode())
    files = {file for base in kind.__mro__ for file in _files_of(sys.modules.get(base.__module__))}
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _files_of(module: ModuleType | None, known: set[str] | None = None) -> Iterator[Path]:
    """The file of a plug-in's module, and those of the modules beside it that it uses; none of moebed's own."""
    known = set() if known is None else known
    file = getattr(module, "__file__", None)
    if module is None or not file or module.__name__ in known or module.__name__.partition(".")[0] in _PACKAGES:
        return
    known.add(module.__name__)
    path = Path(file).resolve()
    if "site-packages" in path.parts or path.is_relative_to(Path(json.__file__).resolve().parents[1]):
        return
    yield path
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        other = sys.modules.get(name) if isinstance(name, str) else None
        beside = getattr(other, "__file__", None)
        if beside and Path(beside).resolve().is_relative_to(path.parent):
            yield from _files_of(other, known)


def files_record(paths: Mapping[str, Path]) -> dict[str, list[Any]]:
    """The records of files, by name: what tells two files of one size apart."""
    return {name: file_record(path) for name, path in sorted(paths.items())}


def file_record(path: Path) -> list[Any]:
    """Size, time and a sample of the content of a file."""
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(_SAMPLES):  # the first bytes, the last ones, and some between
            file.seek(max(0, status.st_size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()[:16]]


def content_record(path: Path) -> list[Any]:
    """Size and content of a file, whatever its time and place: all of it, or of a large one a sample."""
    size, _, sample = file_record(path)
    whole = size <= _WHOLE_BYTES
    return [size, hashlib.sha256(path.read_bytes()).hexdigest()[:16] if whole else sample]


def plugins_record() -> dict[str, Any]:
    """The plug-ins of this process: the content of the files, and of the modules that they use beside them."""
    record: dict[str, list[Any]] = {}
    for name in named_plugins():
        files = sorted(set(_files_of(sys.modules.get(module_name(name)))))
        record.setdefault(Path(name).name, []).extend(content_record(path) for path in files)
    return record
