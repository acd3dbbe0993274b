"""A bf16 matrix transposed, and vectors carried through it, in the compiled library, where the processor has AMX.

R vectors, N rows, K columns.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moebed.model.native import compiled, gram

_MOST = 16  # vectors, as in carry.cpp
_CARRY = compiled.structure(
    "CarryCall",
    **dict.fromkeys(("vectors", "rows", "columns"), ctypes.c_int64),
    **dict.fromkeys(("given", "values", "out"), ctypes.c_void_p),
)
_TRANSPOSE = compiled.structure(
    "TransposeCall",
    **dict.fromkeys(("rows", "columns"), ctypes.c_int64),
    **dict.fromkeys(("values", "out"), ctypes.c_void_p),
)


def fits(vectors: Tensor, matrix: Tensor) -> bool:
    """Whether the library takes vectors (R, N), at most 16 in float32, and a matrix (N, K) that ``gram.fits`` takes."""
    return vectors.dtype == torch.float32 and len(vectors) <= _MOST and gram.fits(matrix)


def carried(vectors: Tensor, matrix: Tensor) -> Tensor:
    """V W (R, K), float32, of vectors (R, N) and a matrix (N, K), on the caller's thread.

    A number of V lacks at most a share of 2⁻¹⁷; sums are float32.
    """
    vectors = vectors.contiguous()
    (rows, columns), out = matrix.shape, vectors.new_empty(len(vectors), matrix.shape[1])
    numbers = {"vectors": len(vectors), "rows": rows, "columns": columns}
    tensors = {"given": vectors, "values": matrix, "out": out}
    compiled.invoke(compiled.library("amx").moebed_carry, _CARRY, numbers, tensors, backward=False)
    return out


def by_rows(matrix: Tensor) -> Tensor:
    """A matrix (N, K) with contiguous rows: itself, or a copy, by the library where ``gram.fits`` its transpose."""
    if matrix.is_contiguous() or not gram.fits(matrix.T):
        return matrix.contiguous()
    rows, columns = matrix.T.shape
    out = matrix.new_empty(columns, rows)
    numbers, tensors = {"rows": rows, "columns": columns}, {"values": matrix, "out": out}
    compiled.invoke(compiled.library("amx").moebed_transpose, _TRANSPOSE, numbers, tensors, backward=False)
    return out
