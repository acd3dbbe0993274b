"""Tensors of a GGUF file as entries of a checkpoint: some rows of a tensor, unpacked a few at a time.

N rows, D numbers of a head.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moebed.checkpoints.files import PackedEntry, RawEntry, RawFile, TensorEntry
from moebed.checkpoints.gguf.header import TensorInfo
from moebed.checkpoints.gguf.types import unpack

_AT_A_TIME = 1 << 20  # numbers; unpacking them takes some ten bytes each


class GgufEntry(PackedEntry):
    """Rows of a tensor of a GGUF file.

    Args:
        file: The file.
        info: The tensor.
        shape: What the entry is: (rows, columns), or (columns,).
        first: Row of the tensor in which the entry begins.
        head: Rows D of a head of which the file has the two halves interleaved, as llama.cpp turns pairs of neighbours
            where transformers turns the two halves: the file's row 2j + s of each head is row sD/2 + j here.
    """

    file: RawFile

    def __init__(
        self, file: RawFile, info: TensorInfo, shape: tuple[int, ...], first: int = 0, head: int | None = None
    ) -> None:
        assert info.kind.dtype is not None
        self.path, self.shape, self.dtype = info.path, shape, info.kind.dtype
        self.position = info.offset + first * info.row_bytes
        self.file, self._info, self._head = file, info, head

    def stored_bytes(self, rows: int) -> int:
        """Bytes that so many rows take in the file."""
        return rows * self._info.row_bytes

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (N, columns) with the rows from ``first`` on."""
        if self._head is None:
            self._read(first, out)
            return
        start, stop = first // self._head, -(-(first + len(out)) // self._head)  # heads that the rows belong to
        stored = torch.empty((stop - start) * self._head, out.shape[-1], dtype=out.dtype)
        self._read(start * self._head, stored)
        turned = stored.view(stop - start, self._head // 2, 2, -1).transpose(1, 2).reshape(stored.shape)
        skipped = first - start * self._head
        out.copy_(turned[skipped : skipped + len(out)])

    def _read(self, first: int, out: Tensor) -> None:
        """Rows in the order of the file."""
        size, band = self._info.row_bytes, max(1, _AT_A_TIME // out.shape[-1])
        memory = np.empty(min(band, len(out)) * size, np.uint8)
        for begin in range(0, len(out), band):
            rows = out[begin : begin + band]
            codes = memory[: len(rows) * size]
            self.file.read(self.position + (first + begin) * size, memoryview(codes.data))
            if self._info.kind.packed:
                rows.copy_(torch.from_numpy(unpack(self._info.kind, codes.reshape(len(rows), size))))
            else:
                rows.copy_(torch.from_numpy(codes).view(self.dtype).view(rows.shape))


class LatentEntry(PackedEntry):
    """Rows that make keys and values of a latent: of each of A heads n of its keys, then v of its values.

    Args:
        keys: (A, C, n), transposed: C numbers of the latent.
        values: (A, v, C).
    """

    def __init__(self, keys: TensorEntry, values: TensorEntry) -> None:
        heads, columns, width = keys.shape
        self._keys, self._values, self._width = keys, values, width
        self._head = width + values.shape[1]
        self.path, self.file, self.position = keys.path, keys.file, keys.position
        self.shape = heads * self._head, columns
        self.dtype = torch.promote_types(keys.dtype, values.dtype)

    def stored_bytes(self, rows: int) -> int:
        """Bytes that so many rows take in the file, about: the two may be packed otherwise."""
        whole = sum(_stored_bytes(one) for one in (self._keys, self._values))
        return whole * rows // self.shape[0]

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (N, C) with the rows from ``first`` on."""
        done = 0
        while done < len(out):
            head, skipped = divmod(first + done, self._head)
            of_head = self._read_head(head)[skipped : skipped + len(out) - done]
            out[done : done + len(of_head)] = of_head
            done += len(of_head)

    def _read_head(self, head: int) -> Tensor:
        """All rows of a head (n + v, C)."""
        columns, values = self.shape[1], self._values.shape[1]
        keys = torch.empty(columns, self._width, dtype=self._keys.dtype)
        self._keys.read(head * columns, keys)
        rest = torch.empty(values, columns, dtype=self._values.dtype)
        self._values.read(head * values, rest)
        return torch.cat([keys.t().to(self.dtype), rest.to(self.dtype)])


def _stored_bytes(entry: TensorEntry) -> int:
    rows = entry.shape[0] * entry.shape[1]
    if isinstance(entry, PackedEntry):
        return entry.stored_bytes(rows)
    return rows * entry.shape[2] * entry.dtype.itemsize


def entry_of(
    file: RawFile, info: TensorInfo, shape: tuple[int, ...], first: int = 0, head: int | None = None
) -> TensorEntry:
    """The entry of some rows of a tensor; arguments as for :class:`GgufEntry`."""
    assert info.kind.dtype is not None
    if info.kind.packed or head is not None:
        return GgufEntry(file, info, shape, first, head)
    return RawEntry(file, shape, info.kind.dtype, info.offset + first * info.row_bytes)
