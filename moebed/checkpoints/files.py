"""Files of tensors: what each holds, whether it is whole, and a way to read some rows of a tensor.

Nothing here runs code from a file. A safetensors file is a header in JSON and raw numbers; a ``.bin`` file is opened
with ``torch.load(weights_only=True, mmap=True)``, which admits tensors and refuses every other pickled object.

safetensors' own reader makes new tensors, or maps the file into the process; ours reads rows into memory that is given
and used again, which is how a checkpoint goes through a budget that it does not fit in.
"""

from __future__ import annotations

import abc
import json
import math
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moebed.checkpoints.cached import map_cached
from moebed.errors import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = ("F8_E4M3", "F8_E8M0", "U8")
_ITEMSIZE = {**{name: dtype.itemsize for name, dtype in DTYPES.items()}, **dict.fromkeys(CODES, 1)}
_LARGEST_HEADER = 32 << 20  # twice that of DeepSeek-V3, were it one file
_MOST_DIMENSIONS = 8
_READ_AT_ONCE = 16 << 20  # where bytes are copied on their way


class TensorEntry(Protocol):
    """One tensor in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    position: int  # sorts a file's tensors as they lie in it

    @property
    def file(self) -> RawFile | None:
        """The open file that it is read from; None where it is read by its name, or is mapped."""
        ...

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, columns), of the tensor's dtype, with the rows from ``first`` on; see TensorPart."""
        ...


class PackedEntry(abc.ABC):
    """A tensor that is stored as codes, fewer bytes than its numbers are; they are made as it is read."""

    path: Path
    file: RawFile | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    position: int

    @abc.abstractmethod
    def stored_bytes(self, rows: int) -> int:
        """Bytes that so many rows take in the file."""

    @abc.abstractmethod
    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, columns), of the tensor's dtype, with the rows from ``first`` on."""


class NamedEntry:
    """A tensor whose file is found by its name whenever some of it is read; others hold the file that was opened."""

    file = None


class RawEntry:
    """A tensor whose numbers lie in a file as they are in memory: of a safetensors file, or one that is not packed."""

    def __init__(self, file: RawFile, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
        self.path, self.shape, self.dtype = file.path, shape, dtype
        self.file, self.position = file, offset

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, columns) with the rows from ``first`` on, straight from the file."""
        offset = self.position + first * out.shape[-1] * out.element_size()
        self.file.read(offset, memoryview(out.view(torch.uint8).numpy().data).cast("B"))

    def cached(self, first: int, rows: int, columns: int) -> Tensor | None:
        """The rows from ``first`` on (rows, columns), mapped, where the kernel holds them in memory; else None."""
        size = columns * self.dtype.itemsize
        found = self.file.cached(self.position + first * size, rows * size)
        return None if found is None else found.view(self.dtype).view(rows, columns)


class RawFile:
    """An open file of which bytes are read into memory that is given."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._turn = threading.Lock()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel then reads further ahead

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, into: memoryview) -> None:
        """Read ``len(into)`` bytes from ``offset`` on; other threads may read at the same time."""
        done = 0
        while done < len(into):
            count = self._read_some(offset + done, into[done:])
            if count == 0:
                raise UserError(f"{self.path} ended while it was read; it has changed since the start")
            done += count

    def cached(self, offset: int, size: int) -> Tensor | None:
        """Bytes (size,) from ``offset`` on, mapped, where the kernel holds them in memory; else None."""
        return map_cached(self.descriptor, offset, size)

    def _read_some(self, offset: int, into: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [into], offset)
        with self._turn:  # elsewhere a descriptor has one position for all threads
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            found = os.read(self.descriptor, min(len(into), _READ_AT_ONCE))
        into[: len(found)] = found
        return len(found)


class _Described(NamedTuple):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def open_safetensors(path: Path) -> dict[str, TensorEntry]:
    """Entries of a safetensors file by name.

    Raises:
        UserError: The file is not safetensors, is cut short, or says what cannot be.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = file.read(length) if 0 < length <= min(_LARGEST_HEADER, size - 8) else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _described(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} has no whole safetensors header ({size} bytes in all); download the file again"
        ) from None
    before, reached = "", 0
    for name, found in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if 8 + length + found.end > size:
            raise UserError(
                f"{path} is cut short: tensor {name} ends at byte {8 + length + found.end} but the file has {size}; "
                "download the file again"
            )
        count = math.prod(found.shape) * _ITEMSIZE.get(found.dtype, 0)
        if found.dtype in _ITEMSIZE and found.end - found.begin != count:
            raise UserError(
                f"{path}: tensor {name} has {found.end - found.begin} bytes, which is not {found.dtype} "
                f"{list(found.shape)}"
            )
        if found.begin < reached and found.end > found.begin:
            raise UserError(f"{path}: tensors {before} and {name} lie over each other; download the file again")
        before, reached = name, max(reached, found.end)
    wanted = 8 + length + reached
    if size != wanted:
        raise UserError(f"{path} has {size} bytes but its header describes {wanted}; download the file again")
    opened = RawFile(path)
    return {name: _entry(opened, found, 8 + length) for name, found in tensors.items()}


def _described(entry: Mapping[str, Any]) -> _Described:
    """What a header says of a tensor; ValueError where it says what cannot be."""
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    numbers = [begin, end, *shape]
    if not isinstance(entry["dtype"], str) or len(shape) > _MOST_DIMENSIONS or begin > end:
        raise ValueError
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError
    return _Described(entry["dtype"], tuple(shape), begin, end)


def _entry(file: RawFile, found: _Described, data: int) -> TensorEntry:
    if found.dtype in DTYPES:
        return RawEntry(file, found.shape, DTYPES[found.dtype], data + found.begin)
    if found.dtype in CODES:
        return CodeEntry(file, found.shape, found.dtype, data + found.begin)
    return UnknownEntry(file.path, found.shape, found.dtype)


class UnknownEntry:
    """A tensor of a dtype that nothing here can read; an error only where the model needs it."""

    dtype = torch.uint8
    file: RawFile | None = None

    def __init__(self, path: Path, shape: tuple[int, ...], stored: str) -> None:
        self.path, self.shape, self.stored, self.position = path, shape, stored, 0

    def read(self, first: int, out: Tensor) -> None:
        """Not possible."""
        raise UserError(
            f"{self.path} is stored as {self.stored}, which cannot be read; get it in float32, float16 or bfloat16"
        )


class CodeEntry(UnknownEntry):
    """A tensor of codes of 8 bits, which are numbers only together with what lies beside them."""

    file: RawFile

    def __init__(self, file: RawFile, shape: tuple[int, ...], stored: str, offset: int) -> None:
        super().__init__(file.path, shape, stored)
        self.file, self.position = file, offset

    def read_codes(self, first: int, out: Tensor) -> None:
        """Fill out (rows, columns) uint8 with the rows from ``first`` on."""
        RawEntry(self.file, self.shape, torch.uint8, self.position).read(first, out)


class MappedEntry:
    """A tensor of a ``.bin`` file, mapped into memory; its pages are read when they are copied."""

    file = None

    def __init__(self, path: Path, tensor: Tensor) -> None:
        self.path, self.shape, self.dtype = path, tuple(tensor.shape), tensor.dtype
        self._tensor, self.position = tensor, tensor.data_ptr()

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, columns) with the rows from ``first`` on."""
        rows = self._tensor.reshape(-1, self.shape[-1]) if self.shape else self._tensor.reshape(1, 1)
        out.copy_(rows[first : first + len(out)])


def open_bin(path: Path, example: str | None = None) -> dict[str, TensorEntry]:
    """Entries of a ``.bin`` file, or of any file that ``torch.save`` wrote a dict of tensors to, by name.

    Args:
        path: The file.
        example: A tensor that the file should hold, for the error.

    Raises:
        UserError: The file is damaged, or holds something else than tensors.
    """
    found = load_mapped(path, example)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    inside = [name for name, value in found.items() if isinstance(value, Mapping)]
    if not tensors:
        where = f" but others under {inside[0]!r}; save that alone" if inside else ""
        raise UserError(f"{path} holds no tensors by name{where}")
    return {
        name: MappedEntry(path, tensor) if tensor.dtype in DTYPES.values() else _unknown(path, tensor)
        for name, tensor in tensors.items()
    }


def _unknown(path: Path, tensor: Tensor) -> UnknownEntry:
    return UnknownEntry(path, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def load_mapped(path: Path, example: str | None = None) -> Mapping[str, Any]:
    """What ``torch.save`` wrote, its tensors mapped instead of read; never anything but plain data and tensors."""
    of = f" (of tensor {example})" if example else ""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        said = " ".join(str(error).split())
        if "Unsupported" in said or "GLOBAL" in said or "weights_only" in said or "Weights only" in said:
            raise UserError(
                f"{path}{of} holds pickled objects beside tensors; it was refused and nothing in it was run: "
                "get the checkpoint as safetensors"
            ) from error
        if "mmap" in said:
            raise UserError(f"{path}{of} is in torch's format of before 1.6; save it anew with torch.save") from error
        raise UserError(f"{path}{of} is damaged or cut short ({said[:120]}); download the file again") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path}{of} holds a {type(found).__name__}, not tensors by name")
    return found
