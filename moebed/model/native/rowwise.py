"""RMS norm, rotary embedding and cross entropy in the compiled library, for eager steps on a CPU.

They take few passes over memory. No autograd here: ``moebed.model.fused`` and ``moebed.model.losses`` call these where
``fits`` says so, and PyTorch's operators elsewhere.

R rows, N columns, B sequences, S positions, A heads, D head width, V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from moebed.model import native
from moebed.model.native import compiled

_CHUNK = 64  # rows, as in rowwise.cpp
_LEAST = 1 << 16  # numbers; with fewer, calls cost more than passes over memory, and nothing is compiled for them


def fits(x: Tensor, multiple: int, *others: Tensor) -> bool:
    """Whether x, last dimension a multiple of so many, is plain, large and on a CPU, and the others float32 there."""
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in (x, *others))
    if not plain or x.numel() < _LEAST or x.shape[-1] % multiple:
        return False
    return all(tensor.dtype == torch.float32 for tensor in others) and native.load() is None


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library that takes tensors, numbers and, last, how many threads."""
    instruction_set = native.instruction_set()
    assert instruction_set is not None
    function = getattr(compiled.library(instruction_set), name)
    converted = {Tensor: lambda x: ctypes.c_void_p(x.data_ptr()), nn.Parameter: lambda x: ctypes.c_void_p(x.data_ptr())}
    others = {int: ctypes.c_int64, float: ctypes.c_double}
    function(*((converted | others)[type(each)](each) for each in arguments), ctypes.c_int64(torch.get_num_threads()))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., N) and weight (N), float32, N a multiple of 16 -> x / rms(x) · weight (..., N) and 1 / rms(x) (R,)."""
    x = x.contiguous()
    out, scale = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])
    call("moebed_rms_norm", x, weight, out, scale, len(scale), x.shape[-1], float(eps))
    return out, scale


def rms_norm_backward(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., N) and of the weight (N) from that of the output, and from scale (R,) as it was given."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    chunks = x.new_empty(-(-len(scale) // _CHUNK), x.shape[-1])
    tensors = (x, weight, scale, grad, grad_x, grad_weight, chunks)
    call("moebed_rms_norm_backward", *tensors, len(scale), x.shape[-1])
    return grad_x, grad_weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Each pair of x (B, A, S, D), float32 or bf16, turned by its angle or, sign -1, back; cos and sin (S, D) float32.

    D is a multiple of 32. The result lies in memory as (B, S, A, D).
    """
    x = x.transpose(1, 2).contiguous()
    out = torch.empty_like(x)
    sequences, length, heads, width = x.shape
    sizes = (sequences * length, length, heads, width)
    call("moebed_rotate", x, cos.contiguous(), sin.contiguous(), out, *sizes, sign, int(x.dtype == torch.bfloat16))
    return out.transpose(1, 2)


def log_sums(logits: Tensor) -> Tensor:
    """Logarithms (R,) of the sums of exp of logits (R, V), float32 or bf16; V is a multiple of 16."""
    logits = logits.contiguous()
    out = torch.empty(len(logits), dtype=torch.float32)
    call("moebed_log_sums", logits, out, *logits.shape, int(logits.dtype == torch.bfloat16))
    return out


def cross_entropy_backward(logits: Tensor, sums: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """Gradient of logits (R, V) from that of each row's cross entropy (R,); sums as log_sums gave, labels int64."""
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    tensors = (logits, sums, labels.contiguous(), grad.contiguous(), out)
    call("moebed_cross_entropy_backward", *tensors, *logits.shape, int(logits.dtype == torch.bfloat16))
    return out
