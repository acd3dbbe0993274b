"""The header of a GGUF file: metadata by key, and where each tensor lies. No count or length in it is believed.

Everything that a header announces must fit into the file before room is made for it. Long arrays, such as a
tokenizer's, are walked over and read when they are asked for.

A file is: ``GGUF``, version u32, tensors u64, metadata u64; metadata (key, type u32, value); tensors (name, dimensions
u32, sizes u64 with the fastest first, type u32, offset u64); tensor data from the next multiple of the alignment on.
A string is its length u64 and UTF-8; an array is the type u32 of its elements, their number u64, and they.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moebed.checkpoints.gguf.types import TYPES, GgmlType
from moebed.errors import UserError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 32  # where a file names none
_MOST_DIMENSIONS = 4
# No model comes near these; a header that goes beyond them was not written by what writes models.
_LARGEST_HEADER = 64 << 20
_LARGEST_STRING = 1 << 20
_MOST_TENSORS = 1 << 17
_MOST_KEYS = 1 << 14
_MOST_STRING_BYTES = 16 << 20  # of all strings that are kept
_LARGEST_SIZE = 1 << 40


class Stretch(NamedTuple):
    """An array that was walked over: the type of its elements, how many, and where they begin."""

    kind: int
    length: int
    offset: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Args:
        path: The file.
        name: What the file calls it.
        shape: Sizes, the fastest last.
        kind: In what its numbers lie there.
        offset: Where it begins, in bytes from the start of the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.kind.block * self.kind.num_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass
class Header:
    """What a file's header says.

    Args:
        path: The file.
        values: Metadata by key; long arrays as a :class:`Stretch`.
        tensors: Tensors by name.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, TensorInfo]
    used: set[str] = field(default_factory=set)  # keys that were asked for

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata.

        Args:
            key: Its key.
            kind: int, float (which takes whole numbers too), bool or str.
            default: What it is where the file has none.

        Raises:
            UserError: It is of another kind.
        """
        self.used.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        good = isinstance(value, int | float if kind is float else kind) and (kind is bool or type(value) is not bool)
        if not good or (kind is float and not math.isfinite(value)):
            wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
            said = "an array" if isinstance(value, Stretch) else repr(value)[:60]
            raise UserError(f"{self.path}: {key} is {said}; it must be {wanted}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A size in the metadata, at least 1.

        Raises:
            UserError: It is missing and has no default, or is none.
        """
        value = self.get(key, int, default)
        if value is None:
            raise UserError(f"{self.path}: {key} is missing from its metadata")
        if not 1 <= value <= 1 << 31:
            raise UserError(f"{self.path}: {key} is {value}, which is no size of a model")
        return int(value)

    def array(self, key: str, text: bool = False) -> list[Any] | None:
        """All elements of an array of numbers, or of strings; None where the file has none of that key.

        Raises:
            UserError: It is none.
        """
        self.used.add(key)
        found = self.values.get(key)
        if found is None:
            return None
        if not isinstance(found, Stretch) or text != (found.kind == _STRING):
            raise UserError(f"{self.path}: {key} must be an array of {'strings' if text else 'numbers'}")
        with _mapped(self.path) as data:
            cursor = _Cursor(self.path, data, found.offset)
            if text:
                return [cursor.text(errors="replace") for _ in range(found.length)]
            return list(cursor.numbers(_NUMBERS[found.kind], found.length))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """The header of a file, checked against the file's size.

    Raises:
        UserError: It is damaged, cut short, or of a version that is not known.
    """
    with _mapped(path) as data:
        cursor = _Cursor(path, data, len(MAGIC))
        (version,) = cursor.numbers("I", 1)
        if version not in _VERSIONS:
            swapped = " (its bytes are in big-endian order)" if version and version & 0xFFFF == 0 else ""
            raise UserError(f"{path} is GGUF of version {version}{swapped}; versions 2 and 3 are read")
        tensors, keys = cursor.numbers("Q", 2)
        cursor.require_count(tensors, 24, _MOST_TENSORS, "tensors")
        cursor.require_count(keys, 13, _MOST_KEYS, "keys")
        values = dict(_read_values(cursor, keys))
        alignment = values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise UserError(f"{path}: general.alignment is {alignment!r}; it must be a number of bytes")
        infos = [_read_tensor(cursor) for _ in range(tensors)]
        start = -(-cursor.place // alignment) * alignment
    found: dict[str, TensorInfo] = {}
    for info in infos:
        placed = TensorInfo(path, info.name, info.shape, info.kind, start + info.offset)
        if found.setdefault(info.name, placed) is not placed:
            raise UserError(f"{path} has two tensors {info.name}; download it again")
    _require_room(path, found)
    return Header(path, values, found)


def _require_room(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise UserError if a tensor does not lie wholly in the file, or in another one's place."""
    size, before, end = path.stat().st_size, "", 0
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset + info.num_bytes > size:
            raise UserError(
                f"{path} is cut short: tensor {info.name} ends at byte {info.offset + info.num_bytes} but the file has "
                f"{size}; download it again"
            )
        if info.offset < end:
            raise UserError(f"{path}: tensors {before} and {info.name} lie over each other; download it again")
        before, end = info.name, info.offset + info.num_bytes


def _read_values(cursor: _Cursor, keys: int) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for _ in range(keys):
        key = cursor.text()
        if key in seen:
            cursor.fail(f"key {key} is there twice")
        seen.add(key)
        yield key, cursor.value()


def _read_tensor(cursor: _Cursor) -> TensorInfo:
    """A tensor, its offset counted from where the tensors' data begin."""
    name = cursor.text()
    (dimensions,) = cursor.numbers("I", 1)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        cursor.fail(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(reversed(cursor.numbers("Q", dimensions)))
    kind, offset = *cursor.numbers("I", 1), *cursor.numbers("Q", 1)
    if kind not in TYPES:
        raise UserError(
            f"{cursor.path}: tensor {name[:200]} is packed as ggml's type {kind}, which is not known here; give a file "
            "of another kind, such as Q8_0, or download it again if it should be one"
        )
    if not all(1 <= size <= _LARGEST_SIZE for size in shape):
        cursor.fail(f"tensor {name} has shape {list(shape)}")
    if shape[-1] % TYPES[kind].block:
        cursor.fail(f"tensor {name} has rows of {shape[-1]}, which are no whole blocks of {TYPES[kind].name}")
    return TensorInfo(cursor.path, name, shape, TYPES[kind], offset)


def _mapped(path: Path) -> mmap.mmap:
    """A file's bytes, which are read as they are looked at."""
    if path.stat().st_size < len(MAGIC):
        raise UserError(f"{path} is cut short; download it again")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Cursor:
    """Goes through a header; whatever would lead beyond it is a UserError."""

    def __init__(self, path: Path, data: mmap.mmap, place: int) -> None:
        self.path, self.place, self._data = path, place, data
        self._end = min(len(data), _LARGEST_HEADER)
        self._kept = 0

    def fail(self, why: str) -> None:
        """Raise UserError."""
        raise UserError(f"{self.path} has a damaged GGUF header: {why[:200]}; download it again")

    def require_count(self, count: int, least: int, most: int, what: str) -> None:
        """Raise UserError if so many things, of ``least`` bytes each, cannot be there."""
        if count > most or count * least > self._end - self.place:
            self.fail(f"it announces {count} {what}")

    def _take(self, count: int) -> int:
        """Go on by some bytes; returns where they begin."""
        begin = self.place
        if count > self._end - begin:
            self.fail(f"it goes on beyond byte {self._end}")
        self.place = begin + count
        return begin

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        """Some numbers of one of struct's kinds."""
        begin = self._take(count * struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{count}{kind}", self._data, begin)

    def text(self, errors: str = "strict") -> str:
        """A string."""
        (length,) = self.numbers("Q", 1)
        self._kept += length
        if length > _LARGEST_STRING or self._kept > _MOST_STRING_BYTES:
            self.fail(f"it holds a string of {length} bytes")
        begin = self._take(length)
        try:
            return self._data[begin : begin + length].decode("utf-8", errors)
        except UnicodeDecodeError:
            self.fail("a name or text in it is no UTF-8")
            raise

    def value(self) -> Any:
        """A value of the metadata."""
        (kind,) = self.numbers("I", 1)
        if kind == _STRING:
            return self.text(errors="replace")
        if kind == _ARRAY:
            return self._pass_array()
        if kind not in _NUMBERS:
            self.fail(f"it holds a value of type {kind}")
        (found,) = self.numbers(_NUMBERS[kind], 1)
        # The shortest number that float32 has as this one, which is what was written: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(found))) if kind == _FLOAT32 else found

    def _pass_array(self) -> Stretch:
        kind, count = *self.numbers("I", 1), *self.numbers("Q", 1)
        found = Stretch(kind, count, self.place)
        if kind in _NUMBERS:
            self._take(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            self.require_count(count, _LENGTH.size, self._end, "strings")
            place, last = self.place, self._end - _LENGTH.size
            for _ in range(count):  # a vocabulary and its merges are hundreds of thousands
                if place > last:
                    self.fail(f"it goes on beyond byte {self._end}")
                place += _LENGTH.size + _LENGTH.unpack_from(self._data, place)[0]
            self._take(place - self.place)
        else:  # arrays of arrays are allowed by the format, and in no model
            self.fail(f"it holds an array of type {kind}")
        return found
