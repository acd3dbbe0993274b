"""The expert MLP as two custom ops, one forward and one backward, known to ``torch.compile`` and to autograd.

T tokens, K experts per token, R = T·K rows, E experts, H hidden, F expert intermediate, G = 2F.

Saved for backward: the inputs, the pre-activations (R, G) and the metadata. Nothing else of size R survives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.combine import combine, weight_grad
from triton_kernels.configs import Config, choose
from triton_kernels.grouped.down import down as down_product
from triton_kernels.grouped.grad_hidden import grad_hidden
from triton_kernels.grouped.grad_rows import grad_rows
from triton_kernels.grouped.grad_weight import grad_down, grad_up
from triton_kernels.grouped.up import up as up_product
from triton_kernels.mlp.checks import ALIGNMENT, capability_of, check_index
from triton_kernels.precision import interpreted
from triton_kernels.routing import Metadata, allocate, route


def config_for(x: Tensor) -> Config:
    """The tile sizes of a launch on x."""
    capability = capability_of(x.device) if x.device.type == "cuda" else None
    return choose(capability, x.element_size(), interpreted())


def _ready(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous from a 16-byte boundary, else a copy that is."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % (2 * ALIGNMENT) == 0 else tensor.clone()


@torch.library.custom_op("triton_kernels::expert_mlp", mutates_args=())
def forward_op(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, activation: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward for index (T, K) int32 and weight (T, K) float32.

    Returns:
        out (T, H), pre (R, G) or (0, G) without save, and the tensors of the metadata.
    """
    x, gate_up, down, index, weight = (_ready(t) for t in (x, gate_up, down, index, weight))
    check_index(index, len(gate_up))
    config = config_for(x)
    meta = route(index, len(gate_up), config)
    hidden, pre = up_product(x, gate_up, meta, activation, save, config)
    out = combine(down_product(hidden, down, meta, config), meta.slot, weight, index.shape[1], config)
    return out, pre, *meta


@forward_op.register_fake
def _(x, gate_up, down, index, weight, activation, save):
    rows = index.numel() if save else 0
    return x.new_empty(x.shape), x.new_empty(rows, gate_up.shape[1]), *allocate(index, len(gate_up), config_for(x).rows)


@torch.library.custom_op("triton_kernels::expert_mlp_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    pre: Tensor,
    meta: list[Tensor],
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and weight; one that needs does not ask for has no elements."""
    sorted_order, top_k = Metadata(*meta), weight.shape[1]
    grad, x, gate_up, down, weight = (_ready(t) for t in (grad, x, gate_up, down, weight))
    config = config_for(x)
    none = x.new_empty(0)
    grad_pre, weighted, partial = grad_hidden(grad, down, pre, weight, sorted_order, activation, config)
    d_weight = weight_grad(partial, sorted_order.slot).view(weight.shape) if needs[3] else weight.new_empty(0)
    d_down = grad_down(grad, weighted, sorted_order, config) if needs[2] else none
    del weighted, partial
    d_gate_up = grad_up(grad_pre, x, sorted_order, config) if needs[1] else none.clone()
    d_x = none.clone()
    if needs[0]:
        d_x = combine(grad_rows(grad_pre, gate_up, sorted_order, config), sorted_order.slot, None, top_k, config)
    return d_x, d_gate_up, d_down, d_weight


@backward_op.register_fake
def _(grad, x, gate_up, down, weight, pre, meta, activation, needs):
    return tuple(
        t.new_empty(t.shape if need else (0,)) for t, need in zip((x, gate_up, down, weight), needs, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    x, gate_up, down, _, weight, activation, _ = inputs
    ctx.save_for_backward(x, gate_up, down, weight, *output[1:])
    ctx.activation = activation
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    nothing = (None,) * 7
    if grad is None:
        return nothing
    x, gate_up, down, weight, pre, *meta = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1], wanted[2], wanted[4]]
    grads = backward_op(grad, x, gate_up, down, weight, pre, meta, ctx.activation, needs)
    d_x, d_gate_up, d_down, d_weight = (g if need else None for g, need in zip(grads, needs, strict=True))
    return d_x, d_gate_up, d_down, None, d_weight, None, None


forward_op.register_autograd(_backward, setup_context=_save)
