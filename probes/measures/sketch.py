"""Hidden states in few numbers: their leading principal components, found by a subspace iteration from a fixed start.

T tokens, H hidden, R components.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from probes.measures.resampling import SEED

_MORE = 10  # directions beyond those that are asked for
_STEPS = 3


def normal(rows: int, columns: int, key: int, like: Tensor) -> Tensor:
    """Numbers (rows, columns) from N(0, 1), the same for the same key."""
    drawn = np.random.default_rng((SEED, key)).standard_normal((rows, columns), dtype=np.float32)
    return torch.from_numpy(drawn).to(like.device)


def principal_basis(x: Tensor, count: int) -> Tensor:
    """(H, R) orthonormal, about the leading principal components of x (T, H), whose mean is 0; R ≤ count, H, T."""
    count = min(count, *x.shape)
    found = normal(x.shape[1], min(count + _MORE, *x.shape), 0, x)
    for _ in range(_STEPS):
        found = torch.linalg.qr(x.T @ (x @ torch.linalg.qr(found).Q)).Q
    coordinates = x @ found
    vectors = torch.linalg.eigh((coordinates.T @ coordinates).cpu()).eigenvectors.to(x.device)
    return found @ vectors.flip(1)[:, :count]


def sketched(x: Tensor, count: int) -> np.ndarray:
    """Of hidden states x (T, H) at most so many principal coordinates (T, R), the leading first; see ``compact``."""
    x = x - x.mean(dim=0)
    return compact(x @ principal_basis(x, count))


def compact(x: Tensor) -> np.ndarray:
    """Features (T, R) over their root mean square, float16: a regression sees no scale."""
    size = x.square().mean().sqrt().clamp_min(1e-30)
    return (x / size).half().cpu().numpy()
