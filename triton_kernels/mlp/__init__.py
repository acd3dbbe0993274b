"""The whole expert MLP: the public function, its checks, its fallback and the custom ops behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.mlp import reference
from triton_kernels.mlp.checks import check, check_index, has_autocast, why_not
from triton_kernels.mlp.fallback import SWITCH, say, switch


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    activation: str = "silu",
    ragged: bool = False,
) -> Tensor:
    """Weighted sum of the chosen experts' gated FFNs: Σ_k w_k (act(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ.

    T tokens, K experts per token, E experts, H hidden, F expert intermediate. Differentiable once in x, gate_up, down
    and topk_weight. Products accumulate in float32. Two runs on the same device agree in every bit, forward and
    backward: no sum depends on the order in which programs finish.

    Under autocast, x, gate_up and down are cast to its dtype, and the result has that dtype.

    The kernels take float32, float16 and bfloat16, H and F that are multiples of 8, T·K and E·H up to 2^31 - 2^16, and
    CUDA of compute capability 8.0 or ROCm (or TRITON_INTERPRET=1 on a CPU). A tensor that is not contiguous, or does
    not begin at a 16-byte boundary, is copied first. Everything else (float64, other sizes, T = 0 or K = 0, an older
    GPU, no Triton) goes to the plain torch reference, which says so once, is exact, and does not compile in one graph.
    So does, from its first refusal on, what the compiler or the driver refuses; EXPERT_MLP_KERNELS in the environment
    makes the reference an error (``require``), or the rule (``forbid``).

    Args:
        x: (T, H) tokens.
        gate_up: (E, 2F, H), gate rows first; dtype of x.
        down: (E, H, F); dtype of x.
        topk_index: (T, K) integers in [0, E), of any type. An expert may occur twice in a row.
        topk_weight: (T, K) floating point, used in float32 (float64 by the reference).
        activation: ``silu`` (SwiGLU), ``gelu`` (GeGLU, exact) or ``gelu_tanh``.
        ragged: an assignment of weight 0, and one of index -1, is none: nothing is computed for it, and its weight's
            gradient is 0.

    Returns:
        (T, H), of the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; E = 0; an unknown activation; an index outside [0, E)
            (on a GPU a device-side assertion, queued before the products, so that no layer waits for the answer); a
            reference that EXPERT_MLP_KERNELS=require forbids.
        LaunchError: under EXPERT_MLP_KERNELS=require, a kernel that the compiler or the driver refuses.
    """
    device = x.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    check(x, gate_up, down, topk_index, topk_weight, activation)
    reason = why_not(x, gate_up, topk_index.shape[1])
    if reason is not None:
        if switch() == "require" and topk_index.numel():
            raise ValueError(f"expert_mlp: {SWITCH}=require, but {reason}")
        if not torch.compiler.is_compiling():
            say(reason)
        check_index(reference.assigned(topk_index, topk_weight, ragged), len(gate_up), ragged)
        with torch.autocast(device, enabled=False):
            return reference.expert_mlp(x, gate_up, down, topk_index, topk_weight, activation, ragged)

    from triton_kernels.mlp.op import forward_op

    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, topk_weight))
    return forward_op(x, gate_up, down, topk_index, topk_weight.float(), activation, save, ragged)[0]
