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


def expert_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_index: Tensor, topk_weight: Tensor, activation: str
) -> Tensor:
    """Shapes as :func:`triton_kernels.expert_mlp`; any floating dtype, any H and F, differentiable by autograd."""
    total = torch.promote_types(x.dtype, topk_weight.dtype)
    out = torch.zeros(x.shape, dtype=total, device=x.device)
    for expert in range(len(gate_up)):
        token, choice = torch.where(topk_index == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        rows = F.linear(ACTIVATIONS[activation](gate) * up, down[expert])
        out = out.index_add(0, token, rows.to(total) * topk_weight[token, choice, None].to(total))
    return out.to(x.dtype)
