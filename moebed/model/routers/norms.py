"""What routers that go by norms share: the norms in float32, and the rows of the chosen experts.

T tokens, E experts, K experts per token, D any width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norms(values: Tensor) -> Tensor:
    """‖values‖₂ over the last dimension, float32; its gradient is 0 where the norm is."""
    return _Norms.apply(values)


class _Norms(torch.autograd.Function):
    """PyTorch's own backward makes float32 copies of the values; this one stays in their dtype, in one pass."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        found = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(values, found)
        return found

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        values, found = ctx.saved_tensors
        scale = torch.where(found > 0, grad / found, 0.0)
        return values * scale.unsqueeze(-1).to(values.dtype)


def of_chosen(values: Tensor, index: Tensor) -> Tensor:
    """Rows of values (T, E, D) that index (T, K) names: (T, K, D)."""
    # By whole rows, which is several times faster than gather, number by number.
    num_tokens, num_experts, _ = values.shape
    first = torch.arange(num_tokens, device=index.device).unsqueeze(1) * num_experts
    return values.flatten(0, 1).index_select(0, (first + index).flatten()).unflatten(0, index.shape)
