"""Grouped down product on sorted rows.

R rows, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.configs import Config
from triton_kernels.grouped.parts import multiply, own_tile, store_rows
from triton_kernels.precision import constants
from triton_kernels.routing import Metadata


@triton.jit
def down_kernel(
    hidden, weight, offsets, tile_expert, tile_start, out,
    H: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (R, H) = hidden W_downᵀ."""
    tile, column_tile = own_tile(tl.cdiv(H, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    end = tl.load(offsets + expert + 1)
    rows = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a = hidden + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * F + depth[None, :]
    b = weight + expert.to(tl.int64) * (H * F) + (columns % H).to(tl.int64)[None, :] * F + depth[:, None]
    acc = multiply(a, b, BLOCK_K, F, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    store_rows(out, acc, rows, columns, end, H)


def constexprs(width: int, inter: int, config: Config) -> dict[str, Any]:
    """Compile-time arguments of a launch, without those of ``precision.constants``."""
    return {
        "H": width, "F": inter, "BLOCK_M": config.rows, "BLOCK_N": config.down.columns, "BLOCK_K": config.down.depth,
        "GROUP": config.down.group,
    }  # fmt: skip


def down(hidden: Tensor, weight: Tensor, meta: Metadata, config: Config) -> Tensor:
    """hidden (R, F) times the transpose of its expert's matrix of weight (E, H, F): (R, H), not weighted."""
    width, inter = weight.shape[1:]
    tile = config.down
    out = torch.empty(len(hidden), width, dtype=hidden.dtype, device=hidden.device)
    grid = (len(meta.tile_expert) * triton.cdiv(width, tile.columns),)
    down_kernel[grid](
        hidden, weight, meta.offsets, meta.tile_expert, meta.tile_start, out,
        **constexprs(width, inter, config), **constants(hidden.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
