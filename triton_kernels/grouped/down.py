"""Grouped down product on sorted rows.

R rows, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.configs import Config
from triton_kernels.grouped.parts import RUN_TIME, dot, launch_product, multiply, own_tile, product_sizes, store_rows
from triton_kernels.routing import Metadata


@triton.jit
def down_kernel(
    hidden, weight, offsets, tile_expert, tile_start, out,
    H: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (R, H) = hidden W_downᵀ."""
    NUM_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile, column_tile = own_tile(tl.program_id(0), tl.num_programs(0) // NUM_N, NUM_N, GROUP)
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


@triton.jit(do_not_specialize=RUN_TIME)
def down_persistent_kernel(
    hidden, weight, offsets, tile_expert, tile_start, tile_count, out, num_rows, E,
    H: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same with both sides through tensor descriptors.

    A block of rows may reach into the next expert, and a block of columns into the next matrix: what they bring is
    multiplied, and not stored. Past the end of the tensors and of F, descriptors bring zeros.
    """
    NUM_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    num_m = tl.load(tile_count)
    a = tl.make_tensor_descriptor(hidden, [num_rows, F], [F, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(weight, [E * H, F], [F, 1], [BLOCK_N, BLOCK_K])
    for program in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLAT):
        tile, column_tile = own_tile(program, num_m, NUM_N, GROUP)
        expert = tl.load(tile_expert + tile)
        start = tl.load(tile_start + tile)
        end = tl.load(offsets + expert + 1)
        first = column_tile * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, F, BLOCK_K):
            acc = dot(a.load([start, k]), b.load([expert * H + first, k]).T, acc, PRECISION, UPCAST)
        store_rows(out, acc, start + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N), end, H)


def constexprs(width: int, inter: int, config: Config) -> dict[str, Any]:
    """Compile-time arguments of a launch, without those of ``precision.constants``."""
    return product_sizes(width, inter, config.rows, config.down)


def down(hidden: Tensor, weight: Tensor, meta: Metadata, config: Config) -> Tensor:
    """hidden (R, F) times the transpose of its expert's matrix of weight (E, H, F): (R, H), not weighted."""
    sizes = constexprs(weight.shape[1], weight.shape[2], config)
    return launch_product(down_kernel, down_persistent_kernel, hidden, weight, meta, config.down, sizes)
