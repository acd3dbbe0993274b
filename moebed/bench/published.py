"""The published neuron matching of one pair of experts, to be timed in a process of its own.

Its rows allocate and free memory all the time, and how fast that is depends on what the process has allocated before.
This module imports what the procedure needs and nothing else of moebed, and holds nothing but the two experts.

N neurons of an expert, H hidden.
"""

from __future__ import annotations

import time

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SAMPLED_ROWS = 64


def published_pair(a: Tensor, b: Tensor) -> float:
    """Seconds of the published procedure for one pair (N, H): cosines a row at a time, then scipy's assignment.

    The rows are all alike, so some of them are timed and the time is scaled to all; the assignment is timed whole.
    """
    start = time.perf_counter()
    for row in a[:SAMPLED_ROWS]:
        torch.cosine_similarity(row.unsqueeze(0), b, dim=1)
    rows = (time.perf_counter() - start) * len(a) / SAMPLED_ROWS
    cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    start = time.perf_counter()
    linear_sum_assignment(cosines.numpy(), maximize=True)
    return rows + time.perf_counter() - start


def random_pair(shape: tuple[int, int]) -> float:
    """Seconds for a pair of random float32 experts."""
    torch.manual_seed(0)
    return published_pair(torch.randn(shape), torch.randn(shape))
