"""Sorted dispatch and the grouped matrix product that the ``grouped_mm`` experts backend is made of.

T tokens, E experts, K experts per token, R slots (rows of the sorted, padded order), H hidden.

Every expert owns one segment of consecutive slots. Segments are padded to a multiple of ``align`` rows: a slot that no
token fills repeats token 0 with weight 0, so results are exact and nothing is dropped. For bf16 products on a CPU this
keeps the number of distinct matrix shapes small, because oneDNN compiles a product anew for each row count that it has
not seen. R
depends on T, K, E alone, never on the routing, so shapes are static for ``torch.compile``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ONEDNN_ALIGN = 64


def alignment(device_type: str, itemsize: int) -> int:
    """Rows that segments are padded to a multiple of, by the bytes of an element; MKL's float32 products need none."""
    return _ONEDNN_ALIGN if device_type == "cpu" and itemsize < 4 else 1


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that products of x are computed in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Dispatch(NamedTuple):
    """Where each assignment of a token to an expert sits in the sorted order."""

    slot_token: Tensor  # (R,) token in each slot
    token_slot: Tensor  # (T, K) slot of each assignment
    slot_weight: Tensor  # (R,) weight of each slot, 0 where it is padding or left out; differentiable
    offsets: Tensor  # (E + 1,) int32, first slot of each expert; the last entry is where the last segment ends


def sort_by_expert(
    topk_index: Tensor, topk_weight: Tensor, num_experts: int, align: int, ragged: bool = False
) -> Dispatch:
    """Sort T·K assignments by expert, stably, with each expert's segment padded to a multiple of align slots.

    Where assignments of weight 0 are none (ragged), they take slots after the last segment, where nothing is computed.
    """
    num_tokens, top_k = topk_index.shape
    assignments = num_tokens * top_k
    device = topk_index.device
    num_slots = -(-(assignments + num_experts * (align - 1)) // align) * align
    if ragged:
        topk_index = torch.where(topk_weight == 0, num_experts, topk_index)
    expert_sorted, order = torch.sort(topk_index.flatten(), stable=True)  # (T·K,)
    bounds = torch.searchsorted(expert_sorted, torch.arange(num_experts + 1, device=device))  # (E + 1,)
    if align == 1:
        place = torch.arange(assignments, device=device)  # (T·K,) slot of each in the sorted order
        slot_token, offsets = order // top_k, bounds
    else:
        counts = bounds.diff()  # (E,)
        padded = (counts + (align - 1)) // align * align
        ends = padded.cumsum(0)
        shift = ends - padded - bounds[:-1]  # (E,) from position in the sorted order to slot
        if ragged:
            shift = torch.cat([shift, ends[-1:] - bounds[-1:]])
        place = torch.arange(assignments, device=device) + shift[expert_sorted]
        slot_token = torch.zeros(num_slots, dtype=order.dtype, device=device).scatter_(0, place, order // top_k)
        offsets = torch.cat([ends.new_zeros(1), ends])
    token_slot = torch.empty_like(order).scatter_(0, order, place)  # (T·K,)
    slot_weight = topk_weight.new_zeros(num_slots).scatter(0, token_slot, topk_weight.flatten())
    return Dispatch(slot_token, token_slot.view(num_tokens, top_k), slot_weight, offsets.to(torch.int32))


class _ToSlots(torch.autograd.Function):
    """x (T, H) -> (R, H); its backward is a gather too, since every assignment has one slot."""

    @staticmethod
    def forward(ctx, x: Tensor, slot_token: Tensor, token_slot: Tensor) -> Tensor:
        ctx.save_for_backward(token_slot)
        return x.index_select(0, slot_token)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (token_slot,) = ctx.saved_tensors
        return _sum_of_slots(grad, token_slot), None, None


class _FromSlots(torch.autograd.Function):
    """y (R, H) -> (T, H), the sum over each token's K slots; a padding slot's gradient meets weight 0 further back."""

    @staticmethod
    def forward(ctx, y: Tensor, slot_token: Tensor, token_slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot_token)
        return _sum_of_slots(y, token_slot)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slot_token,) = ctx.saved_tensors
        return grad.index_select(0, slot_token), None, None


def _sum_of_slots(rows: Tensor, token_slot: Tensor) -> Tensor:
    # On a CPU index_select copies whole rows; indexing goes element by element and takes 9 times as long.
    total = rows.index_select(0, token_slot[:, 0])
    for k in range(1, token_slot.shape[1]):
        more = rows.index_select(0, token_slot[:, k])
        # In place there is no second (T, H); but torch 2.11 compiles that to a result without a gradient, silently.
        total = total + more if torch.compiler.is_compiling() else total.add_(more)
    return total


def to_slots(x: Tensor, dispatch: tuple[Tensor, ...]) -> Tensor:
    """Gather tokens x (T, H) into slots (R, H) by a Dispatch, or by the first two tensors of one."""
    return _ToSlots.apply(x, dispatch[0], dispatch[1])


def from_slots(y: Tensor, dispatch: tuple[Tensor, ...]) -> Tensor:
    """Sum slots y (R, H), already weighted, into tokens (T, H)."""
    return _FromSlots.apply(y, dispatch[0], dispatch[1])


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, ragged: bool = False) -> Tensor:
    """Each segment of rows times the transpose of its expert's matrix; differentiable in x and weight.

    Args:
        x: (R, A) rows in segments.
        weight: (E, B, A), same dtype as x.
        offsets: (E + 1,) int32 bounds of the segments.
        ragged: Rows may lie after the last segment although nothing was padded.

    Returns:
        (R, B); rows after the last segment are 0, and so is their gradient.
    """
    if x.device.type == "cpu":
        return _grouped_mm_cpu(x, weight, offsets)
    width, (x, weight) = weight.shape[1], with_even_rows(x, weight, row_multiple(x.device.type, x.element_size()))
    return _grouped_mm_device(x, weight, offsets, ragged)[:, :width]


def row_multiple(device_type: str, itemsize: int) -> int:
    """Numbers that a matrix's rows must be a multiple of: PyTorch's product for GPUs wants rows of 16 bytes each."""
    return 1 if device_type == "cpu" else max(1, 16 // itemsize)


def with_even_rows(x: Tensor, weight: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Rows x (R, A) and matrices (E, B, A) with A and B made a multiple of a number by zeros, which add nothing."""
    more_a, more_b = -x.shape[1] % multiple, -weight.shape[1] % multiple
    if not (more_a or more_b):
        return x, weight
    return F.pad(x, (0, more_a)), F.pad(weight, (0, more_a, 0, more_b))


def _grouped_mm_device(x: Tensor, weight: Tensor, offsets: Tensor, ragged: bool) -> Tensor:
    if not ragged:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets[1:])
    # PyTorch leaves rows after the last segment as they were in memory, in the result and in the gradient.
    rest = (torch.arange(len(x), device=x.device) >= offsets[-1]).unsqueeze(1)
    out = F.grouped_mm(x.masked_fill(rest, 0), weight.transpose(-2, -1), offs=offsets[1:])
    return out.masked_fill(rest, 0)


@torch.library.custom_op("moebed::grouped_mm_cpu", mutates_args=())
def _grouped_mm_cpu(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            torch.mm(x[start:stop], weight[expert].t(), out=out[start:stop])
    out[bounds[-1] :].zero_()
    return out


@_grouped_mm_cpu.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("moebed::grouped_outer_cpu", mutates_args=())
def _grouped_outer_cpu(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    out = x.new_empty(len(bounds) - 1, grad.shape[1], x.shape[1])
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            torch.mm(grad[start:stop].t(), x[start:stop], out=out[expert])
        else:
            out[expert].zero_()
    return out


@_grouped_outer_cpu.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = _grouped_mm_cpu(grad, weight.transpose(-2, -1), offsets) if ctx.needs_input_grad[0] else None
    grad_weight = _grouped_outer_cpu(grad, x, offsets) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


_grouped_mm_cpu.register_autograd(_backward, setup_context=_save)
