"""Gradient of the unweighted activations: s = dY W_down, with dY gathered at the load, or before.

T tokens, R rows, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.configs import Config, cdiv
from triton_kernels.grouped.parts import (
    RUN_TIME,
    dot,
    if_persistent,
    load_left,
    multiply,
    own_tile,
    product_sizes,
    store_rows,
)
from triton_kernels.launching import launch, launch_persistent
from triton_kernels.precision import constants
from triton_kernels.routing import Metadata


@triton.jit
def grad_hidden_kernel(
    grad, weight, token, offsets, tile_expert, tile_start, out,
    H: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (R, F) = dY (R, H) W_down (H, F)."""
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile, column_tile = own_tile(tl.program_id(0), tl.num_programs(0) // NUM_N, NUM_N, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    end = tl.load(offsets + expert + 1)
    rows = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    tokens = tl.load(token + tl.minimum(rows, end - 1)).to(tl.int64)
    a = grad + tokens[:, None] * H + depth[None, :]
    b = weight + expert.to(tl.int64) * (H * F) + depth.to(tl.int64)[:, None] * F + (columns % F)[None, :]
    acc = multiply(a, b, BLOCK_K * F, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    store_rows(out, acc, rows, columns, end, F)


@triton.jit(do_not_specialize=RUN_TIME)
def grad_hidden_persistent_kernel(
    grad, weight, token, offsets, tile_expert, tile_start, tile_count, out, num_rows, E,
    H: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr, SORTED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same with the matrices through a tensor descriptor.

    Rows are gathered through pointers, or, where SORTED, grad (R, H) has them in order, for a descriptor as well.
    """
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    num_m = tl.load(tile_count)
    if SORTED:
        a = tl.make_tensor_descriptor(grad, [num_rows, H], [H, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(weight, [E, H, F], [H * F, F, 1], [1, BLOCK_K, BLOCK_N])
    for program in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLAT):
        tile, column_tile = own_tile(program, num_m, NUM_N, GROUP)
        expert = tl.load(tile_expert + tile)
        start = tl.load(tile_start + tile)
        end = tl.load(offsets + expert + 1)
        rows = start + tl.arange(0, BLOCK_M)
        if not SORTED:
            tokens = tl.load(token + tl.minimum(rows, end - 1)).to(tl.int64)
            gathered = grad + tokens[:, None] * H + tl.arange(0, BLOCK_K)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            matrix = tl.reshape(b.load([expert, k, column_tile * BLOCK_N]), (BLOCK_K, BLOCK_N))
            if SORTED:
                left = a.load([start, k])
            else:
                left = load_left(gathered, k, H, BLOCK_K)
                gathered += BLOCK_K
            acc = dot(left, matrix, acc, PRECISION, UPCAST)
        store_rows(out, acc, rows, column_tile * BLOCK_N + tl.arange(0, BLOCK_N), end, F)


def constexprs(width: int, inter: int, config: Config) -> dict[str, Any]:
    """Compile-time arguments of a launch, without those of ``precision.constants``."""
    tile = config.grad_hidden
    return product_sizes(width, inter, config.rows, tile) | if_persistent(tile, SORTED=config.sorts)


def grad_hidden(grad: Tensor, weight: Tensor, meta: Metadata, config: Config) -> Tensor:
    """Rows of grad, in the sorted order, times their expert's matrix of weight (E, H, F): (R, F).

    grad is (T, H), or (R, H) in that order where config.sorts.
    """
    (num_experts, width, inter), tile = weight.shape, config.grad_hidden
    out = torch.empty(meta.token.shape[0], inter, dtype=grad.dtype, device=grad.device)
    tiles = meta.tile_expert.shape[0] * cdiv(inter, tile.columns)
    read = (grad, weight, meta.token, meta.offsets, meta.tile_expert, meta.tile_start)
    options = {
        **constexprs(width, inter, config), **constants(grad.dtype), "num_warps": tile.warps, "num_stages": tile.stages
    }  # fmt: skip
    if tile.persistent:
        kernel = grad_hidden_persistent_kernel
        launch_persistent(kernel, grad.device, tiles, *read, meta.tile_count, out, out.shape[0], num_experts, **options)
    else:
        launch(grad_hidden_kernel, (tiles,), *read, out, **options)
    return out
