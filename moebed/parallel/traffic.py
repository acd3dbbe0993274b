"""What expert parallelism sends: how many assignments from which rank to which, and what each costs in bytes.

T tokens, E experts, K experts per token, X ranks that share the experts, g ranks a node, H hidden, c bytes of a
product's operands. Rank r has experts r·E/X to (r + 1)·E/X, and node r // g, as in moebed.parallel.exchange.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WEIGHT_BYTES = 4  # a float32 beside each row


class AssignmentBytes(NamedTuple):
    """Bytes of one assignment in a step, by the way they take."""

    out: int  # from the token's rank to the expert's
    back: int

    @property
    def both(self) -> int:
        """There and back."""
        return self.out + self.back


def bytes_per_assignment(hidden_size: int, itemsize: int, recomputed: bool = False) -> AssignmentBytes:
    """Forward, a row of c·H bytes and its weight go out and c·H come back; their gradients take the same ways in
    reverse. Recomputation repeats the forward pass: 2·(2·c·H + 4) in all, or 3/2 of it.

    Counts of E int64 a pass are left out, and so is that a router without gradient has no gradient of weights to send.
    """
    row, passes = itemsize * hidden_size, 2 if recomputed else 1
    return AssignmentBytes(passes * (row + WEIGHT_BYTES) + row, passes * row + row + WEIGHT_BYTES)


def between_ranks(index: np.ndarray, rank: np.ndarray, num_experts: int, ranks: int) -> np.ndarray:
    """Assignments (X, X) from the rank of a token to that of its expert, int64.

    Args:
        index: (T, K) experts, below 0 for none.
        rank: (T,) where each token is.
        num_experts: E, a multiple of X.
        ranks: X.
    """
    cell = rank[:, None] * ranks + index // (num_experts // ranks)
    return np.bincount(cell[index >= 0], minlength=ranks * ranks).reshape(ranks, ranks)


def of_distance(ranks: int, ranks_per_node: int) -> np.ndarray:
    """How far two ranks are apart, (X, X): 0 the same rank, 1 the same node, 2 another node."""
    rank = np.arange(ranks)
    node = rank // ranks_per_node
    return (rank[:, None] != rank).astype(np.int64) + (node[:, None] != node)


def link_bytes(assignments: np.ndarray, each: AssignmentBytes) -> np.ndarray:
    """Bytes (X, X) that one rank sends to another in a step, from assignments (X, X); on the diagonal, to itself."""
    return assignments * each.out + assignments.T * each.back


def slowest_link(sent: np.ndarray, distance: np.ndarray, bandwidth_node: float, bandwidth_across: float) -> float:
    """Seconds of the link that takes longest, each pair of ranks a link of its own: a model, not a measurement.

    Args:
        sent: (X, X) bytes.
        distance: (X, X), see :func:`of_distance`; what a rank keeps takes no time.
        bandwidth_node: Bytes a second of a link within a node.
        bandwidth_across: Bytes a second of a link between nodes.
    """
    seconds = np.where(distance == 2, sent / bandwidth_across, sent / bandwidth_node)
    return float(np.where(distance == 0, 0.0, seconds).max())
