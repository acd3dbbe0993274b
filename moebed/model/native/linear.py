"""Products of rows with a matrix in float32, in the compiled library, for eager steps on a CPU.

No autograd here: ``moebed.model.fused`` calls these where ``fits`` says so, and PyTorch's operators elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebed.model import native
from moebed.model.native import rowwise

# Where it was faster than PyTorch's own products.
FASTEST = frozenset({"avx2"})
LARGEST = 2**20  # elements of a weight: it is packed anew in each call, which a few rows of a larger one do not repay


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether x (..., K) and weights (N, K) are float32 in plain memory of a CPU, large, in multiples of 16.

    Weights are no larger than LARGEST.
    """
    if x.dtype != torch.float32 or any(len(weight) % 16 for weight in weights) or not rowwise.fits(x, 16, *weights):
        return False
    if max(weight.numel() for weight in weights) > LARGEST:
        return False
    return not torch.is_autocast_enabled("cpu") and native.instruction_set() in FASTEST


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times the transpose of weight (N, K): (..., N)."""
    return _product(x, weight, len(weight), by_row=True, onto=None)


def gradient(grad: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """grad (..., N) times weight (N, K): (..., K), added to ``onto`` in place if that is given."""
    return _product(grad, weight, weight.shape[1], by_row=False, onto=onto)


def _product(x: Tensor, weight: Tensor, columns: int, by_row: bool, onto: Tensor | None) -> Tensor:
    x, depth = x.contiguous(), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], columns) if onto is None else onto
    tensors = (x, weight.contiguous(), out, x.new_empty(weight.numel()))
    sizes = (x.numel() // depth, depth, columns)
    rowwise.call("moebed_linear", *tensors, *sizes, int(by_row), int(onto is not None))
    return out
