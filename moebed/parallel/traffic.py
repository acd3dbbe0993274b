"""What expert parallelism sends: how many tokens from which rank to which, and what each trip costs in bytes.

A trip is a token that goes to a rank which has some of its experts, however many, and comes back as their sum; where
ranks gather all tokens (``all_gather``) each token makes one to every rank.

T tokens, E experts, K experts per token, X ranks that share the experts, g ranks a node, H hidden, c bytes of a
product's operands. Rank r has experts r·E/X to (r + 1)·E/X, and node r // g, as in moebed.parallel.exchange.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

WEIGHT_BYTES = INDEX_BYTES = 4  # float32 and int32, K of each beside a row


class TripBytes(NamedTuple):
    """Bytes of one trip in a step, by the way they take."""

    out: int  # from the token's rank to the experts'
    back: int

    @property
    def both(self) -> int:
        """There and back."""
        return self.out + self.back


def bytes_per_trip(
    hidden_size: int,
    itemsize: int,
    top_k: int,
    recomputed: bool = False,
    looks_ahead: bool = False,
    norm_after: bool = False,
) -> TripBytes:
    """Forward, a row of c·H bytes, K weights and K experts go out, and c·H come back; the gradients of rows and weights
    take the same ways in reverse. A step that looks ahead has one more forward pass. Recomputation repeats what goes
    out; results come back again where a norm after the experts has to have them for its backward pass (norm_after).

    Counts of 3·X int64 a pass are left out, and so is that a router without gradient sends no gradient of weights.
    """
    row, passes = itemsize * hidden_size, 1 + recomputed + looks_ahead
    weights, experts = WEIGHT_BYTES * top_k, INDEX_BYTES * top_k
    results = (passes if norm_after else passes - recomputed) * row
    return TripBytes(passes * (row + weights + experts) + row, results + row + weights)


def even_trips(num_experts: int, top_k: int, ranks: int, exchange: str = "all_to_all") -> float:
    """Trips of a token on average, to its own rank among others, if its K experts were drawn evenly from all E.

    X·(1 − C(E − E/X, K) / C(E, K)), between 1 and the smaller of K and X; X where ranks gather all tokens.
    """
    if exchange == "all_gather":
        return ranks
    elsewhere = math.comb(num_experts - num_experts // ranks, top_k) / math.comb(num_experts, top_k)
    return ranks * (1 - elsewhere)


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


def trips_between_ranks(index: np.ndarray, rank: np.ndarray, num_experts: int, ranks: int) -> np.ndarray:
    """Trips (X, X), as ``between_ranks`` has assignments: each rank that has any expert of a token counts once."""
    there = np.zeros((len(index), ranks), bool)
    token, choice = np.nonzero(index >= 0)
    there[token, index[token, choice] // (num_experts // ranks)] = True
    token, to = np.nonzero(there)
    return np.bincount(rank[token] * ranks + to, minlength=ranks * ranks).reshape(ranks, ranks)


def trips_to_all(rank: np.ndarray, ranks: int) -> np.ndarray:
    """Trips (X, X) where every token goes to every rank, whatever its experts; of tokens on ranks (T,)."""
    return np.repeat(np.bincount(rank, minlength=ranks)[:, None], ranks, axis=1)


def of_distance(ranks: int, ranks_per_node: int) -> np.ndarray:
    """How far two ranks are apart, (X, X): 0 the same rank, 1 the same node, 2 another node."""
    rank = np.arange(ranks)
    node = rank // ranks_per_node
    return (rank[:, None] != rank).astype(np.int64) + (node[:, None] != node)


def link_bytes(trips: np.ndarray, each: TripBytes) -> np.ndarray:
    """Bytes (X, X) that one rank sends to another in a step, from trips (X, X); on the diagonal, to itself."""
    return trips * each.out + trips.T * each.back


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
