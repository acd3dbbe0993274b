"""Muon: the momentum of each matrix, made orthogonal, is its step; all else is AdamW's.

Experts are stacks of matrices, each of which is orthogonal by itself: of all experts as one matrix each block would be
too small by the root of their number.

M matrices of a stack, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from moebed.model.attention import Attention
from moebed.model.decoder import FeedForward
from moebed.model.experts import Experts
from moebed.model.routers import Router
from moebed.model.width import is_bias

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of K. Jordan's Newton-Schulz iteration (2024)
_STEPS = 5
_SCALE = 0.2  # root mean square of a step over the learning rate, about AdamW's (2502.16982)
_HIDDEN = (Attention, FeedForward, Experts, Router)  # whose matrices map hidden states; not embedding and head


def orthogonalised(stack: Tensor) -> Tensor:
    """Each matrix of a stack (M, R, C) with all its singular values brought near 1, by Newton-Schulz; 0 stays 0.

    In bfloat16 on a GPU, as is usual, and in the stack's own type elsewhere.
    """
    x = stack.bfloat16() if stack.is_cuda else stack
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(stack.dtype)


def muon_parameters(model: nn.Module) -> dict[int, int]:
    """What Muon trains, by id: of how many matrices under one another each parameter's is made, as gate and up are."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, _HIDDEN):
            for name, parameter in module.named_parameters():
                if parameter.ndim >= 2 and parameter.requires_grad and not is_bias(name):
                    found[id(parameter)] = 2 if name.endswith("gate_up_proj") else 1
    return found


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with ``"joined"``, which take Muon's step; both by one learning rate.

    W ← W − lr · (.2 · √max(R, C) · O + decay · W), where O is the orthogonalised momentum, or with ``nesterov`` that of
    gradient + momentum (K. Jordan 2024; scale 2502.16982; by expert as torchtitan has it). Since O has one size
    whatever the gradient's, a matrix without any gradient in a step, as of an expert without a token, is left as it is,
    its momentum too.

    Args:
        groups: Of parameters; one with ``"joined": n`` holds stacks of n matrices under one another each.
        momentum: Decay of the momentum.
        nesterov: Look ahead.
        adamw: What else AdamW is to be told.
    """

    def __init__(
        self, groups: list[dict[str, Any]], momentum: float = 0.95, nesterov: bool = True, **adamw: Any
    ) -> None:
        super().__init__(groups, **adamw)
        self.momentum, self.nesterov = momentum, nesterov

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, after the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = [(p, p.grad) for group in self.param_groups if "joined" in group for p in group["params"]]
        for group in self.param_groups:
            for parameter in group["params"] if "joined" in group else ():
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
                    parameter.grad = None  # AdamW passes over it
        super().step()
        for parameter, gradient in taken:
            parameter.grad = gradient
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros((), dtype=torch.float32)  # which AdamW looks for in every state
        state["step"] += 1
        weight, grad, momentum = map(_local, (parameter, gradient, state["momentum"]))
        moves = _moving(gradient)
        momentum.copy_(torch.where(moves, self.momentum * momentum + grad, momentum))
        ahead = gradient + self.momentum * state["momentum"] if self.nesterov else state["momentum"]
        step = _step(ahead, group["joined"]) + group["weight_decay"] * weight
        weight.copy_(torch.where(moves, weight - group["lr"] * step, weight))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_own(tensor: Tensor, placement: Placement) -> bool:
    """Whether a rank's part is of whole matrices: some of a stack's, or those that all have."""
    return placement.is_replicate() or (tensor.ndim == 3 and placement == Shard(0))


def _moving(gradient: Tensor) -> Tensor:
    """Which matrices of a stack, here, have a gradient at all, on any rank that has a part of them; broadcasts."""
    local = _local(gradient)
    found = local.reshape(len(local) if local.ndim == 3 else 1, -1).any(dim=1).float()
    if isinstance(gradient, DTensor):
        for dimension, placement in enumerate(gradient.placements):
            if not _is_own(gradient, placement):
                torch.distributed.all_reduce(found, ReduceOp.MAX, group=gradient.device_mesh.get_group(dimension))
    return found.bool().view(-1, *[1] * (local.ndim - 1))


def _step(momentum: Tensor, joined: int) -> Tensor:
    """This rank's part of .2 · √max(R, C) · O, of a momentum whose matrices are gathered where ranks share them."""
    shared = None
    if isinstance(momentum, DTensor):
        own = [one if _is_own(momentum, one) else Replicate() for one in momentum.placements]
        shared = momentum.redistribute(placements=own)
    full = momentum if shared is None else shared.to_local()
    stack = full.reshape(-1, full.shape[-2] // joined, full.shape[-1])  # (M, R, C)
    found = (_SCALE * max(stack.shape[1:]) ** 0.5 * orthogonalised(stack)).view_as(full)
    if shared is None:
        return found
    assert isinstance(momentum, DTensor)
    spread = DTensor.from_local(found, shared.device_mesh, shared.placements, run_check=False)
    return spread.redistribute(placements=momentum.placements).to_local()
