"""The weights in memory: one matrix of a layer's experts at a time, the next ones being read meanwhile.

The walk's reads are planned as groups, each the pieces of one matrix (up, gate or down) of one layer. A group that fits
in memory is read once and held until the walk goes on to the next; what room is left is filled with the pieces that
follow. A group that does not fit is read when asked for, and the pieces asked for last are held.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.families.keys import TensorPart
from moebed.errors import ConfigError, UserError
from moebed.machine.units import human

# Of the budget: left to the probes' own work and to freed buffers that the allocator keeps.
_RESERVED_SHARE, _RESERVED_BYTES = 0.25, 512 << 20
# Of the budget: what is held and what is read ahead of need together take no more.
_AHEAD_SHARE = 0.65
# More than this ahead hides no more of the reading, and memory that is new costs time.
_AHEAD_BYTES = 1 << 30


class Piece(NamedTuple):
    """A part of a checkpoint, as the pool knows it."""

    checkpoint: Checkpoint
    part: TensorPart

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.checkpoint.num_bytes(self.part)

    @property
    def stored_bytes(self) -> int:
        """Size on disk."""
        return self.checkpoint.stored_bytes(self.part)


@dataclass
class _Held:
    group: int
    memory: Tensor  # (bytes,)
    buffer: Tensor  # (rows, columns), the same memory
    done: Future[None]
    mapped: bool  # part of a file: nothing is read, and the reader only looks whether all is finite
    checked: bool = False

    def wait(self) -> None:
        """Until the reader is through with the buffer, or will not touch it."""
        self.done.cancel() or self.done.exception()


class WeightPool:
    """Pieces of checkpoints in memory, within a budget.

    One thread asks, in the order of the plan; another reads. A tensor that was handed out is overwritten once a later
    group has been entered.

    Args:
        plan: Groups of pieces, in the order in which they will be asked for.
        budget: Bytes for all that is held, and for the work on it.
        on_read: Called with the bytes of the plan that are done with, as a group is entered: they are read before the
            work on them, from which no time left could be told.
        spoken_for: Bytes of the budget that others hold.

    Raises:
        ConfigError: Not even two pieces fit in the budget.
    """

    def __init__(
        self,
        plan: Sequence[Sequence[Piece]],
        budget: int,
        on_read: Callable[[int], None] = lambda done: None,
        spoken_for: int = 0,
    ) -> None:
        self.plan = plan
        self.limit = limit_of(budget, spoken_for)
        self._limit_ahead = min(self.limit, int((budget - spoken_for) * _AHEAD_SHARE))
        self._sizes = [sum(piece.num_bytes for piece in group) for group in plan]
        stored = [sum(piece.stored_bytes for piece in group) for group in plan]
        self._before = [0, *accumulate(stored)]  # bytes on disk of all groups before each
        self.total = self._before[-1]
        self.most = max((self._most(group) for group in range(len(plan))), default=0)  # bytes held at most
        self._on_read = on_read
        self._group = -1
        self._ahead = 0, 0  # the group, and which of its pieces, that is to be read ahead next
        self._done = 0  # bytes on disk of the groups left behind
        self._held: dict[Piece, _Held] = {}
        self._spare: list[Tensor] = []  # memory of groups left behind, to be used again
        self._reader = ThreadPoolExecutor(1, "moebed-reader")
        largest = max((piece for group in plan for piece in group), key=lambda piece: piece.num_bytes, default=None)
        if largest is not None and 2 * largest.num_bytes > self.limit:
            needed = -(-int(2 * largest.num_bytes / (1 - _RESERVED_SHARE) + spoken_for) // (1 << 20))
            raise ConfigError(
                f"memory_budget is {human(budget, 'B')}, but two of {largest.part.name} "
                f"({human(largest.num_bytes, 'B')} each) must fit beside the work on them; give at least {needed}MiB"
            )

    def _most(self, group: int) -> int:
        """Bytes that are held while a group is in use, what is read ahead included."""
        if not self.fits(group):
            return self.limit
        return max(self._size(group), min(self._limit_ahead, self._size(group) + _AHEAD_BYTES))

    def close(self) -> None:
        """Stop reading and free everything."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._held, self._spare = {}, []

    def _size(self, group: int) -> int:
        return self._sizes[group]

    def fits(self, group: int) -> bool:
        """Whether all pieces of a group can be held at a time."""
        return self._size(group) <= self.limit

    def enter(self, group: int) -> None:
        """Go on to a group of the plan; what was held of those before it gives room."""
        if group == self._group:
            return
        self._group, self._done = group, max(self._done, self._before[group])
        self._on_read(self._done)
        for piece, held in list(self._held.items()):
            if held.group < group:
                held.wait()
                del self._held[piece]
                if not held.mapped:
                    self._spare.append(held.memory)
        if not self.fits(group):
            self._spare, self._ahead = [], (0, 0)  # what is ahead gives room to it
            return
        for piece in self._in_file_order(group):
            self._start(piece, group)
        limit, (later, begun) = self._most(group), max(self._ahead, (group + 1, 0))
        while later < len(self.plan):
            for piece in self._in_file_order(later)[begun:] if self.fits(later) else ():
                if piece not in self._held and self._bytes() + piece.num_bytes > limit:
                    self._ahead = later, begun
                    return
                self._start(piece, later)
                begun += 1
            later, begun = later + 1, 0
        self._ahead = later, begun

    def _in_file_order(self, group: int) -> list[Piece]:
        return sorted(self.plan[group], key=lambda piece: piece.checkpoint.place(piece.part))

    def _bytes(self) -> int:
        return sum(held.memory.nbytes for held in self._held.values())

    def get(self, piece: Piece) -> Tensor:
        """A piece of the group entered, (rows, columns), as stored.

        Raises:
            UserError: It cannot be read, or holds NaN or Inf.
        """
        if piece not in self._held:
            while self._held and self._bytes() + piece.num_bytes > self.limit:
                oldest = next(iter(self._held))
                self._held.pop(oldest).wait()
            self._start(piece, self._group)
        held = self._held.pop(piece)
        self._held[piece] = held  # now the youngest
        if not held.checked:
            # What is mapped and not begun is looked at here, while the reader looks at what follows.
            looked_at = held.mapped and not held.done.cancel()
            if not held.done.cancelled():
                held.done.result()
            if not looked_at:
                piece.checkpoint.require_finite(piece.part, held.buffer)
            held.checked = True
        return held.buffer

    def rows(self, piece: Piece, rows: slice) -> Tensor:
        """Some rows of a piece of the group entered; of a group that does not fit, no more than those are read."""
        start, stop, _ = rows.indices(piece.part.rows)
        if piece in self._held or self.fits(self._group) or stop - start == piece.part.rows:
            return self.get(piece)[start:stop]
        part = piece.part._replace(first=piece.part.first + start, rows=stop - start)
        mapped = piece.checkpoint.cached(part)
        if mapped is None:
            found = piece.checkpoint.read(part)
        else:
            found = mapped
            piece.checkpoint.require_finite(part, found)
        return found

    def _start(self, piece: Piece, group: int) -> None:
        """Have the reader read a piece into a buffer of its own."""
        if piece in self._held:
            self._held[piece].group = max(self._held[piece].group, group)
            return
        part, size = piece.part, piece.num_bytes
        mapped = piece.checkpoint.cached(part)
        if mapped is not None:
            look = self._reader.submit(piece.checkpoint.require_finite, part, mapped)
            self._held[piece] = _Held(group, mapped.view(torch.uint8), mapped, look, mapped=True)
            return
        memory = next((spare for spare in self._spare if spare.nbytes == size), None)
        if memory is not None:
            self._spare = [spare for spare in self._spare if spare is not memory]
        else:
            # Spare memory of other sizes counts as well: let it go before more is taken.
            self._spare = [] if self._bytes() + size > self.limit // 2 else self._spare
            memory = _fresh(size)
        with torch.inference_mode(False):  # the reader writes into it, and is not in that mode
            buffer = memory.view(piece.checkpoint.dtype(part)).view(part.rows, part.columns)
        self._held[piece] = _Held(group, memory, buffer, self._reader.submit(_read, piece, buffer), mapped=False)


def limit_of(budget: int, spoken_for: int = 0) -> int:
    """Bytes that a pool holds at most, so that the probes' own work has room in the budget as well."""
    rest = budget - spoken_for
    return rest - min(int(rest * _RESERVED_SHARE), _RESERVED_BYTES)


def _fresh(size: int) -> Tensor:
    """New memory, (size,) bytes, in pages of 2 MiB where there are any: with small ones, faults outlast the reading."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8)


def _read(piece: Piece, buffer: Tensor) -> None:
    try:
        piece.checkpoint.read_into(piece.part, buffer)
    except OSError as error:
        path = piece.checkpoint.entries[piece.part.name].path
        raise UserError(f"tensor {piece.part.name} cannot be read from {path} ({error.strerror or error})") from error
