"""Assignment over candidates in the compiled library, and the scan of all similarities that finds these.

N rows and columns, C candidates, as flat indices of (N, N).
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from moebed.model import native
from moebed.model.native import compiled

_SEEN = 64  # as in assignment.cpp
_ASSIGN = compiled.structure(
    "AssignCall",
    **dict.fromkeys(("size", "count", "allowed"), ctypes.c_int64),
    **dict.fromkeys(("similarity", "edges", "price", "profit", "permutation", "left"), ctypes.c_void_p),
)
_REACH = compiled.structure(
    "ReachCall",
    **dict.fromkeys(("size", "capacity", "rank", "every"), ctypes.c_int64),
    **dict.fromkeys(("similarity", "price", "least", "found", "count"), ctypes.c_void_p),
)


def fits(similarity: Tensor) -> bool:
    """Whether the library takes similarities: contiguous float32 in main memory."""
    plain = similarity.dtype == torch.float32 and similarity.device.type == "cpu" and similarity.is_contiguous()
    return plain and native.load() is None


def improve(
    similarity: Tensor, edges: np.ndarray, price: np.ndarray, profit: np.ndarray, permutation: np.ndarray, allowed: int
) -> int:
    """Find the best permutation among candidates, on the caller's thread; the last three arrays are written in place.

    Args:
        similarity: (N, N), which ``fits``.
        edges: (C,) int64, the candidates in order.
        price: (N,) float64, any prices of the columns to begin with; then those that prove the optimum.
        profit: (N,) float64, of rows that come with a column their similarity to it less its price.
        permutation: (N,) int64, each row's column from an earlier call at these prices, or -1.
        allowed: Rows that may go without a column.

    Returns:
        How many rows have no column, since others have those of their candidates; -1 where more than are allowed.
    """
    name = native.instruction_set()
    assert name is not None
    left = torch.zeros((), dtype=torch.int64)
    arrays = {"edges": edges, "price": price, "profit": profit, "permutation": permutation}
    tensors = {"similarity": similarity, "left": left} | {key: torch.from_numpy(a) for key, a in arrays.items()}
    numbers = {"size": len(similarity), "count": len(edges), "allowed": allowed}
    compiled.invoke(compiled.library(name).moebed_assign, _ASSIGN, numbers, tensors, backward=False)
    return int(left)


def reached(
    similarity: Tensor, price: Tensor, least: Tensor | None, capacity: int, rank: int = 0, every: int = 1
) -> np.ndarray | None:
    """Flat indices, in order, of entries that, less the price of their column, reach the least of their row.

    Args:
        similarity: (N, N), which ``fits``.
        price: (N,) float32.
        least: (N,) float32; without it, the ``rank``-th largest among one column in ``every``.
        capacity: The most that are wanted.
        rank: See ``least``.
        every: See ``least``.

    Returns:
        (C,) int64; None where they are more.
    """
    name = native.instruction_set()
    assert name is not None
    count, found = torch.zeros((), dtype=torch.int64), torch.empty(capacity + _SEEN, dtype=torch.int64)
    tensors = {"similarity": similarity, "price": price, "least": price if least is None else least}
    tensors |= {"found": found, "count": count}
    numbers = {"size": len(similarity), "capacity": capacity, "rank": rank if least is None else 0, "every": every}
    compiled.invoke(compiled.library(name).moebed_reach, _REACH, numbers, tensors, backward=False)
    return found[: int(count)].numpy() if int(count) <= capacity else None
