"""Routing metadata: the sorted order of the assignments and the table of tiles (see ``kernels``)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_kernels.configs import Config, cdiv
from triton_kernels.launching import launch
from triton_kernels.routing.kernels import count_kernel, place_kernel, route_small_kernel, scan_kernel, tiles_kernel

ALIGNED = 32  # int32 numbers: where a tensor may begin in a buffer that it shares


class Metadata(NamedTuple):
    """The sorted order of R = T·K assignments; int32 throughout, views of one buffer.

    Where assignments are left out, rows from offsets[E] on are no one's, and what order and token hold there means
    nothing.
    """

    order: Tensor  # (R,) assignment t·K + k in each row
    token: Tensor  # (R,) token in each row
    slot: Tensor  # (R,) row of each assignment; -1 where it is left out
    offsets: Tensor  # (E + 1,) first row of each expert; the last entry is where the last one's end
    tile_expert: Tensor  # (tiles,) expert of each tile, -1 past the last one
    tile_start: Tensor  # (tiles,) first row of each tile
    tile_count: Tensor  # (1,) how many tiles there are
    inside: Tensor  # (1,) 1, or 0 where an index is outside the experts


def num_tiles(size: int, num_experts: int, block_rows: int) -> int:
    """The most tiles of block_rows rows that size rows in num_experts segments can need."""
    return (size + min(num_experts, size) * (block_rows - 1)) // block_rows


def _lengths(size: int, num_experts: int, block_rows: int) -> tuple[int, ...]:
    tiles = num_tiles(size, num_experts, block_rows)
    return size, size, size, num_experts + 1, tiles, tiles, 1, 1


def _aligned(length: int) -> int:
    return -(-length // ALIGNED) * ALIGNED


def allocate(index: Tensor, num_experts: int, block_rows: int) -> Tensor:
    """An uninitialised buffer of the metadata for index (T, K)."""
    lengths = _lengths(index.numel(), num_experts, block_rows)
    return index.new_empty(sum(map(_aligned, lengths)), dtype=torch.int32)


def views(buffer: Tensor, size: int, num_experts: int, block_rows: int) -> Metadata:
    """The metadata of size assignments that lie in buffer."""
    found, first = [], 0
    for length in _lengths(size, num_experts, block_rows):
        found.append(buffer[first : first + length])
        first += _aligned(length)
    return Metadata(*found)


def constexprs(kernel: Any, config: Config, ragged: bool = False) -> dict[str, Any]:
    """Compile-time arguments of a routing kernel: none depends on T, K or E."""
    sizes = {
        "RAGGED": ragged, "BLOCK_M": config.rows, "BLOCK": config.routing_block,
        "EXPERTS": config.routing_experts, "SCAN": config.routing_scan,
    }  # fmt: skip
    return {name: value for name, value in sizes.items() if name in kernel.arg_names}


def route(
    index: Tensor, num_experts: int, config: Config, weight: Tensor | None = None, buffer: Tensor | None = None
) -> Metadata:
    """Sort the assignments by expert.

    Args:
        index: (T, K) integers of any width, contiguous, each in [0, E).
        num_experts: E.
        config: tile sizes; its ``rows`` is the height of a tile.
        weight: (T, K) float32, contiguous, where assignments of weight 0, and those of index -1, are none (ragged).
        buffer: what ``allocate`` gave, to be written.
    """
    size, top_k, ragged = index.numel(), index.shape[1], weight is not None
    if buffer is None:
        buffer = allocate(index, num_experts, config.rows)
    meta = views(buffer, size, num_experts, config.rows)
    tiles, read = meta.tile_expert.shape[0], (index, weight if ragged else index)
    blocks, parts = cdiv(size, config.routing_block), cdiv(num_experts + 1, config.routing_experts)

    def start(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
        launch(kernel, grid, *arguments, **constexprs(kernel, config, ragged))

    if blocks * parts <= config.routing_small:
        table = (meta.tile_expert, meta.tile_start, meta.tile_count, meta.inside)
        rows = (meta.offsets, meta.order, meta.token, meta.slot)
        start(route_small_kernel, (1,), *read, *rows, *table, size, top_k, num_experts, tiles)
        return meta
    lines = _aligned((num_experts + 1) * blocks)
    counts = buffer.new_empty(lines + num_experts + 1)
    totals = counts[lines:]
    start(count_kernel, (blocks, parts), *read, counts, size, num_experts, blocks)
    start(scan_kernel, (num_experts + 1,), counts, totals, blocks)
    start(tiles_kernel, (num_experts + 1,), totals, *meta[3:], num_experts, tiles)
    start(place_kernel, (blocks, parts), *read, counts, *meta[3:4], *meta[:3], size, top_k, num_experts, blocks)
    return meta
