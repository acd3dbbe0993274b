"""Pieces of the rows of crowded experts, whose parts of a weight gradient are computed side by side and then added.

One program sums over all rows of an expert, so that where few tiles make a matrix, one crowded expert leaves most of a
device idle. An expert with more than S rows is cut into pieces of S; each writes its sum in float32, and the pieces
are added in their order: no atomics, the same bits each time. S is R / P, so that no loads of the experts make more
than P pieces beyond one each, and the sizes of all tensors are known without a look at the loads.

R rows, E experts. M × N is one expert's matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.configs import Config, WeightTile, cdiv
from triton_kernels.launching import launch, processors

BLOCK = 2048
SCAN = 1024


@triton.jit(do_not_specialize=["E", "num_units", "piece_rows"])
def pieces_kernel(offsets, unit_expert, unit_start, first_slot, E, num_units, piece_rows, SCAN: tl.constexpr):
    """Program e < E writes the units of expert e, one for each piece and at least one; program E writes -1 after them.

    first_slot[e] counts the pieces of the experts before e that are cut, or is -1 where e is not.
    """
    expert = tl.program_id(0)
    unit = 0
    slot = 0
    for first in range(0, expert, SCAN):
        others = first + tl.arange(0, SCAN)
        start = tl.load(offsets + others, mask=others < expert, other=0)
        end = tl.load(offsets + others + 1, mask=others < expert, other=0)
        pieces = (end - start + piece_rows - 1) // piece_rows
        unit += tl.sum(tl.where(others < expert, tl.maximum(pieces, 1), 0), 0)
        slot += tl.sum(tl.where(pieces > 1, pieces, 0), 0)
    start = tl.load(offsets + expert)
    number = expert
    last = num_units
    if expert == E:
        number = -1
    else:
        pieces = (tl.load(offsets + expert + 1) - start + piece_rows - 1) // piece_rows
        last = unit + tl.maximum(pieces, 1)
        tl.store(first_slot + expert, tl.where(pieces > 1, slot, -1))
    for first in range(unit, last, SCAN):
        units = first + tl.arange(0, SCAN)
        tl.store(unit_expert + units, tl.zeros((SCAN,), tl.int32) + number, mask=units < last)
        tl.store(unit_start + units, start + (units - unit) * piece_rows, mask=units < last)


@triton.jit(do_not_specialize=["piece_rows"])
def add_kernel(partial, offsets, first_slot, out, piece_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """out (E, SIZE) of the experts that are cut = the sum of their pieces of partial (slots, SIZE)."""
    expert = tl.program_id(0)
    slot = tl.load(first_slot + expert)
    if slot < 0:
        return
    pieces = (tl.load(offsets + expert + 1) - tl.load(offsets + expert) + piece_rows - 1) // piece_rows
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for piece in range(pieces):
        total += tl.load(partial + (slot + piece).to(tl.int64) * SIZE + i, mask=i < SIZE, other=0.0)
    tl.store(out + expert.to(tl.int64) * SIZE + i, total.to(out.dtype.element_ty), mask=i < SIZE)


class Pieces(NamedTuple):
    """How the rows are cut for one weight gradient."""

    rows: int  # S
    unit_expert: Tensor  # (E + P,) int32 expert of each unit, -1 past the last one
    unit_start: Tensor  # (E + P,) int32 its first row
    first_slot: Tensor  # (E,) int32 where the pieces of an expert begin in partial; -1 where it is not cut
    partial: Tensor  # (2P, M·N) float32


def most_pieces(rows: int, tiles: int, device: torch.device, config: Config) -> int:
    """P: how many pieces fill the device where tiles make one expert's matrix; below 2, nothing is to be cut."""
    return min(processors(device) // tiles, rows // config.split_rows)


def cut(offsets: Tensor, rows: int, size: int, tiles: int, tile: WeightTile, config: Config) -> Pieces | None:
    """Cut rows R for matrices of size M·N in tiles, or None where that serves nothing."""
    most, num_experts = most_pieces(rows, tiles, offsets.device, config), offsets.shape[0] - 1
    if most < 2:
        return None
    piece_rows = -(-rows // (most * tile.depth)) * tile.depth
    units = -(-(num_experts + most) // 4) * 4  # each tensor begins at 16 bytes
    table = offsets.new_empty(2 * units + num_experts)
    partial = torch.empty(2 * most, size, dtype=torch.float32, device=offsets.device)
    pieces = Pieces(piece_rows, table[:units], table[units : 2 * units], table[2 * units :], partial)
    launch(
        pieces_kernel, (num_experts + 1,), offsets, *pieces[1:4], num_experts, units, piece_rows, SCAN=SCAN
    )  # fmt: skip
    return pieces


def add(pieces: Pieces, offsets: Tensor, out: Tensor) -> None:
    """Write the gradients (E, M, N) of the experts that are cut to out."""
    grid = (out.shape[0], cdiv(out[0].numel(), BLOCK))
    sizes = {"SIZE": out[0].numel(), "BLOCK": BLOCK}
    launch(add_kernel, grid, pieces.partial, offsets, pieces.first_slot, out, pieces.rows, **sizes)
