"""Gradient of the gathered rows: dX_row = d(pre) W, over gate and up together.

R rows, E experts, H hidden, F expert intermediate, G = 2F.
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
def grad_rows_kernel(
    grad_pre, weight, offsets, tile_expert, tile_start, out,
    H: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (R, H) = grad_pre (R, G) W, the rows of W interleaved as the columns of grad_pre are."""
    G: tl.constexpr = 2 * F
    tile, column_tile = own_tile(tl.cdiv(H, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    end = tl.load(offsets + expert + 1)
    rows = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    matrix_row = ((depth % 2) * F + depth // 2).to(tl.int64)
    a = grad_pre + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * G + depth[None, :]
    b = weight + expert.to(tl.int64) * (G * H) + matrix_row[:, None] * H + (columns % H)[None, :]
    acc = multiply(a, b, (BLOCK_K // 2) * H, G, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    store_rows(out, acc, rows, columns, end, H)


def constexprs(width: int, inter: int, config: Config) -> dict[str, Any]:
    """Compile-time arguments of a launch, without those of ``precision.constants``."""
    tile = config.grad_rows
    return {
        "H": width, "F": inter, "BLOCK_M": config.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
        "GROUP": tile.group,
    }  # fmt: skip


def grad_rows(grad_pre: Tensor, weight: Tensor, meta: Metadata, config: Config) -> Tensor:
    """grad_pre (R, G) interleaved times its expert's matrix of weight (E, G, H): (R, H), to be summed by token."""
    inter, width = weight.shape[1] // 2, weight.shape[2]
    tile = config.grad_rows
    out = torch.empty(len(grad_pre), width, dtype=grad_pre.dtype, device=grad_pre.device)
    grid = (len(meta.tile_expert) * triton.cdiv(width, tile.columns),)
    grad_rows_kernel[grid](
        grad_pre, weight, meta.offsets, meta.tile_expert, meta.tile_start, out,
        **constexprs(width, inter, config), **constants(grad_pre.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
