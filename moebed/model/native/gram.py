"""The Gram matrix of a bf16 matrix in the compiled library, where the processor has AMX.

N rows, K columns.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moebed.model import native
from moebed.model.native import compiled

_MULTIPLE = 32  # of rows and columns, as in gram.cpp
_CALL = compiled.structure(
    "GramCall",
    **dict.fromkeys(("rows", "columns"), ctypes.c_int64),
    **dict.fromkeys(("values", "product", "squares", "beside"), ctypes.c_void_p),
)


def fits(matrix: Tensor) -> bool:
    """Whether the library takes a matrix (N, K): contiguous bf16 in main memory, sides multiples of 32, and AMX."""
    plain = matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and matrix.is_contiguous()
    sides = all(side % _MULTIPLE == 0 for side in matrix.shape)
    return plain and sides and native.instruction_set() == "amx" and native.load() is None


def rounded_gram(matrix: Tensor) -> tuple[Tensor, Tensor, float]:
    """W Wᵀ (N, N) of a matrix (N, K), summed in float32 and rounded to bf16, on the caller's thread.

    Returns:
        The product; its diagonal (N,) float32, not rounded; and the sum of the squares of what is beside the diagonal.
    """
    side = len(matrix)
    product, squares = matrix.new_empty(side, side), matrix.new_empty(side, dtype=torch.float32)
    beside = torch.zeros((), dtype=torch.float64)
    tensors = {"values": matrix, "product": product, "squares": squares, "beside": beside}
    numbers = {"rows": side, "columns": matrix.shape[1]}
    compiled.invoke(compiled.library("amx").moebed_gram, _CALL, numbers, tensors, backward=False)
    return product, squares, float(beside)
