"""All experts' matrices in one tensor, transposed, gate and up in turn: read by expert, and written.

A family names each expert's matrices by themselves, and says in which tensor they lie (``Family.stacked``).

E experts, R rows and C columns of one of their matrices, n matrices that lie in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.keys import KeyMap
from moebed.checkpoints.files import TensorEntry, UnknownEntry
from moebed.errors import UserError
from moebed.model.config import ModelConfig

_AT_A_TIME = 1 << 20  # numbers


class StackedEntry:
    """One expert's matrix (R, C), or vector (R,), in such a tensor; a few of the tensor's rows are read at a time.

    Every read goes through all that the tensor has of the expert, as rows here are columns there.

    Args:
        tensor: (E, C, n·R), or (E, n·R).
        within: What it is called.
        expert: Which one.
        place: Which one of the n.
        turns: n.
    """

    def __init__(self, tensor: TensorEntry, within: str, expert: int, place: int, turns: int) -> None:
        self._tensor, self.within, self._place, self._turns = tensor, within, place, turns
        *columns, wide = tensor.shape[1:]
        self._rows = columns[0] if columns else 1  # of the tensor, for each expert
        self._first = expert * self._rows
        self.path, self.file = tensor.path, tensor.file
        self.dtype, self.shape = tensor.dtype, (wide // turns, *columns)
        self.position = tensor.position + self._first * wide * tensor.dtype.itemsize

    def read(self, first: int, out: Tensor) -> None:
        """Fill out (rows, C) with the rows from ``first`` on, or out (1, R) with the vector."""
        of_vector = len(self.shape) == 1
        wide = self._tensor.shape[-1]
        start = self._turns * (0 if of_vector else first) + self._place
        count = out.shape[1] if of_vector else len(out)
        band = max(1, _AT_A_TIME // wide)
        buffer = torch.empty(min(band, self._rows), wide, dtype=self.dtype)
        for begin in range(0, self._rows, band):
            rows = buffer[: min(band, self._rows - begin)]
            self._tensor.read(self._first + begin, rows)
            mine = rows[:, start :: self._turns][:, :count]
            if of_vector:
                out.copy_(mine)
            else:
                out[:, begin : begin + len(rows)] = mine.t()


def unstacked(entries: Mapping[str, TensorEntry], family: Family, config: ModelConfig) -> dict[str, TensorEntry]:
    """Entries in which each expert's matrices and vectors stand under names of their own.

    Raises:
        UserError: Such a tensor is not of all experts of its layer.
    """
    found = dict(entries)
    for layer in config.moe_layers if family.stacked else ():
        experts = config.layer(layer).num_experts
        for stacked in family.stacked:
            name = stacked.name.format(i=layer)
            tensor = found.get(name)
            if tensor is None or isinstance(tensor, UnknownEntry):
                continue
            turns = len(stacked.of)
            if len(tensor.shape) not in (2, 3) or tensor.shape[0] != experts or tensor.shape[-1] % turns:
                raise UserError(
                    f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, which the config's {experts} experts"
                    f" with {turns} matrices each do not have; the file and the config do not belong together"
                )
            del found[name]
            for expert in range(experts):
                for place, one in enumerate(stacked.of):
                    found[one.format(i=layer, e=expert)] = StackedEntry(tensor, name, expert, place, turns)
    return found


class Place(NamedTuple):
    """Where one expert's matrix is written.

    Args:
        name: The tensor.
        shape: Of the tensor.
        order: Which one of those that lie in it.
        turns: How many of them are joined.
    """

    name: str
    shape: tuple[int, ...]
    order: int
    turns: int


def places(keys: KeyMap) -> dict[str, Place]:
    """By the names of experts' matrices, in which tensors of a family's they are written; of most there are none."""
    found: dict[str, Place] = {}
    shapes = {part.name: part.shape for part in keys.everything()} if keys.family.stacked else {}
    for layer in keys.config.moe_layers:
        experts = keys.config.layer(layer).num_experts
        for stacked in keys.family.stacked:
            names = [one.format(i=layer, e=expert) for expert in range(experts) for one in stacked.of]
            rows, *columns = shapes[names[0]]
            turns = len(stacked.of)
            shape = (experts, *columns, turns * rows)
            for order, name in enumerate(names):
                found[name] = Place(stacked.name.format(i=layer), shape, order, turns)
    return found


def joined(matrices: Sequence[Tensor]) -> Tensor:
    """What such a tensor has of one expert: (C, n·R) of matrices (R, C), or (n·R,) of vectors (R,)."""
    return torch.stack(list(matrices), dim=1).flatten(0, 1).t().contiguous()
