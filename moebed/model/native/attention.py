"""The attention backend ``native``: causal attention in float32 on a CPU, compiled on first use, forward and backward.

It turns queries and keys by their rotary angles on the way. It keeps its output and one number for each query and head.
In one library with the experts.

B sequences, S positions, A query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebed.machine.settled import settled
from moebed.model import native
from moebed.model.native import compiled

WIDEST = 256
# Where `auto` takes it: it was faster than scaled_dot_product_attention, forward and backward.
FASTEST = frozenset({"avx2"})

_INTEGERS = ("sequences", "length", "heads", "key_heads", "width", "threads")
_TENSORS = ("query", "key", "value", "cos", "sin", "out", "log_sums", "grad", "grad_query", "grad_key", "grad_value")
_CALL = compiled.structure(
    "AttentionCall",
    **dict.fromkeys(_INTEGERS, ctypes.c_int64),
    scale=ctypes.c_double,
    **dict.fromkeys(_TENSORS, ctypes.c_void_p),
)


@settled
def is_there() -> bool:
    """Whether it can be had; compiles it if need be."""
    return native.load() is None


@settled
def is_fastest(key_heads: int) -> bool:
    """Whether it is the fastest measured attention in float32 on this machine, and is there; compiles it if need be.

    Args:
        key_heads: key-value heads of all sequences, the tasks that threads share.
    """
    return key_heads >= torch.get_num_threads() and native.instruction_set() in FASTEST and native.load() is None


def unfit(query: Tensor, key: Tensor) -> str | None:
    """None if it is made for queries (B, A, S, D) and keys (B, G, S_total, D) that all come at once; else why not."""
    if query.device.type != "cpu":
        return f"it computes on a CPU, the queries are on {query.device.type}"
    if query.dtype != torch.float32:
        return f"it computes in float32, not in {str(query.dtype).removeprefix('torch.')}"
    if query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries are not all of {key.shape[2]} positions"
    if query.shape[3] % 16 or query.shape[3] > WIDEST:
        return f"head width {query.shape[3]} must be a multiple of 16, {WIDEST} at most"
    return None


def _run(tensors: dict[str, Tensor], scale: float, backward: bool) -> None:
    name = native.instruction_set()
    assert name is not None
    sequences, length, heads, width = tensors["query"].shape
    key_heads = tensors["key"].shape[2]
    sizes = (sequences, length, heads, key_heads, width, torch.get_num_threads())
    numbers = {**dict(zip(_INTEGERS, sizes, strict=True)), "scale": scale}
    compiled.invoke(compiled.library(name).moebed_attention, _CALL, numbers, tensors, backward)


def _inputs(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}


@torch.library.custom_op("moebed::causal_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, log_sums = _forward_shapes(query, key, value, cos, sin, scale)
    inputs = _inputs(query=query, key=key, value=value, cos=cos, sin=sin)
    _run({**inputs, "out": out, "log_sums": log_sums}, scale, backward=False)
    return out, log_sums


@_forward.register_fake
def _forward_shapes(query, key, value, cos, sin, scale):
    sequences, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(sequences, heads, length)


@torch.library.custom_op("moebed::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_shapes(grad, query, key, value, cos, sin, out, log_sums, scale)
    inputs = _inputs(query=query, key=key, value=value, cos=cos, sin=sin, out=out, log_sums=log_sums, grad=grad)
    outputs = dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))
    _run({**inputs, **outputs}, scale, backward=True)
    return grads


@_backward.register_fake
def _backward_shapes(grad, query, key, value, cos, sin, out, log_sums, scale):
    return tuple(each.new_empty(each.shape) for each in (query, key, value))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, cos, sin, scale):
        out, log_sums = torch.ops.moebed.causal_attention(query, key, value, cos, sin, scale)
        ctx.save_for_backward(query, key, value, cos, sin, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = torch.ops.moebed.causal_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
        return *grads, None, None, None


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rope: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """softmax(scale · query keyᵀ, causal) value for every head; differentiable once, in query, key and value.

    Args:
        query: (B, S, A, D), float32; D a multiple of 16.
        key: (B, S, G, D), each for A / G query heads that follow one another.
        value: (B, S, G, D).
        scale: above 0.
        rope: Cos and sin (S, D), float32, by which queries and keys are turned first, as by ``fused.rotate``.

    Returns:
        (B, S, A, D).
    """
    return _CausalAttention.apply(query, key, value, *(rope or (None, None)), scale)
