"""Balanced k-means: as many rows in every group.

F rows, H columns, E groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 20
_SWEEPS = 20


def balanced_kmeans(rows: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Group rows so that each group has F / E of them and rows of a group are near its mean (MoEfication 2110.01786).

    Lloyd's iterations, begun as k-means++ does. Rows are dealt out greedily, those with most to lose first, then
    swapped between groups, two groups at a time, until no swap shortens the sum of squared distances.

    Args:
        rows: (F, H) float32.
        groups: E; it divides F.
        generator: Draws the first centroids.

    Returns:
        The rows of each group, (E, F / E) int64, in ascending order.
    """
    centroids = _first_centroids(rows, groups, generator)
    assigned = _improve(_deal(_costs(rows, centroids)), _costs(rows, centroids))
    for _ in range(_ITERATIONS):
        centroids = torch.stack([rows[assigned == group].mean(dim=0) for group in range(groups)])
        before, assigned = assigned, _improve(assigned.clone(), _costs(rows, centroids))
        if torch.equal(before, assigned):
            break
    return assigned.argsort(stable=True).view(groups, -1)


def _costs(rows: Tensor, centroids: Tensor) -> Tensor:
    """Squared distance of every row to every centroid, (F, E), less the row's own square, which no choice changes."""
    return centroids.square().sum(dim=1) - 2 * rows @ centroids.T


def _first_centroids(rows: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one after another, each by its squared distance to those before (k-means++)."""
    chosen = rows[torch.randint(len(rows), (1,), generator=generator)]
    nearest = (rows - chosen).square().sum(dim=1)
    while len(chosen) < groups:
        weights = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        row = rows[torch.multinomial(weights, 1, generator=generator)]
        chosen = torch.cat([chosen, row])
        nearest = torch.minimum(nearest, (rows - row).square().sum(dim=1))
    return chosen


def _deal(costs: Tensor) -> Tensor:
    """Group of each row, (F,): the nearest that has room, rows that lose most by their second choice first."""
    count, groups = costs.shape
    room = [count // groups] * groups
    best = costs.topk(min(2, groups), dim=1, largest=False).values
    order = (best[:, -1] - best[:, 0]).argsort(descending=True)
    assigned = torch.empty(count, dtype=torch.int64)
    preferences = costs.argsort(dim=1).tolist()
    for row in order.tolist():
        group = next(group for group in preferences[row] if room[group])
        assigned[row], room[group] = group, room[group] - 1
    return assigned


def _improve(assigned: Tensor, costs: Tensor) -> Tensor:
    """Swap rows between pairs of groups while that lowers the sum of costs; the best for each pair at its turn."""
    groups = costs.shape[1]
    for _ in range(_SWEEPS):
        swapped = False
        for one in range(groups):
            for other in range(one + 1, groups):
                here, there = (assigned == one).nonzero()[:, 0], (assigned == other).nonzero()[:, 0]
                # What moving each row to the other group gains; the largest gains are swapped with each other.
                gain_here, order_here = (costs[here, one] - costs[here, other]).sort(descending=True)
                gain_there, order_there = (costs[there, other] - costs[there, one]).sort(descending=True)
                # Rounding must not make two rows change places for ever.
                worth = gain_here + gain_there > 1e-5 * (gain_here.abs() + gain_there.abs())
                count = int(worth.cumprod(0).sum())
                if count:
                    assigned[here[order_here[:count]]], assigned[there[order_there[:count]]] = other, one
                    swapped = True
        if not swapped:
            break
    return assigned
