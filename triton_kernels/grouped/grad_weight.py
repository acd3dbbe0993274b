"""Gradients of the expert matrices: one program owns one tile of one expert, and sums over that expert's rows.

T tokens, R rows, E experts, H hidden, F expert intermediate, G = 2F. M × N is one expert's matrix.

d(gate_up) = d(pre)ᵀ x with x gathered at the load, d(down) = dYᵀ (w h) with dY gathered at the load; where the
configuration sorts, both were gathered before. An expert without rows never enters the loop and writes its zeros:
nothing is filled beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.configs import Config, WeightTile, cdiv
from triton_kernels.grouped.parts import dot, own_tile
from triton_kernels.grouped.pieces import add, cut
from triton_kernels.launching import launch
from triton_kernels.precision import constants
from triton_kernels.routing import Metadata


@triton.jit(do_not_specialize=["piece_rows"])
def grad_weight_kernel(
    left, right, token, offsets, out, unit_expert, unit_start, first_slot, partial, piece_rows,
    M: tl.constexpr, N: tl.constexpr, GATHER: tl.constexpr, INTERLEAVED: tl.constexpr, CUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (E, M, N) = leftᵀ right over each expert's rows.

    Of left (·, M) and right (·, N) GATHER names the one that is gathered by token, if any; what is not is sorted. Where
    INTERLEAVED, left is the gradient of gate and up, and the rows of out are put back as gate first, up after.

    Where CUT, a program has one unit (see ``pieces``) of an expert's rows, and its sum goes to partial (slots, M, N)
    where the expert has several.
    """
    NUM_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, column_tile = own_tile(tl.program_id(0), tl.num_programs(0) // NUM_N, NUM_N, GROUP)
    expert = tile // NUM_M
    m = (tile % NUM_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = -1
    if CUT:
        start = tl.load(unit_start + expert)
        expert = tl.load(unit_expert + expert)
        if expert < 0:
            return
        slot = tl.load(first_slot + expert)
        if slot >= 0:
            slot += (start - tl.load(offsets + expert)) // piece_rows
        end = tl.minimum(tl.load(offsets + expert + 1), start + piece_rows)
    else:
        start = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
    depth = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The left tile is loaded as its transpose (BM, BK): a transpose of a loaded tile would pass through registers.
    of_left, of_right = (m % M)[:, None], (n % N)[None, :]
    sorted_left, sorted_right = left + start.to(tl.int64) * M, right + start.to(tl.int64) * N
    for row in range(start, end, BLOCK_K):
        # Past the end a sorted side brings zeros; a gathered one repeats a row of this expert, as finite as its others.
        inside = depth < end - row
        if GATHER != "none":
            tokens = tl.load(token + tl.minimum(row + depth, end - 1)).to(tl.int64)
        if GATHER == "left":
            a = tl.load(left + tokens[None, :] * M + of_left)
        else:
            a = tl.load(sorted_left + (depth[None, :] * M + of_left), mask=inside[None, :], other=0.0)
            sorted_left += BLOCK_K * M
        if GATHER == "right":
            b = tl.load(right + tokens[:, None] * N + of_right)
        else:
            b = tl.load(sorted_right + (depth[:, None] * N + of_right), mask=inside[:, None], other=0.0)
            sorted_right += BLOCK_K * N
        acc = dot(a, b, acc, PRECISION, UPCAST)
    matrix_row = (m % 2) * (M // 2) + m // 2 if INTERLEAVED else m
    place = matrix_row.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if CUT:  # noqa: SIM102 (this is settled when it compiles, the next when it runs)
        if slot >= 0:
            tl.store(partial + tl.cast(slot, tl.int64) * (M * N) + place, acc, mask=mask)
            return
    tl.store(out + expert.to(tl.int64) * (M * N) + place, acc.to(out.dtype.element_ty), mask=mask)


def constexprs(
    rows: int, columns: int, is_interleaved: bool, is_cut: bool, tile: WeightTile, config: Config
) -> dict[str, Any]:  # fmt: skip
    """Compile-time arguments of a launch, without those of ``precision.constants``."""
    gather = "none" if config.sorts else "right" if is_interleaved else "left"
    return {
        "M": rows, "N": columns, "GATHER": gather, "INTERLEAVED": is_interleaved, "CUT": is_cut,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "GROUP": tile.group,
    }  # fmt: skip


def _launch(
    left: Tensor, right: Tensor, meta: Metadata, is_interleaved: bool, tile: WeightTile, config: Config
) -> Tensor:  # fmt: skip
    rows, columns, num_experts = left.shape[1], right.shape[1], meta.offsets.shape[0] - 1
    out = torch.empty(num_experts, rows, columns, dtype=left.dtype, device=left.device)
    tiles = cdiv(rows, tile.rows) * cdiv(columns, tile.columns)
    pieces = cut(meta.offsets, meta.order.shape[0], rows * columns, tiles, tile, config)
    units, table = num_experts, (meta.offsets, meta.offsets, meta.offsets, out, 0)
    if pieces is not None:
        units, table = pieces.unit_expert.shape[0], (*pieces[1:], pieces.rows)
    launch(
        grad_weight_kernel, (units * tiles,), left, right, meta.token, meta.offsets, out, *table,
        **constexprs(rows, columns, is_interleaved, pieces is not None, tile, config), **constants(left.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if pieces is not None:
        add(pieces, meta.offsets, out)
    return out


def grad_up(grad_pre: Tensor, x: Tensor, meta: Metadata, config: Config) -> Tensor:
    """d(gate_up) (E, G, H), gate rows first, of grad_pre (R, G) interleaved and x (T, H), or (R, H) if config.sorts."""
    return _launch(grad_pre, x, meta, True, config.grad_up, config)


def grad_down(grad: Tensor, weighted: Tensor, meta: Metadata, config: Config) -> Tensor:
    """d(down) (E, H, F) of the output's gradient (T, H), or (R, H) if config.sorts, and w h (R, F)."""
    return _launch(grad, weighted, meta, False, config.grad_down, config)
