"""What the grouped products share: which tile a program owns, the main loop, and how plain ones are launched.

BM × BN is the output tile of a program, BK the depth of a step. A row tile never crosses an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from triton_kernels.configs import Tile, cdiv
from triton_kernels.launching import launch, launch_persistent
from triton_kernels.precision import constants
from triton_kernels.routing import Metadata

RUN_TIME = ["E", "num_rows"]  # values that make no compilation of their own when they are 1 or a multiple of 16


@triton.jit
def own_tile(program, num_m, NUM_N: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program among num_m × NUM_N: GROUP row tiles share their columns' weights in L2."""
    first = program // (GROUP * NUM_N) * GROUP
    height = tl.minimum(num_m - first, GROUP)
    inner = program % (GROUP * NUM_N)
    return first + inner % height, inner // height


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in float32. UPCAST is for the interpreter, which multiplies bfloat16 as if it were an integer."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def multiply(
    a, b, step_b,
    DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ over DEPTH of a (BM, BK) @ b (BK, BN), pointers that move by BK and by step_b: (BM, BN) float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    REST: tl.constexpr = DEPTH % BLOCK_K
    for _ in range(0, DEPTH - REST, BLOCK_K):
        acc = dot(tl.load(a), tl.load(b), acc, PRECISION, UPCAST)
        a += BLOCK_K
        b += step_b
    if REST > 0:
        # After the loop, which then needs no mask. Both sides have one: what lies past the end may be NaN, and
        # 0 · NaN is NaN.
        inside = tl.arange(0, BLOCK_K) < REST
        a_tile = tl.load(a, mask=inside[None, :], other=0.0)
        b_tile = tl.load(b, mask=inside[:, None], other=0.0)
        acc = dot(a_tile, b_tile, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def load_left(a, k, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers a (BM, BK) at depth k, masked only where no whole number of steps makes DEPTH.

    Beside a descriptor, which brings zeros past the end, the mask stays in the loop: a product after it would belong
    to the outer loop of a persistent kernel, and spoil both.
    """
    if DEPTH % BLOCK_K == 0:
        return tl.load(a)
    else:
        return tl.load(a, mask=(tl.arange(0, BLOCK_K) < DEPTH - k)[None, :], other=0.0)


@triton.jit
def halves(values, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns of values (BM, BN)."""
    return tl.split(tl.permute(tl.reshape(values, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def store_rows(
    target, values, rows, columns, end,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Write values (BM, BN) to target (R, WIDTH), rows before end and columns before WIDTH alone."""
    mask = (rows < end)[:, None] & (columns < WIDTH)[None, :]
    place = target + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(place, values.to(target.dtype.element_ty), mask=mask)


def product_sizes(width: int, inter: int, rows: int, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of a plain grouped product, without those of ``precision.constants``."""
    sizes = {"BLOCK_M": rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "GROUP": tile.group}
    return {"H": width, "F": inter, **sizes, **if_persistent(tile, FLAT=tile.flat)}


def if_persistent(tile: Tile, **sizes: Any) -> dict[str, Any]:
    """Compile-time arguments that the persistent kernel of an op has alone."""
    return sizes if tile.persistent else {}


def launch_product(
    kernel: Any, persistent_kernel: Any, left: torch.Tensor, weight: torch.Tensor, meta: Metadata, tile: Tile,
    sizes: Mapping[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Launch a plain grouped product: each sorted row of left (R, ...) times its expert's part of weight: (R, H)."""
    width = sizes["H"]
    out = torch.empty(left.shape[0], width, dtype=left.dtype, device=left.device)
    tiles = meta.tile_expert.shape[0] * cdiv(width, tile.columns)
    table = (meta.offsets, meta.tile_expert, meta.tile_start)
    options = {**sizes, **constants(left.dtype), "num_warps": tile.warps, "num_stages": tile.stages}
    if tile.persistent:
        sizes_now = (left.shape[0], weight.shape[0])
        launch_persistent(
            persistent_kernel, left.device, tiles, left, weight, *table, meta.tile_count, out, *sizes_now, **options
        )
    else:
        launch(kernel, (tiles,), left, weight, *table, out, **options)
    return out
