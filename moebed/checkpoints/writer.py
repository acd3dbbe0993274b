"""A checkpoint folder written as a stream: every header first, then the tensors in order, a band of rows at a time.

Nothing holds more than the band that is being written, so that a model may be larger than memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.families.keys import KeyMap, Placed, TensorPart
from moebed.checkpoints.files import DTYPES
from moebed.checkpoints.stacked import joined, places
from moebed.errors import UserError
from moebed.machine import storage
from moebed.machine.places import require_empty, require_room
from moebed.machine.termination import ending_on_sigterm

SHARD_BYTES = 5 * 10**9
BAND_BYTES = 64 << 20  # of a tensor that is copied as it is
_CODES = {dtype: code for code, dtype in DTYPES.items()}

# What a region of a decoder's parameter holds: bands of rows (rows, columns), or (columns,) for a vector, in order.
Content = Callable[[str, Placed], Iterable[Tensor]]


@dataclass
class _Planned:
    """A tensor of the checkpoint, and the regions of parameters that fill it.

    In order of their rows; or where some lie in turn, so many of them, joined, after so many others. Unused rows are
    the last.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    turns: int = 0
    unused: int = 0
    pieces: list[tuple[int, str, Placed]] = field(default_factory=list)  # the first number sorts them

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def bands(self, content: Content) -> Iterator[Tensor]:
        """Its numbers, some at a time; where some lie in turn, of as many pieces."""
        if not self.turns:
            for _, parameter, placed in self.pieces:
                yield from content(parameter, placed)
        for first in range(0, len(self.pieces) if self.turns else 0, max(1, self.turns)):
            taken = self.pieces[first : first + self.turns]
            matrices = [torch.cat(list(content(parameter, placed))) for _, parameter, placed in taken]
            yield joined([one.view(placed.part.shape) for one, (*_, placed) in zip(matrices, taken, strict=True)])
        if self.unused:
            yield torch.zeros(self.unused, *self.shape[1:])


class FolderWriter:
    """Plans and writes the weights of a checkpoint folder.

    Args:
        keys: The model and the family in whose names it is written.
        settings: Its ``config.json``; the dtype is added.
        dtype: What the weights are stored in; the routers' own state, such as a selection bias, in float32.
        shard_bytes: Largest size of one file; a tensor larger than that has a file to itself.
        dtypes: What single parameters are stored in, by name, where that is something else.
    """

    def __init__(
        self,
        keys: KeyMap,
        settings: Mapping[str, Any],
        dtype: torch.dtype = torch.bfloat16,
        shard_bytes: int = SHARD_BYTES,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        # Both names: transformers before version 5 knows the first one only.
        name = str(dtype).removeprefix("torch.")
        self.settings = {**settings, "torch_dtype": name, "dtype": name}
        kept = {**dict.fromkeys(keys.state, torch.float32), **(dtypes or {})}
        planned: dict[str, _Planned] = {}
        stacks = places(keys)
        for parameter in keys.shapes:
            for placed in keys.parameter(parameter):
                part, where = placed.part, stacks.get(placed.part.name)
                name, shape, order, turns = where or (part.name, part.shape, part.first, 0)
                new = _Planned(shape, kept.get(parameter, dtype), turns, keys.unused(parameter))
                tensor = planned.setdefault(name, new)
                tensor.pieces.append((order, parameter, placed))
        for tensor in planned.values():
            tensor.pieces.sort(key=lambda piece: piece[0])
        self._shards: list[dict[str, _Planned]] = [{}]
        size = 0
        for tensor_name, tensor in planned.items():
            count = tensor.num_bytes
            if self._shards[-1] and size + count > shard_bytes:
                self._shards.append({})
                size = 0
            self._shards[-1][tensor_name] = tensor
            size += count
        self.total = sum(tensor.num_bytes for tensor in planned.values())

    def write(
        self,
        folder: Path,
        content: Content,
        finish: Callable[[Path], None] = lambda folder: None,
        on_write: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Write the folder under a temporary name beside it, then rename it: it is there whole, or not at all.

        Args:
            folder: A new or empty folder.
            content: What goes where.
            finish: Writes further files, such as the tokenizer's, into the folder that it is given.
            on_write: Called with the bytes of every band that is written.

        Raises:
            UserError: The folder holds something, or cannot be written.
        """
        with new_folder(folder, self.total) as partial:
            weight_map: dict[str, str] = {}
            for number, shard in enumerate(self._shards, 1):
                many = len(self._shards) > 1
                name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors" if many else "model.safetensors"
                with (partial / name).open("wb") as file:
                    self._write_shard(file, shard, content, on_write)
                weight_map |= dict.fromkeys(shard, name)
            if len(self._shards) > 1:
                index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
                (partial / "model.safetensors.index.json").write_text(
                    json.dumps(index, indent=2) + "\n", encoding="utf-8"
                )
            finish(partial)
            (partial / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def _write_shard(
        self, file: BinaryIO, shard: dict[str, _Planned], content: Content, on_write: Callable[[int], None]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in shard.items():
            header[name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.num_bytes],
            }
            offset += tensor.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format asks for tensors aligned to 8 bytes
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in shard.items():
            written = 0
            for band in tensor.bands(content):
                data = band.detach().to("cpu", tensor.dtype).contiguous()
                file.write(data.view(-1).view(torch.uint8).numpy().data)
                written += data.numel()
                on_write(data.numel() * data.element_size())
            if written != tensor.numel:
                raise RuntimeError(f"{name} has {tensor.numel} numbers but {written} were written")


def stored_dtypes(source: Checkpoint) -> dict[str, torch.dtype]:
    """What each parameter of a checkpoint's model is stored in; the widest, where its parts differ."""
    found = {name: [source.dtype(placed.part) for placed in source.keys.parameter(name)] for name in source.keys.shapes}
    return {name: reduce(torch.promote_types, dtypes) for name, dtypes in found.items()}


def read_bands(source: Checkpoint, part: TensorPart) -> Iterator[Tensor]:
    """The rows of a part of a checkpoint, some at a time, as they are stored."""
    rows = max(1, BAND_BYTES // max(1, part.columns * source.dtype(part).itemsize))
    for first in range(part.first, part.first + part.rows, rows):
        yield source.read(part._replace(first=first, rows=min(rows, part.first + part.rows - first)))


@contextmanager
def new_folder(folder: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name at the end, and is removed if that is not reached, by
    SIGTERM as well.

    Args:
        folder: A new or empty folder.
        num_bytes: What will be written, to be refused at once where the disk has no room for it.

    Raises:
        UserError: The folder holds something, or cannot be written.
    """
    folder = folder.resolve()
    require_empty(folder)
    storage.remove_leftovers(folder)  # they count as free
    require_room(folder, num_bytes, "the checkpoint takes")
    try:
        with ending_on_sigterm(), storage.new_folder(folder) as partial:
            yield partial
    except storage.NotWritten as error:
        raise UserError(f"the checkpoint cannot be written to {folder} ({error.reason})") from error
