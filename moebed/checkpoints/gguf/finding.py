"""Which GGUF files a model is: one, or several that belong together; and which of a folder's is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from moebed.checkpoints.finding import WEIGHTS
from moebed.checkpoints.gguf.header import is_gguf
from moebed.errors import UserError

_SPLIT = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# What lies beside models and is none: projectors of images, importance matrices, vocabularies.
_NO_MODEL = re.compile(r"^(mmproj|ggml-vocab)|imatrix", re.IGNORECASE)
# As split(1) and people cut files for hubs that take no large ones.
_CUT = re.compile(r"\.gguf[.-](split-?|part-?)?([a-z]{1,2}|\d+(of\d+)?)$", re.IGNORECASE)


def gguf_at(path: Path) -> Path | None:
    """The GGUF file that a path stands for: itself, or the only model of a folder that has no other weights.

    Returns:
        The file, the first one where a model is several; None where the path stands for something else.

    Raises:
        UserError: The folder holds several models.
    """
    if path.is_file():
        if _CUT.search(path.name):
            raise UserError(f"{path} is a part of a file that was cut; join all of them in order with cat, as X.gguf")
        return _first(path) if is_gguf(path) else None
    if not path.is_dir() or any((path / name).is_file() for name in WEIGHTS):
        return None
    models = models_among(path.name for path in path.glob("*.gguf"))
    if len(models) > 1:
        names = [files[0] for files in models]
        raise UserError(f"{path} holds {len(models)} GGUF models; give one of them, such as {path / names[0]}")
    return path / models[0][0] if models else None


def models_among(names: Iterable[str]) -> list[list[str]]:
    """Names of GGUF files, or paths, put together to models; files that are no models are left out."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if not _NO_MODEL.search(name.rpartition("/")[2]):
            found = _SPLIT.fullmatch(name)
            models.setdefault(f"{found['name']}-of-{found['count']}" if found else name, []).append(name)
    return list(models.values())


def files_of(path: Path) -> Sequence[Path]:
    """All files of the model of which one is given, in order.

    Raises:
        UserError: One is missing.
    """
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    there = {name.name for name in path.parent.glob("*.gguf")}
    files = [f"{found['name']}-{number:05d}-of-{found['count']}.gguf" for number in range(1, min(count, 1 << 12) + 1)]
    missing = [name for name in files if name not in there]
    if missing or count != len(files):
        raise UserError(
            f"{path.parent / (missing or files)[0]} is missing; the model is {count} files: get all of them"
        )
    return [path.parent / name for name in files]


def _first(path: Path) -> Path:
    found = _SPLIT.fullmatch(path.name)
    first = path.with_name(f"{found['name']}-00001-of-{found['count']}.gguf") if found else path
    return first if first.is_file() else path
