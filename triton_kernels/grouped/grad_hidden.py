"""Backward of the down product and of the activation, in one kernel.

T tokens, K experts per token, R = T·K rows, E experts, H hidden, F expert intermediate, G = 2F.

With s = dY W_down (the gradient of an unweighted activation row), h = act(gate) ⊙ up recomputed from the saved
pre-activations and w the row's weight: d(w) = Σ_f h s, d(gate) = w s up act'(gate), d(up) = w s act(gate), and
w h is what the gradient of W_down multiplies dY by. dY is gathered at the load.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.activations import activate_with_slope
from triton_kernels.configs import Config
from triton_kernels.grouped.parts import RUN_TIME, dot, halves, load_left, multiply, own_tile
from triton_kernels.launching import launch, launch_persistent
from triton_kernels.precision import constants
from triton_kernels.routing import Metadata

PARTS = 8


@triton.jit
def finish_columns(
    s, w, pre, grad_pre, weighted, lines, height, first,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of s (BM, BN), whose columns begin at first; Σ over its columns of h s: (BM,)."""
    G: tl.constexpr = 2 * F
    columns = first + tl.arange(0, BLOCK_N)
    both = 2 * first + tl.arange(0, 2 * BLOCK_N)
    inside = (lines < height)[:, None] & (both < G)[None, :]
    # 32 bits hold a place within the tile. Zeros outside make h zero there, so that the sum counts the matrix's own
    # columns alone.
    place = lines[:, None] * G + both[None, :]
    saved = tl.load(pre + place, mask=inside, other=0.0)
    gate, up = tl.split(tl.reshape(saved.to(tl.float32), (BLOCK_M, BLOCK_N, 2)))
    act, slope = activate_with_slope(gate, ACTIVATION)
    h = act * up
    s = s.to(tl.float32)
    ws = w * s
    joined = tl.reshape(tl.join(ws * up * slope, ws * act), (BLOCK_M, 2 * BLOCK_N))
    tl.store(grad_pre + place, joined.to(grad_pre.dtype.element_ty), mask=inside)
    mask = (lines < height)[:, None] & (columns < F)[None, :]
    tl.store(weighted + lines[:, None] * F + columns[None, :], (h * w).to(weighted.dtype.element_ty), mask=mask)
    # Keeps the next columns' loads from moving up among these, where their registers would add up.
    tl.debug_barrier()
    return tl.sum(h * s, 1)


@triton.jit
def finish_part(
    s, w, pre, grad_pre, weighted, lines, height, first,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """``finish_columns`` on no more than 16 columns of s at a time: (BM,) sums."""
    if BLOCK_N <= 16:
        return finish_columns(s, w, pre, grad_pre, weighted, lines, height, first, F, BLOCK_M, BLOCK_N, ACTIVATION)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(s, BLOCK_M, BLOCK_N)
        sum_left = finish_part(left, w, pre, grad_pre, weighted, lines, height, first, F, BLOCK_M, HALF, ACTIVATION)
        first += HALF
        sum_right = finish_part(right, w, pre, grad_pre, weighted, lines, height, first, F, BLOCK_M, HALF, ACTIVATION)
        return sum_left + sum_right


@triton.jit
def finish_quarters(
    s, w, pre, grad_pre, weighted, lines, height, first,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """``finish_part`` on one quarter of s after another: (BM, 2, 2) sums."""
    PART: tl.constexpr = BLOCK_N // 4
    left, right = halves(s, BLOCK_M, BLOCK_N)
    s0, s1 = halves(left, BLOCK_M, BLOCK_N // 2)
    s2, s3 = halves(right, BLOCK_M, BLOCK_N // 2)
    sum0 = finish_part(s0, w, pre, grad_pre, weighted, lines, height, first, F, BLOCK_M, PART, ACTIVATION)
    first += PART
    sum1 = finish_part(s1, w, pre, grad_pre, weighted, lines, height, first, F, BLOCK_M, PART, ACTIVATION)
    first += PART
    sum2 = finish_part(s2, w, pre, grad_pre, weighted, lines, height, first, F, BLOCK_M, PART, ACTIVATION)
    first += PART
    sum3 = finish_part(s3, w, pre, grad_pre, weighted, lines, height, first, F, BLOCK_M, PART, ACTIVATION)
    return tl.join(tl.join(sum0, sum1), tl.join(sum2, sum3))


@triton.jit
def finish(
    s, pre, topk_weight, order, grad_pre, weighted, partial, num_rows, start, end, column_tile,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Everything after the product s (BM, BN), by quarters of halves.

    The epilogue of a whole tile, with gate, up and their gradients beside s, outgrows the registers; so s is first
    rounded to the element type, as it would be if it were a tensor of its own.
    """
    lines = tl.arange(0, BLOCK_M)
    height = end - start
    w = tl.load(topk_weight + tl.load(order + start + tl.minimum(lines, height - 1)))[:, None]
    base = start.to(tl.int64)
    pre += base * (2 * F)
    grad_pre += base * (2 * F)
    weighted += base * F
    HALF: tl.constexpr = BLOCK_N // 2
    first = column_tile * BLOCK_N
    left, right = halves(s.to(weighted.dtype.element_ty), BLOCK_M, BLOCK_N)
    sums = tl.join(
        finish_quarters(left, w, pre, grad_pre, weighted, lines, height, first, F, BLOCK_M, HALF, ACTIVATION),
        finish_quarters(right, w, pre, grad_pre, weighted, lines, height, first + HALF, F, BLOCK_M, HALF, ACTIVATION),
    )
    # The eight sums are kept apart: added up here, a row's store would be 4 bytes wide.
    partial += (column_tile.to(tl.int64) * num_rows + start) * PARTS
    place = partial + lines[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    tl.store(place, tl.reshape(sums, (BLOCK_M, PARTS)), mask=(lines < height)[:, None])


@triton.jit(do_not_specialize=RUN_TIME)
def grad_hidden_kernel(
    grad, weight, pre, topk_weight, order, token, offsets, tile_expert, tile_start,
    grad_pre, weighted, partial, num_rows,
    H: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_pre (R, G) interleaved, weighted (R, F) = w h, partial (column tiles, R, 8) = Σ h s of eighths of a tile."""
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile, column_tile = own_tile(tl.program_id(0), tl.num_programs(0) // NUM_N, NUM_N, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    end = tl.load(offsets + expert + 1)
    start = tl.load(tile_start + tile)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    tokens = tl.load(token + tl.minimum(start + tl.arange(0, BLOCK_M), end - 1)).to(tl.int64)
    a = grad + tokens[:, None] * H + depth[None, :]
    b = weight + expert.to(tl.int64) * (H * F) + depth.to(tl.int64)[:, None] * F + (columns % F)[None, :]
    s = multiply(a, b, BLOCK_K * F, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    finish(
        s, pre, topk_weight, order, grad_pre, weighted, partial, num_rows, start, end, column_tile,
        F, BLOCK_M, BLOCK_N, PARTS, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def grad_hidden_persistent_kernel(
    grad, weight, pre, topk_weight, order, token, offsets, tile_expert, tile_start, tile_count,
    grad_pre, weighted, partial, num_rows, E,
    H: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same with the matrices through a tensor descriptor; rows are gathered through pointers."""
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    num_m = tl.load(tile_count)
    b = tl.make_tensor_descriptor(weight, [E, H, F], [H * F, F, 1], [1, BLOCK_K, BLOCK_N])
    # What the epilogue reads again from tile to tile would else be kept in registers over the product.
    for program in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), disable_licm=True):
        tile, column_tile = own_tile(program, num_m, NUM_N, GROUP)
        expert = tl.load(tile_expert + tile)
        end = tl.load(offsets + expert + 1)
        start = tl.load(tile_start + tile)
        tokens = tl.load(token + tl.minimum(start + tl.arange(0, BLOCK_M), end - 1)).to(tl.int64)
        a = grad + tokens[:, None] * H + tl.arange(0, BLOCK_K)[None, :]
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            matrix = tl.reshape(b.load([expert, k, column_tile * BLOCK_N]), (BLOCK_K, BLOCK_N))
            s = dot(load_left(a, k, H, BLOCK_K), matrix, s, PRECISION, UPCAST)
            a += BLOCK_K
        finish(
            s, pre, topk_weight, order, grad_pre, weighted, partial, num_rows, start, end, column_tile,
            F, BLOCK_M, BLOCK_N, PARTS, ACTIVATION,
        )  # fmt: skip


def constexprs(width: int, inter: int, activation: str, config: Config) -> dict[str, Any]:
    """Compile-time arguments of a launch, without those of ``precision.constants``."""
    tile = config.grad_hidden
    return {
        "H": width, "F": inter, "BLOCK_M": config.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
        "GROUP": tile.group, "PARTS": PARTS, "ACTIVATION": activation,
    }  # fmt: skip


def grad_hidden(
    grad: Tensor, weight: Tensor, pre: Tensor, topk_weight: Tensor, meta: Metadata, activation: str, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the product.

    Args:
        grad: (T, H) gradient of the output, contiguous.
        weight: (E, H, F), the down matrices.
        pre: (R, G) saved pre-activations, interleaved.
        topk_weight: (T, K) float32.
        meta: sorted order.
        activation: silu, gelu or gelu_tanh.
        config: tile sizes.

    Returns:
        grad_pre (R, G) interleaved, weighted activations (R, F), and the parts (column tiles, R, 8) of d(topk
        weight).
    """
    rows, (num_experts, width, inter), tile = len(pre), weight.shape, config.grad_hidden
    parts = triton.cdiv(inter, tile.columns)
    grad_pre = torch.empty_like(pre)
    weighted = torch.empty(rows, inter, dtype=pre.dtype, device=pre.device)
    partial = torch.empty(parts, rows, PARTS, dtype=torch.float32, device=pre.device)
    tiles = len(meta.tile_expert) * parts
    read = (grad, weight, pre, topk_weight, meta.order, meta.token, meta.offsets, meta.tile_expert, meta.tile_start)
    written = (grad_pre, weighted, partial, rows)
    options = {
        **constexprs(width, inter, activation, config), **constants(pre.dtype),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tile.persistent:
        kernel = grad_hidden_persistent_kernel
        launch_persistent(kernel, pre.device, tiles, *read, meta.tile_count, *written, num_experts, **options)
    else:
        launch(grad_hidden_kernel, (tiles,), *read, *written, **options)
    return grad_pre, weighted, partial
