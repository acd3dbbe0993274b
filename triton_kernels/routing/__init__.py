"""Routing metadata: the sorted order of the assignments and the table of tiles (see ``kernels``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triton_kernels.configs import Config
from triton_kernels.routing.kernels import count_kernel, place_kernel, scan_kernel, tiles_kernel

MAX_CHUNK = 64


class Metadata(NamedTuple):
    """The sorted order of R = T·K assignments; int32 throughout."""

    order: Tensor  # (R,) assignment t·K + k in each row
    token: Tensor  # (R,) token in each row
    slot: Tensor  # (R,) row of each assignment
    offsets: Tensor  # (E + 1,) first row of each expert; the last entry is R
    tile_expert: Tensor  # (tiles,) expert of each tile, -1 past the last one
    tile_start: Tensor  # (tiles,) first row of each tile
    tile_count: Tensor  # (1,) how many tiles there are


def num_tiles(size: int, num_experts: int, block_rows: int) -> int:
    """The most tiles of block_rows rows that size rows in num_experts segments can need."""
    return (size + min(num_experts, size) * (block_rows - 1)) // block_rows


def allocate(index: Tensor, num_experts: int, block_rows: int) -> Metadata:
    """Uninitialised metadata for index (T, K)."""
    size = index.numel()
    tiles = num_tiles(size, num_experts, block_rows)
    lengths = (size, size, size, num_experts + 1, tiles, tiles, 1)
    return Metadata(*(torch.empty(n, dtype=torch.int32, device=index.device) for n in lengths))


def block_sizes(num_experts: int, cells: int) -> tuple[int, int, int]:
    """(assignments of a block, blocks that the scan takes at once, experts rounded up to a power of two)."""
    block_e = triton.next_power_of_2(num_experts)
    block = max(16, cells // block_e)
    return block, min(MAX_CHUNK, block), block_e


def route(index: Tensor, num_experts: int, config: Config) -> Metadata:
    """Sort the assignments by expert.

    Args:
        index: (T, K) integer, contiguous, each in [0, E).
        num_experts: E.
        config: tile sizes; its ``rows`` is the height of a tile.
    """
    meta = allocate(index, num_experts, config.rows)
    size, tiles = index.numel(), len(meta.tile_expert)
    block, chunk, block_e = block_sizes(num_experts, config.routing_cells)
    num_blocks = triton.cdiv(size, block)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=index.device)
    count_kernel[(num_blocks,)](index, counts, size, E=num_experts, BLOCK=block, BLOCK_E=block_e)
    scan_kernel[(1,)](counts, meta.offsets, num_blocks, E=num_experts, CHUNK=chunk, BLOCK_E=block_e)
    place_kernel[(num_blocks,)](
        index, counts, meta.offsets, meta.order, meta.token, meta.slot, size,
        K=index.shape[1], E=num_experts, BLOCK=block, BLOCK_E=block_e,
    )  # fmt: skip
    tiles_kernel[(triton.cdiv(tiles, block),)](
        meta.offsets, meta.tile_expert, meta.tile_start, meta.tile_count, tiles,
        E=num_experts, BLOCK_M=config.rows, BLOCK=block, BLOCK_E=block_e,
    )  # fmt: skip
    return meta
