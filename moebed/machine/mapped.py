"""Large arrays that lie in files and not in memory: those of an uncompressed ``.npz``, and new ones to be filled."""

from __future__ import annotations

import struct
import tempfile
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

LARGE = 1 << 16  # bytes
_SPILLED = 1 << 25  # bytes; a new array from this size on
_PIECE = 1 << 20
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip archive's entry, whose name and extra field follow


def mapped_arrays(path: Path, check: bool = False, only: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The large arrays of a file that ``storage.write_arrays`` wrote, not read yet; changes to them are not written.

    Args:
        path: The file; it may be replaced or removed afterwards.
        check: Read through them, once, to see that they are whole.
        only: Those of these names; all if not given.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.
        zipfile.BadZipFile: It is damaged.
    """
    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if not _is_mapped(entry) or (only is not None and entry.filename.removesuffix(".npy") not in only):
                continue
            if check:
                with archive.open(entry) as part:
                    while part.read(_PIECE):
                        pass
            file.seek(entry.header_offset)
            name_size, extra_size = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(name_size + extra_size, 1)
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
            order = "F" if is_fortran else "C"
            found[entry.filename.removesuffix(".npy")] = np.memmap(path, dtype, "c", file.tell(), shape, order)  # type: ignore[call-overload]
    return found


def checksums(path: Path) -> dict[str, int]:
    """Of the large arrays of such a file, by name.

    Raises:
        OSError: It cannot be read.
        zipfile.BadZipFile: It is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        return {entry.filename.removesuffix(".npy"): entry.CRC for entry in archive.infolist() if _is_mapped(entry)}


def _is_mapped(entry: zipfile.ZipInfo) -> bool:
    return entry.compress_type == zipfile.ZIP_STORED and entry.file_size >= LARGE


def new_array(shape: tuple[int, ...], dtype: np.dtype, folder: Path | None) -> np.ndarray:
    """An array to be filled; where it is large, in a nameless file of a folder, which goes with it.

    Args:
        shape: Its.
        dtype: Its.
        folder: Made if need be; if None, the array is in memory whatever its size.
    """
    if folder is None or np.prod(shape, dtype=np.int64) * dtype.itemsize < _SPILLED:
        return np.empty(shape, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, "w+", shape=shape)
