"""The experts backend ``native``: the whole expert MLP on a CPU, compiled on first use, forward and backward.

bf16 products with AVX512-BF16, which take float32 or bf16 weights as they are. It is an option that needs a compiler:
where there is none, or the processor cannot, ``load`` says why and the ``grouped_mm`` backend serves instead.

T tokens, E experts, K experts per token, H hidden, F expert intermediate.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MULTIPLE = 32  # of hidden size and width
_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fno-tree-slp-vectorize",
    "-fopenmp",
    "-mfma",
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")),
]


@functools.cache
def load() -> str | None:
    """Compile the extension, or take it from PyTorch's cache of extensions; None, or in a line why it cannot be had."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "this processor has no AVX512-BF16"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        return f"compiling it needs {' and '.join(missing)}"
    from torch.utils import cpp_extension

    source = Path(__file__).with_name("experts.cpp")
    try:
        cpp_extension.load(
            "moebed_native", [str(source)], extra_cflags=_FLAGS, extra_ldflags=["-fopenmp"], is_python_module=False
        )
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        return f"it did not compile: {str(error).strip().splitlines()[0]}"
    _register_shapes()
    return None


def _register_shapes() -> None:
    @torch.library.register_fake("moebed_native::expert_mlp")
    def _(x, gate_up, down, index, weight, activation):
        return x.new_empty(x.shape), x.new_empty(index.numel(), gate_up.shape[1])

    @torch.library.register_fake("moebed_native::expert_mlp_backward")
    def _(grad, x, gate_up, down, index, weight, before, activation):
        return tuple(each.new_empty(each.shape) for each in (x, gate_up, down, weight))


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down, index, weight, activation):
        out, before = torch.ops.moebed_native.expert_mlp(x, gate_up, down, index, weight, activation)
        ctx.save_for_backward(x, gate_up, down, index, weight, before)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = torch.ops.moebed_native.expert_mlp_backward(grad, *ctx.saved_tensors, ctx.activation)
        return grads[0], grads[1], grads[2], None, grads[3], None


def fits(x: Tensor, dtype: torch.dtype, gate_up: Tensor, down: Tensor) -> bool:
    """Whether these tokens (T, H) and matrices, computed in dtype, are what the extension is made for."""
    sizes = x.shape[1] % MULTIPLE == 0 and down.shape[2] % MULTIPLE == 0
    weights = gate_up.dtype == down.dtype and gate_up.dtype in (torch.bfloat16, torch.float32)
    return x.device.type == "cpu" and dtype == torch.bfloat16 and sizes and weights


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, activation: str) -> Tensor:
    """Weighted sum of the chosen experts' outputs; differentiable once, in all but index.

    Args:
        x: (T, H), bf16.
        gate_up: (E, 2F, H), gate first; bf16 or float32, and so is its gradient.
        down: (E, H, F), likewise.
        index: (T, K), experts of each token.
        weight: (T, K), float32.
        activation: silu, gelu or gelu_tanh.

    Returns:
        (T, H), bf16.
    """
    return _ExpertMLP.apply(x, gate_up, down, index, weight, activation)
