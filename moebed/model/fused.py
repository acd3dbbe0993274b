"""Parts of a step whose backward pass is written by hand: fewer passes over memory than autograd takes, and less kept.

``torch.compile`` fuses the plain formulas by itself and is given those. A second derivative is refused, not wrong.
On a CPU the norm and the rotation of large tensors are ``moebed.model.native.rowwise``'s, where these can be had, and
some products ``moebed.model.native.linear``'s.

B sequences, S positions, A heads, D head width, R rows, F expert intermediate, K inputs of a layer and N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebed.model.native import linear, rowwise

_ELEMENTS_IN_CACHE = 2**19
_LIMIT, _SLOPE = 7.0, 1.702  # of gpt-oss's gate and up


class Gating(NamedTuple):
    """How the two projections of a gated FFN become one: of_gate(gate) ⊙ of_up(up).

    Args:
        of_gate: The activation.
        gate_gradient: Writes, of a gradient of that and of gate, the gradient of gate into a third.
        of_up: What up goes through; nothing in most.
        up_gradient: Of a gradient of that and of up, in place, the gradient of up.
    """

    of_gate: Callable[[Tensor], Tensor]
    gate_gradient: Callable[[Tensor, Tensor, Tensor], object]
    of_up: Callable[[Tensor], Tensor] | None = None
    up_gradient: Callable[[Tensor, Tensor], object] = lambda grad, up: None

    def entered(self, up: Tensor) -> Tensor:
        """What gate's activation is multiplied with."""
        return up if self.of_up is None else self.of_up(up)

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Of gate and up (..., F): (..., F)."""
        return self.of_gate(gate) * self.entered(up)


def _silu_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)


def _gelu_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="none", grad_input=out)


def _gelu_tanh_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


def _clamped(gate: Tensor) -> Tensor:
    gate = gate.clamp(max=_LIMIT)
    return gate * torch.sigmoid(gate * _SLOPE)


def _clamped_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    held = x.clamp(max=_LIMIT)
    share = torch.sigmoid(held * _SLOPE)
    slope = share * (1 + _SLOPE * held * (1 - share))
    torch.mul(grad, slope.mul_(x <= _LIMIT), out=out)


GATINGS: dict[str, Gating] = {
    "silu": Gating(F.silu, _silu_gradient),
    "gelu": Gating(F.gelu, _gelu_gradient),
    "gelu_tanh": Gating(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_gradient),
    "clamped_swiglu": Gating(
        _clamped,
        _clamped_gradient,
        lambda up: up.clamp(-_LIMIT, _LIMIT) + 1,
        lambda grad, up: grad.mul_(up.abs() <= _LIMIT),
    ),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension; the division is in float32, the rest in x's own type."""
    if torch.compiler.is_compiling():
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)
    if x.device.type != "cpu" and x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)  # a kernel for each direction, in float32 within
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.native = x.dtype == torch.float32 and rowwise.fits(x, 16, weight)
        if ctx.native:
            out, scale = rowwise.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return out
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # one pass, where a mean of squares takes two
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        if ctx.native:
            return *rowwise.rms_norm_backward(x, weight, scale, grad), None
        unit, grad = x.float() * scale, grad.float()
        product = grad * unit
        with torch.autocast(x.device.type, enabled=False):
            mean = (product @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)  # of the gradient of unit times unit
        grad_x = (grad * weight).addcmul_(unit, mean, value=-1).mul_(scale).to(x.dtype)
        return grad_x, product.flatten(0, -2).sum(dim=0).to(weight.dtype), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x (B, A, S, D) by its angle, in x's own type; cos and sin (S, D) hold every angle twice."""
    if torch.compiler.is_compiling():
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Its backward turns the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    if x.dtype in (torch.float32, torch.bfloat16) and rowwise.fits(x, 32, cos, sin):
        return rowwise.rotate(x, cos, sin, sign)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    out = x * cos
    first, second = out.chunk(2, dim=-1)
    first.addcmul_(high, sin.chunk(2, dim=-1)[0], value=-sign)
    second.addcmul_(low, sin.chunk(2, dim=-1)[1], value=sign)
    return out


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x (..., K) times the transpose of each weight (N, K): (..., N) of each. x gets one gradient of all."""
    if torch.compiler.is_compiling() or not linear.fits(x, *weights):
        return tuple(F.linear(x, weight) for weight in weights)
    return _Linears.apply(x, *weights)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(linear.product(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            for grad, weight in zip(grads, weights, strict=True):
                grad_x = linear.gradient(grad, weight, onto=grad_x)
        rows = x.flatten(0, -2)
        pairs = zip(grads, needs, strict=True)
        return grad_x, *(grad.flatten(0, -2).t() @ rows if needed else None for grad, needed in pairs)


def gated(gate_up: Tensor, weight: Tensor, activation: str) -> Tensor:
    """act(gate) ⊙ up, each row times its weight: gate_up (R, 2F), gate first, and weight (R,) of one type -> (R, F)."""
    if torch.compiler.is_compiling():
        return GATINGS[activation](*gate_up.chunk(2, dim=-1)) * weight.unsqueeze(-1)
    return _Gated.apply(gate_up, weight, activation)


class _Gated(torch.autograd.Function):
    """Keeps its inputs; a few rows at a time, so that what lies between stays in a CPU's cache."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.gating = gating = GATINGS[activation]
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        for target, rows, row_weight in _parts(out, gate_up, weight.unsqueeze(-1)):
            gate, up = rows.chunk(2, dim=-1)
            torch.mul(gating.of_gate(gate).mul_(gating.entered(up)), row_weight, out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate_up, weight = ctx.saved_tensors
        gating: Gating = ctx.gating
        out, grad_weight = torch.empty_like(gate_up), torch.empty_like(weight)
        parts = _parts(out, grad_weight, grad, gate_up, weight.unsqueeze(-1))
        for target, target_weight, given, rows, row_weight in parts:
            gate, up = rows.chunk(2, dim=-1)
            grad_gate, grad_up = target.chunk(2, dim=-1)
            activated, entered = gating.of_gate(gate), gating.entered(up)
            scaled = given * row_weight
            torch.mul(scaled, activated, out=grad_up)
            gating.up_gradient(grad_up, up)
            torch.sum(activated.mul_(entered).mul_(given), dim=-1, out=target_weight)
            gating.gate_gradient(scaled.mul_(entered), gate, grad_gate)
        return out, grad_weight, None


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of R rows cut alike: into parts that fit a CPU's cache, or not at all on another device."""
    widest = max(tensor[:1].numel() for tensor in tensors if len(tensor)) if len(tensors[0]) else 1
    rows = max(1, _ELEMENTS_IN_CACHE // widest) if tensors[0].device.type == "cpu" else max(1, len(tensors[0]))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
