"""Cosines between experts' weights, and what is said of a square similarity matrix.

E experts, R rows and C columns of one expert's matrix.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 23


def cosine_matrix(matrices: Tensor, extra: Tensor | None = None) -> np.ndarray:
    """Cosine of flattened matrices, accumulated in float64 a band of rows at a time.

    float64 because PyTorch may be set to multiply float32 in TF32, and because a plain float32 sum over millions of
    products loses the small similarities. A zero matrix has cosine 0 with everything.

    Args:
        matrices: (E, R, C).
        extra: (R, C), one more matrix to compare, as the last row and column.

    Returns:
        (E, E) or (E + 1, E + 1) float32.
    """
    count, rows, columns = matrices.shape
    total = count + (extra is not None)
    gram = torch.zeros(total, total, dtype=torch.float64, device=matrices.device)
    band = max(1, _CHUNK_ELEMENTS // (total * columns))
    for start in range(0, rows, band):
        block = matrices[:, start : start + band].flatten(1)
        if extra is not None:
            block = torch.cat([block, extra[start : start + band].flatten().unsqueeze(0)])
        block = block.double()
        gram += block @ block.T
    norm = gram.diagonal().sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    return (gram * scale * scale.unsqueeze(1)).float().cpu().numpy()  # (E, E)


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """The entries above the diagonal of a symmetric matrix (E, E): (E·(E − 1)/2,)."""
    return matrix[np.triu_indices(len(matrix), k=1)]
