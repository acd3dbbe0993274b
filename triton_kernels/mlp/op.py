"""The expert MLP as two custom ops, one forward and one backward, known to ``torch.compile`` and to autograd.

T tokens, K experts per token, R = T·K rows, E experts, H hidden, F expert intermediate, G = 2F.

Saved for backward: the inputs, the pre-activations (R, G) and the metadata. Nothing else of size R survives.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
from torch import Tensor

from triton_kernels.combine import combine
from triton_kernels.configs import Config, choose
from triton_kernels.grouped.down import down as down_product
from triton_kernels.grouped.gather import gather
from triton_kernels.grouped.grad_activation import grad_activation
from triton_kernels.grouped.grad_hidden import grad_hidden
from triton_kernels.grouped.grad_rows import grad_rows
from triton_kernels.grouped.grad_weight import grad_down, grad_up
from triton_kernels.grouped.up import up as up_product
from triton_kernels.launching import on_device
from triton_kernels.mlp import reference
from triton_kernels.mlp.checks import ALIGNMENT, capability_of, check_index, check_inside
from triton_kernels.mlp.fallback import is_refused, with_fallback
from triton_kernels.precision import interpreted
from triton_kernels.routing import Metadata, allocate, route, views
from triton_kernels.tuned import tuned

# The interpreted kernels may be in a process beside the compiled ones, and the later of two ops of a name replaces the
# other.
NAME = "triton_kernels::expert_mlp" + "_interpreted" * interpreted()


def config_for(x: Tensor, width: int) -> Config:
    """The tile sizes of a launch on x through experts of F = width.

    Those that were measured on this kind of device, or else the shipped ones; all of a device have one BM.
    """
    capability = capability_of(x.device) if x.device.type == "cuda" else None
    config = choose(capability, x.element_size(), interpreted(), width)
    if x.device.type != "cuda":
        return config
    return tuned(config, torch.cuda.get_device_name(x.device), triton.__version__)


def _ready(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous from a 16-byte boundary, else a copy that is."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % (2 * ALIGNMENT) == 0 else tensor.clone()


def _rows(x: Tensor, meta: Metadata, config: Config) -> Tensor:
    """What products read of x (T, H): its rows in the sorted order (R, H) where the configuration asks for a copy."""
    return gather(x, meta, config) if config.sorts else x


def _key(op: str, x: Tensor, gate_up: Tensor, activation: str) -> Hashable:
    """What a refusal of a launch holds for."""
    return op, x.device, x.dtype, gate_up.shape[1:], activation


@torch.library.custom_op(NAME, mutates_args=())
def forward_op(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, activation: str, save: bool, ragged: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward for index (T, K) of any integer type and weight (T, K) float32.

    Returns:
        out (T, H), pre (R, G) or (0, G) without save, and the buffer of the metadata.
    """
    x, gate_up, down, index, weight = (_ready(t) for t in (x, gate_up, down, index, weight))
    config, experts = config_for(x, down.shape[2]), len(gate_up)
    buffer = allocate(index, experts, config.rows)

    def kernels() -> tuple[Tensor, Tensor]:
        meta = route(index, experts, config, weight if ragged else None, buffer)
        check_inside(meta.inside, index, experts, ragged)
        hidden, pre = up_product(_rows(x, meta, config), gate_up, meta, activation, save, config)
        return combine(down_product(hidden, down, meta, config), meta.slot, weight, index.shape[1], config), pre

    def plain() -> tuple[Tensor, Tensor]:
        check_index(reference.assigned(index, weight, ragged), experts, ragged)
        out = reference.expert_mlp(x, gate_up, down, index, weight, activation, ragged)
        return out, x.new_empty(index.numel() if save else 0, gate_up.shape[1])

    with on_device(x.device):
        return *with_fallback(_key("forward", x, gate_up, activation), kernels, plain), buffer


@forward_op.register_fake
def _(x, gate_up, down, index, weight, activation, save, ragged):
    rows = index.numel() if save else 0
    buffer = allocate(index, len(gate_up), config_for(x, down.shape[2]).rows)
    return x.new_empty(x.shape), x.new_empty(rows, gate_up.shape[1]), buffer


@torch.library.custom_op(f"{NAME}_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    pre: Tensor,
    buffer: Tensor,
    activation: str,
    needs: list[bool],
    ragged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and weight; one that needs does not ask for has no elements."""
    grad, x, gate_up, down, weight = (_ready(t) for t in (grad, x, gate_up, down, weight))
    config = config_for(x, down.shape[2])

    def kernels() -> tuple[Tensor, ...]:
        meta, top_k = views(buffer, index.numel(), len(gate_up), config.rows), weight.shape[1]
        d_x = d_gate_up = d_down = None
        grad_out = _rows(grad, meta, config)
        rows = grad_hidden(grad_out, down, meta, config)
        grad_pre, d_weight = grad_activation(rows, pre, weight, meta, activation, config)
        if needs[2]:
            d_down = grad_down(grad_out, rows, meta, config)
        del rows, grad_out
        if needs[1]:
            d_gate_up = grad_up(grad_pre, _rows(x, meta, config), meta, config)
        if needs[0]:
            d_x = combine(grad_rows(grad_pre, gate_up, meta, config), meta.slot, None, top_k, config)
        return _asked((d_x, d_gate_up, d_down, d_weight), needs, x)

    def plain() -> tuple[Tensor, ...]:
        return _asked(reference.gradients(grad, x, gate_up, down, index, weight, activation, ragged), needs, x)

    with on_device(x.device):
        if is_refused(_key("forward", x, gate_up, activation)):  # which left pre and the metadata unwritten
            return plain()  # type: ignore[return-value]
        return with_fallback(_key("backward", x, gate_up, activation), kernels, plain)  # type: ignore[return-value]


def _asked(grads: tuple[Tensor | None, ...], needs: list[bool], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        grad if need and grad is not None else x.new_empty(0, dtype=torch.float32 if i == 3 else x.dtype)
        for i, (grad, need) in enumerate(zip(grads, needs, strict=True))
    )


@backward_op.register_fake
def _(grad, x, gate_up, down, index, weight, pre, buffer, activation, needs, ragged):
    return tuple(
        t.new_empty(t.shape if need else (0,)) for t, need in zip((x, gate_up, down, weight), needs, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    *tensors, activation, _, ragged = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.activation, ctx.ragged = activation, ragged
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    nothing = (None,) * 8
    if grad is None:
        return nothing
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1], wanted[2], wanted[4]]
    grads = backward_op(grad, *ctx.saved_tensors, ctx.activation, needs, ctx.ragged)
    d_x, d_gate_up, d_down, d_weight = (g if need else None for g, need in zip(grads, needs, strict=True))
    return d_x, d_gate_up, d_down, None, d_weight, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)
