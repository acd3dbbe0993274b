"""Gradient of the gathered rows: dX_row = d(pre) W, over gate and up together.

R rows, E experts, H hidden, F expert intermediate, G = 2F.
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
def grad_rows_kernel(
    grad_pre, weight, offsets, tile_expert, tile_start, out,
    H: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (R, H) = grad_pre (R, G) W, the rows of W interleaved as the columns of grad_pre are."""
    G: tl.constexpr = 2 * F
    NUM_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile, column_tile = own_tile(tl.program_id(0), tl.num_programs(0) // NUM_N, NUM_N, GROUP)
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


@triton.jit(do_not_specialize=RUN_TIME)
def grad_rows_persistent_kernel(
    grad_pre, weight, offsets, tile_expert, tile_start, tile_count, out, num_rows, E,
    H: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same with both sides through tensor descriptors (see ``down``).

    W (2F, H) of an expert is seen as (F, 2, H), row 2f + s of a block being gate (s = 0) or up row f.
    """
    NUM_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    num_m = tl.load(tile_count)
    a = tl.make_tensor_descriptor(grad_pre, [num_rows, 2 * F], [2 * F, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(
        weight, [E, F, 2, H], [2 * F * H, H, F * H, 1], [1, BLOCK_K // 2, 2, BLOCK_N]
    )  # fmt: skip
    for program in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLAT):
        tile, column_tile = own_tile(program, num_m, NUM_N, GROUP)
        expert = tl.load(tile_expert + tile)
        start = tl.load(tile_start + tile)
        end = tl.load(offsets + expert + 1)
        first = column_tile * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, 2 * F, BLOCK_K):
            matrix = tl.reshape(b.load([expert, k // 2, 0, first]), (BLOCK_K, BLOCK_N))
            acc = dot(a.load([start, k]), matrix, acc, PRECISION, UPCAST)
        store_rows(out, acc, start + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N), end, H)


def constexprs(width: int, inter: int, config: Config) -> dict[str, Any]:
    """Compile-time arguments of a launch, without those of ``precision.constants``."""
    return product_sizes(width, inter, config.rows, config.grad_rows)


def grad_rows(grad_pre: Tensor, weight: Tensor, meta: Metadata, config: Config) -> Tensor:
    """grad_pre (R, G) interleaved times its expert's matrix of weight (E, G, H): (R, H), to be summed by token."""
    sizes = constexprs(weight.shape[2], weight.shape[1] // 2, config)
    return launch_product(
        grad_rows_kernel, grad_rows_persistent_kernel, grad_pre, weight, meta, config.grad_rows, sizes
    )
