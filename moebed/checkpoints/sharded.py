"""A run's checkpoint in parts: each rank writes what it holds (torch.distributed.checkpoint), any layout reads it.

last.ckpt/
    __0_0.distcp, __1_0.distcp, ...   a file a rank: `model.NAME` and `optimizer.NAME.STATE`, parts of whole tensors
    .metadata                         which part of which tensor lies where
    rest.ckpt                         all that is no tensor of the model or optimizer; written last

A folder takes the place of an older one when it is whole (see moebed.machine.storage). Checkpoints are data:
`.metadata` is a pickle, of which only the handful of records that it is made of are admitted.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from moebed.checkpoints.files import NamedEntry, TensorEntry
from moebed.errors import SharedError, UserError
from moebed.machine import storage

REST = "rest.ckpt"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Builds the records of a metadata file and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # pathlib's classes live in a private module from Python 3.13 on.
        if name in _RECORDS.get("pathlib" if module.startswith("pathlib") else module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours holds")


class Reader(dcp.FileSystemReader):
    """Reads parts of tensors; raises UserError where its metadata is damaged or holds anything but records."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds."""
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise UserError(
                f"checkpoint {path.parent} cannot be read ({storage.reason_of(error)}); use an earlier one"
            ) from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint is a folder of parts."""
    return (Path(path) / REST).is_file()


def sizes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a folder, by name."""
    found = Reader(path).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def entries(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the model in a folder, by its name in the model, to be read some rows at a time."""
    metadata = Reader(path).read_metadata()
    return {
        name.removeprefix("model."): PartsEntry(path, name, entry, metadata.storage_data, position)
        for position, (name, entry) in enumerate(metadata.state_dict_metadata.items())
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


class PartsEntry(NamedEntry):
    """A tensor of which several ranks wrote a part each; some rows are read without the rest of a part."""

    def __init__(self, path: Path, name: str, entry: TensorStorageMetadata, places: Any, position: int) -> None:
        self.path, self.shape, self.dtype, self.position = path, tuple(entry.size), entry.properties.dtype, position
        self._parts = [_Part(self, chunk, places[MetadataIndex(name, chunk.offsets)]) for chunk in entry.chunks]

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, columns) with the rows from ``first`` on; see TensorPart."""
        for part in self._parts:
            part.read(first, out)


class _Part:
    """What one rank wrote of a tensor: a block of it, as ``torch.save`` writes it, somewhere in the rank's file."""

    def __init__(self, entry: PartsEntry, chunk: ChunkStorageMetadata, place: Any) -> None:
        self._entry, self._chunk, self._place = entry, chunk, place
        self._file = entry.path / place.relative_path
        self._start: int | None = None  # of the numbers, in the file; -1 where they do not lie in order

    @cached_property
    def _rows(self) -> Tensor:
        """(n,) which rows of the tensor the part's rows are, ascending."""
        row = torch.zeros(1, dtype=torch.long)
        shape = self._entry.shape
        for offset, size, length in zip(self._chunk.offsets[:-1], self._chunk.sizes[:-1], shape[:-1], strict=True):
            row = (row.unsqueeze(1) * length + torch.arange(offset, offset + size)).flatten()
        return row

    def read(self, first: int, out: Tensor) -> None:
        """Fill in those of the rows from ``first`` on that are in this part."""
        begin, end = torch.searchsorted(self._rows, torch.tensor([first, first + len(out)])).tolist()
        if begin == end:
            return
        width = self._chunk.sizes[-1] if self._entry.shape else 1
        column = self._chunk.offsets[-1] if self._entry.shape else 0
        where = self._rows[begin:end] - first
        try:
            out[where, column : column + width] = self._load(begin, end - begin, width)
        except UserError:
            raise
        except Exception as error:  # torch raises several unrelated types for a damaged file
            raise UserError(f"{self._file} cannot be read ({_first_line(error)}); use an earlier checkpoint") from error

    def _load(self, begin: int, count: int, width: int) -> Tensor:
        """Some of the part's rows (count, width)."""
        if self._start is None:
            self._start = self._find()
        with open(self._file, "rb") as file:
            if self._start < 0:
                file.seek(self._place.offset)
                whole = io.BytesIO(file.read(self._place.length))
                loaded = torch.load(whole, map_location="cpu", weights_only=True)
                return loaded.reshape(-1, width)[begin : begin + count]
            values = torch.empty(count, width, dtype=self._entry.dtype)
            file.seek(self._start + begin * width * values.element_size())
            if file.readinto(values.view(torch.uint8).numpy().data) != values.nbytes:
                raise OSError("it is cut short")
            return values

    def _find(self) -> int:
        """Where the part's numbers begin in the file; only the part's description is read."""
        with open(self._file, "rb") as file:
            window: Any = _create_file_view(file, self._place.offset, self._place.length)
            with FakeTensorMode():
                found = torch.load(window, map_location="cpu", weights_only=True)
        offset = getattr(found.untyped_storage(), "_checkpoint_offset", None)
        plain = found.is_contiguous() and found.storage_offset() == 0 and found.dtype == self._entry.dtype
        if offset is None or not plain or tuple(found.shape) != tuple(self._chunk.sizes):
            return -1
        return self._place.offset + offset


def read_rest(path: Path) -> dict[str, Any]:
    """All that is no tensor of the model or of the optimizer."""
    try:
        return torch.load(path / REST, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated types for a damaged file
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"checkpoint {path / REST} cannot be read ({first_line}); use an earlier one") from error


def read_tensors(path: Path, tensors: dict[str, Any], alone: bool = False) -> None:
    """Fill tensors in place from a folder, whatever layout it was written in; DTensors get this rank's part.

    Args:
        path: The folder.
        tensors: By name in the folder.
        alone: Only this process reads; otherwise all ranks do, together.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as `alone` says
            dcp.load(tensors, storage_reader=Reader(path), no_dist=alone)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, dcp.api.CheckpointException) as error:
        raise UserError(f"checkpoint {path} cannot be read ({_first_line(error)}); use an earlier one") from error


def read_whole(path: Path) -> dict[str, Any]:
    """A folder as the dictionary that a single file of the same run would hold, every tensor in full."""
    rest = read_rest(path)
    tensors: dict[str, Any] = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes(path).items()}
    read_tensors(path, tensors, alone=True)
    rest["state_dict"] = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    for state in rest.get("optimizer_states", []):
        state["state"] = unflatten(tensors, state.pop("names"))
    return rest


def write(path: Path, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Write a folder, all ranks together; what was at path before stays whole until the new one is.

    Raises:
        SharedError: It could not be written.
    """
    partial: Path | None = None

    def begin() -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.remove_leftovers(path, sole=True)
        folder = storage.partial_name(path)
        folder.mkdir()
        return folder

    def finish() -> None:
        assert partial is not None
        with open(partial / REST, "wb") as file:
            torch.save(dict(rest), file)
            file.flush()
            os.fsync(file.fileno())
        storage.take_place(partial, path, sole=True)

    try:
        partial = storage.on_first_rank(begin)
        error: BaseException | None = None
        try:
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(partial))
        except (Exception, dcp.api.CheckpointException) as caught:  # noqa: BLE001 - all ranks are told
            error = caught
        storage.agree(error, lambda rank, said: f"rank {rank}: {said}", _first_line)
        storage.on_first_rank(finish)
    except (SharedError, OSError, RuntimeError) as error:
        if partial is not None and dist.get_rank() == 0:
            storage.remove(partial)
        said = storage.NotWritten(path, _first_line(error), storage.checkpoint_advice(path))
        raise SharedError(f"checkpoint {said}", dist.get_rank()) from error


def flatten(states: Mapping[int, Mapping[str, Any]], names: list[str]) -> dict[str, Tensor]:
    """An optimizer's state, by parameter's number, as tensors by name."""
    return {
        f"optimizer.{names[number]}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, state in states.items()
        for key, value in state.items()
    }


def unflatten(tensors: Mapping[str, Tensor], names: list[str]) -> dict[int, dict[str, Tensor]]:
    """An optimizer's state by parameter's number again."""
    numbers = {name: number for number, name in enumerate(names)}
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
            states.setdefault(numbers[parameter], {})[key] = value
    return states


def _first_line(error: BaseException) -> str:
    """What went wrong, without the ranks' tracebacks that DCP puts before it."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
