"""Fused gate and up product: rows gathered at the load or before, activation in the epilogue.

T tokens, R = T·K rows, E experts, H hidden, F expert intermediate, G = 2F.

The columns of a tile interleave gate and up: column 2f is gate row f, column 2f + 1 is up row f. So one program owns
both halves of each activation, one accumulator holds them side by side in a thread's registers, and the saved
pre-activations are written as they lie: ``pre (R, G)`` is interleaved too, and so are all that derive from it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.activations import activate
from triton_kernels.configs import Config, cdiv
from triton_kernels.grouped.parts import (
    RUN_TIME,
    dot,
    halves,
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
def finish(
    acc, hidden, pre, rows, end, column_tile,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Write a tile of pre-activations where SAVE, and its activations."""
    # By halves: the epilogue of a whole tile, with gate and up beside it, outgrows the registers.
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    for side in tl.static_range(2):
        values = left if side == 0 else right
        first = column_tile * BLOCK_N + side * (BLOCK_N // 2)
        if SAVE:
            store_rows(pre, values, rows, first + tl.arange(0, BLOCK_N // 2), end, 2 * F)
        gate, up = tl.split(tl.reshape(values, (BLOCK_M, BLOCK_N // 4, 2)))
        half = first // 2 + tl.arange(0, BLOCK_N // 4)
        store_rows(hidden, activate(gate, ACTIVATION) * up, rows, half, end, F)


@triton.jit
def up_kernel(
    x, weight, token, offsets, tile_expert, tile_start, hidden, pre,
    H: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden (R, F) = act(x W_gateᵀ) ⊙ x W_upᵀ, and pre (R, G) where SAVE."""
    G: tl.constexpr = 2 * F
    NUM_N: tl.constexpr = (G + BLOCK_N - 1) // BLOCK_N
    tile, column_tile = own_tile(tl.program_id(0), tl.num_programs(0) // NUM_N, NUM_N, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    end = tl.load(offsets + expert + 1)
    rows = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat real ones, so that the loop needs no mask for them; the store drops them.
    tokens = tl.load(token + tl.minimum(rows, end - 1)).to(tl.int64)
    wrapped = columns % G
    matrix_row = ((wrapped % 2) * F + wrapped // 2).to(tl.int64)
    a = x + tokens[:, None] * H + depth[None, :]
    b = weight + expert.to(tl.int64) * (G * H) + matrix_row[None, :] * H + depth[:, None]
    acc = multiply(a, b, BLOCK_K, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    finish(acc, hidden, pre, rows, end, column_tile, F, BLOCK_M, BLOCK_N, ACTIVATION, SAVE)


@triton.jit(do_not_specialize=RUN_TIME)
def up_persistent_kernel(
    x, weight, token, offsets, tile_expert, tile_start, tile_count, hidden, pre, num_rows, E,
    H: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr, SORTED: tl.constexpr,
    ACTIVATION: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same with the matrices through a tensor descriptor.

    Rows are gathered through pointers, or, where SORTED, x (R, H) has them in order, for a descriptor as well.

    W (2F, H) of an expert is seen as (F, 2, H), so that a block comes interleaved.
    """
    NUM_N: tl.constexpr = (2 * F + BLOCK_N - 1) // BLOCK_N
    num_m = tl.load(tile_count)
    if SORTED:
        a = tl.make_tensor_descriptor(x, [num_rows, H], [H, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(
        weight, [E, F, 2, H], [2 * F * H, H, F * H, 1], [1, BLOCK_N // 2, 2, BLOCK_K]
    )  # fmt: skip
    for program in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLAT):
        tile, column_tile = own_tile(program, num_m, NUM_N, GROUP)
        expert = tl.load(tile_expert + tile)
        start = tl.load(tile_start + tile)
        end = tl.load(offsets + expert + 1)
        rows = start + tl.arange(0, BLOCK_M)
        if not SORTED:
            tokens = tl.load(token + tl.minimum(rows, end - 1)).to(tl.int64)
            gathered = x + tokens[:, None] * H + tl.arange(0, BLOCK_K)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            matrix = tl.reshape(b.load([expert, column_tile * (BLOCK_N // 2), 0, k]), (BLOCK_N, BLOCK_K))
            if SORTED:
                left = a.load([start, k])
            else:
                left = load_left(gathered, k, H, BLOCK_K)
                gathered += BLOCK_K
            acc = dot(left, matrix.T, acc, PRECISION, UPCAST)
        finish(acc, hidden, pre, rows, end, column_tile, F, BLOCK_M, BLOCK_N, ACTIVATION, SAVE)


def constexprs(width: int, inter: int, activation: str, save: bool, config: Config) -> dict[str, Any]:
    """Compile-time arguments of a launch, without those of ``precision.constants``."""
    sizes = product_sizes(width, inter, config.rows, config.up)
    return {**sizes, **if_persistent(config.up, SORTED=config.sorts), "ACTIVATION": activation, "SAVE": save}


def up(x: Tensor, weight: Tensor, meta: Metadata, activation: str, save: bool, config: Config) -> tuple[Tensor, Tensor]:
    """Launch the product.

    Args:
        x: (T, H) contiguous; (R, H) in the sorted order where config.sorts.
        weight: (E, G, H) contiguous, gate rows first, dtype of x.
        meta: sorted order.
        activation: silu, gelu or gelu_tanh.
        save: write the pre-activations as well.
        config: tile sizes.

    Returns:
        hidden (R, F), and pre (R, G) interleaved, or (0, G) without save.
    """
    num_experts, both, width = weight.shape
    rows, tile = meta.order.shape[0], config.up
    hidden = torch.empty(rows, both // 2, dtype=x.dtype, device=x.device)
    pre = torch.empty(rows if save else 0, both, dtype=x.dtype, device=x.device)
    tiles = meta.tile_expert.shape[0] * cdiv(both, tile.columns)
    table = (meta.token, meta.offsets, meta.tile_expert, meta.tile_start)
    options = {
        **constexprs(width, both // 2, activation, save, config), **constants(x.dtype),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tile.persistent:
        written = (hidden, pre, rows, num_experts)
        launch_persistent(
            up_persistent_kernel, x.device, tiles, x, weight, *table, meta.tile_count, *written, **options
        )
    else:
        launch(up_kernel, (tiles,), x, weight, *table, hidden, pre, **options)
    return hidden, pre
