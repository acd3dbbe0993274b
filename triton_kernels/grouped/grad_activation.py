"""Backward of the activation on sorted rows, one pass over memory, and d(topk weight).

With s the gradient of an unweighted activation row, h = act(gate) ⊙ up recomputed from the saved pre-activations and w
the row's weight: d(w) = Σ_f h s, d(gate) = w s up act'(gate), d(up) = w s act(gate), and w h is what the gradient of
W_down multiplies dY by. As the end of the product that makes s it took longer than the product: on an H200 too little
of it was in flight beside a tile's accumulators.

T tokens, K experts per token, R = T·K rows, E experts, F expert intermediate, G = 2F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.activations import activate_with_slope
from triton_kernels.configs import Config, cdiv, power_of_two
from triton_kernels.launching import launch
from triton_kernels.routing import Metadata


@triton.jit(do_not_specialize=["E"])
def grad_activation_kernel(
    s, pre, topk_weight, order, offsets, grad_pre, grad_weight, E,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """s (R, F) becomes w h; grad_pre (R, G) interleaved; grad_weight (T·K,) by assignment.

    Rows that are no expert's are not touched.
    """
    G: tl.constexpr = 2 * F
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tl.load(offsets + E)
    assignment = tl.load(order + rows, mask=inside, other=0)
    w = tl.load(topk_weight + assignment, mask=inside, other=0.0)[:, None]
    at = rows.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, F, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        both = 2 * first + tl.arange(0, 2 * BLOCK_N)
        mask = inside[:, None] & (columns < F)[None, :]
        mask_both = inside[:, None] & (both < G)[None, :]
        ds = tl.load(s + at * F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        saved = tl.load(pre + at * G + both[None, :], mask=mask_both, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(saved, (BLOCK_M, BLOCK_N, 2)))
        act, slope = activate_with_slope(gate, ACTIVATION)
        h = act * up
        total += tl.sum(h * ds, 1)
        ws = w * ds
        joined = tl.reshape(tl.join(ws * up * slope, ws * act), (BLOCK_M, 2 * BLOCK_N))
        tl.store(grad_pre + at * G + both[None, :], joined.to(grad_pre.dtype.element_ty), mask=mask_both)
        tl.store(s + at * F + columns[None, :], (h * w).to(s.dtype.element_ty), mask=mask)
    tl.store(grad_weight + assignment, total, mask=inside)


def grad_activation(
    s: Tensor, pre: Tensor, topk_weight: Tensor, meta: Metadata, activation: str, config: Config
) -> tuple[Tensor, Tensor]:
    """Launch the pass; s is written over.

    Args:
        s: (R, F), what ``grad_hidden`` gave; w h afterwards.
        pre: (R, G) saved pre-activations, interleaved.
        topk_weight: (T, K) float32.
        meta: sorted order.
        activation: silu, gelu or gelu_tanh.
        config: tile sizes.

    Returns:
        grad_pre (R, G) interleaved, and the gradient of topk_weight (T, K), 0 of an assignment without
        a row.
    """
    grad_pre = torch.empty_like(pre)
    grad_weight = torch.zeros_like(topk_weight)
    columns = min(config.activation_columns, power_of_two(s.shape[1]))
    launch(
        grad_activation_kernel, (cdiv(s.shape[0], config.activation_rows),),
        s, pre, topk_weight, meta.order, meta.offsets, grad_pre, grad_weight, meta.offsets.shape[0] - 1,
        F=s.shape[1], BLOCK_M=config.activation_rows, BLOCK_N=columns, ACTIVATION=activation,
    )  # fmt: skip
    return grad_pre, grad_weight
