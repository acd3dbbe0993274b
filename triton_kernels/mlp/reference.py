"""The expert MLP in plain torch, one expert after another: the fallback, and what the kernels are held to.

T tokens, K experts per token, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# (gradient of the activation, what it was of) -> gradient of its input.
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
}


def assigned(topk_index: Tensor, topk_weight: Tensor, ragged: bool) -> Tensor:
    """The index in 64 bits, -1 where ragged leaves an assignment out."""
    index = topk_index.long()  # an int8 index cannot be compared with expert 200
    return torch.where(topk_weight == 0, -1, index) if ragged else index


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    activation: str,
    ragged: bool = False,
) -> Tensor:
    """Shapes as :func:`triton_kernels.expert_mlp`; any floating dtype, any H and F, differentiable by autograd."""
    index = assigned(topk_index, topk_weight, ragged)
    total = torch.promote_types(x.dtype, topk_weight.dtype)
    out = torch.zeros(x.shape, dtype=total, device=x.device)
    for expert in range(len(gate_up)):
        token, choice = torch.where(index == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        rows = F.linear(ACTIVATIONS[activation](gate) * up, down[expert])
        out = out.index_add(0, token, rows.to(total) * topk_weight[token, choice, None].to(total))
    return out.to(x.dtype)


def gradients(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    activation: str,
    ragged: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and topk_weight for grad (T, H), where autograd is not at hand (in a custom op)."""
    index = assigned(topk_index, topk_weight, ragged)
    total = torch.promote_types(x.dtype, topk_weight.dtype)
    d_x = torch.zeros(x.shape, dtype=total, device=x.device)
    d_gate_up, d_down, d_weight = torch.zeros_like(gate_up), torch.zeros_like(down), torch.zeros_like(topk_weight)
    for expert in range(len(gate_up)):
        token, choice = torch.where(index == expert)
        rows, d_out, weight = x[token], grad[token], topk_weight[token, choice, None].to(x.dtype)
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        act = ACTIVATIONS[activation](gate)
        d_hidden = d_out @ down[expert]
        d_weight[token, choice] = (act * up * d_hidden).sum(-1, dtype=total).to(d_weight.dtype)
        d_down[expert] = (d_out * weight).t() @ (act * up)
        d_hidden = d_hidden * weight
        d_both = torch.cat([BACKWARD[activation](d_hidden * up, gate), d_hidden * act], dim=-1)
        d_gate_up[expert] = d_both.t() @ rows
        d_x.index_add_(0, token, (d_both @ gate_up[expert]).to(total))
    return d_x.to(x.dtype), d_gate_up, d_down, d_weight
