"""Tokens to the ranks that own their experts, and back (expert parallelism).

T tokens of this rank, K experts per token, E experts of the layer, X ranks that share them, H hidden,
R rows that this rank's own E / X experts receive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd
from torch.distributed.tensor import DTensor

from moebed.model.experts import Experts
from moebed.model.grouped import compute_dtype, from_slots, sort_by_expert, to_slots
from moebed.model.routing import Routing


class TokenExchange:
    """Sends each assignment's row to its expert's rank by one all-to-all, and its output back by another.

    Rank r owns experts r·E/X to (r + 1)·E/X. Nothing is dropped: how many rows travel is agreed by an all-to-all of
    counts first. Backward passes travel the same ways in reverse.

    Args:
        group: The ranks that share the experts.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size = group, group.size()

    def local(self, parameter: Tensor) -> Tensor:
        """This rank's part of a parameter (E, ...) that is spread over the group: (E/X, ...).

        Its gradient is a sum over what all X ranks sent, each of which takes the mean over its own tokens, so it is
        divided by X; what holds the same experts elsewhere is averaged by FSDP2.
        """
        assert isinstance(parameter, DTensor)
        return _GradientOver.apply(parameter.to_local(), self.size)

    def of_all(self, rows: Tensor) -> Tensor:
        """Rows (E/X, ·) of this rank's experts, with those of all others in their order: (E, ·); differentiable."""
        return all_gather_tensor_autograd(rows.contiguous(), gather_dim=0, group=self.group)

    def begin(self, experts: Experts, x: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Start sending the tokens x (T, H); what it returns waits for them and gives the layer's outputs (T, H).

        Rows travel while the caller computes something else, where the backend of the group can do both.
        """
        weights = routing.topk_weight
        dispatch = sort_by_expert(routing.topk_index, weights, experts.num_experts, align=1, ragged=routing.ragged)
        counts = dispatch.offsets.diff().long()  # (E,)
        received = torch.empty_like(counts)  # from each rank in turn, for each of this rank's experts
        torch.distributed.all_to_all_single(received, counts, group=self.group)
        # The one moment at which this rank waits for its device.
        outward, inward = torch.stack([counts, received]).view(2, self.size, -1).sum(dim=2).tolist()
        sent = sum(outward)  # assignments that are none have slots after these

        def send(rows: Tensor, back: bool = False) -> Tensor:
            splits = (outward, inward) if back else (inward, outward)
            return all_to_all_single_autograd(rows.contiguous(), *splits, self.group)

        rows = send(to_slots(x.to(compute_dtype(x)), dispatch)[:sent])  # (R, H)
        weight = send(dispatch.slot_weight.unsqueeze(1)[:sent])  # (R, 1)

        def finish() -> Tensor:
            local_experts = torch.arange(experts.num_local_experts, device=x.device).repeat(self.size)
            index = local_experts.repeat_interleave(received, output_size=sum(inward))
            # Where nothing came, a row of weight 0: the experts then have a gradient here as on other ranks.
            absent = (0, 0, 0, 0 if len(index) else 1)
            blank = weight.new_empty(0)
            here = Routing(blank, blank, F.pad(index.unsqueeze(1), absent), F.pad(weight, absent))
            done = send(experts.backend(experts, F.pad(rows, absent), here)[: len(index)], back=True)
            unsent = len(dispatch.slot_token) - sent
            return from_slots(F.pad(done, (0, 0, 0, unsent)) if unsent else done, dispatch)

        return finish


class _GradientOver(torch.autograd.Function):
    """The same tensor, with a gradient divided by a number."""

    @staticmethod
    def forward(ctx, x: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.divisor, None
