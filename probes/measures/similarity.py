"""Cosines between experts' weights, and what is said of a square similarity matrix.

E experts, E' experts and what else is compared with them, R rows and C columns of one expert's matrix.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moebed.machine.float64 import double

_SUMMED = 4096  # products in one float32 sum


def scalar_products(piece: Tensor) -> Tensor:
    """Scalar products (E', E') float64 of rows (E', n).

    Two bf16 or fp16 numbers have an exact product in float32, and sums of a few thousand of those keep five digits;
    sums of sums are in float64. float32 numbers come as float64, because PyTorch may be set to round their products.
    """
    return torch.stack([double(part @ part.T) for part in piece.split(_SUMMED, dim=1)]).sum(dim=0)


def cosines(gram: Tensor) -> np.ndarray:
    """Cosines (E', E') float32 from scalar products (E', E'). What is zero has cosine 0 with everything."""
    norm = gram.diagonal().sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    return (gram * scale * scale.unsqueeze(1)).float().cpu().numpy()


def cosine_matrix(matrices: Tensor) -> np.ndarray:
    """Cosine of flattened matrices (E, R, C), in float64: (E, E) float32. A zero matrix has cosine 0 with all."""
    flat = double(matrices.flatten(1))
    return cosines(flat @ flat.T)


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """The entries above the diagonal of a symmetric matrix (E, E): (E·(E − 1)/2,)."""
    return matrix[np.triu_indices(len(matrix), k=1)]
