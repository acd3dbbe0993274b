"""Balanced k-means: as many rows in every group.

F rows, H columns, E groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_ITERATIONS = 20
_SWEEPS = 20
_MOST_ITERATIONS = 500  # as LLaMA-MoE's code
_TOLERANCE = 1e-9  # of the costs' size; what rounding could make of a cycle that changes nothing


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


def best_kmeans(rows: Tensor, groups: int, generator: torch.Generator, starts: int = 10) -> Tensor:
    """The same with optimal assignments, and of several starts the grouping with the least squared distances.

    Every iteration deals the rows out as no other dealing out betters, which LLaMA-MoE does by a minimum-cost flow: see
    :func:`optimal_assignment`.

    Args:
        rows: (F, H) float32.
        groups: E; it divides F.
        generator: Draws the first centroids of each start.
        starts: How many.

    Returns:
        The rows of each group, (E, F / E) int64, in ascending order.
    """
    found = [_lloyd(rows, _first_centroids(rows, groups, generator)) for _ in range(starts)]
    assigned, _ = min(found, key=lambda one: one[1])
    return assigned.argsort(stable=True).view(groups, -1)


def _lloyd(rows: Tensor, centroids: Tensor) -> tuple[Tensor, float]:
    """Groups (F,) from these first centroids on, and the sum of squared distances, less the rows' own squares."""
    costs = _costs(rows, centroids)
    assigned = optimal_assignment(costs, _deal(costs))
    for _ in range(_MOST_ITERATIONS):
        before, costs = assigned, _costs(rows, means(rows, assigned, len(centroids)))
        assigned = optimal_assignment(costs, before)
        if torch.equal(before, assigned):
            break
    return assigned, float(costs.gather(1, assigned.unsqueeze(1)).sum(dtype=torch.float32))


def means(rows: Tensor, assigned: Tensor, groups: int) -> Tensor:
    """Means of the groups (E, H); 0 where one is empty."""
    sums = torch.zeros(groups, rows.shape[1]).index_add_(0, assigned, rows)
    return sums / torch.bincount(assigned, minlength=groups).clamp(min=1).unsqueeze(1)


def optimal_assignment(costs: Tensor, assigned: Tensor) -> Tensor:
    """The groups (F,) with the least sum of costs (F, E), of all with as many rows in each group as assigned has.

    Rows change places along cycles of groups, each giving a row to the next. A transportation problem is at its optimum
    where no such cycle lowers the sum; and there are E groups only, so that to look for one takes no time.

    Args:
        costs: (F, E), finite.
        assigned: (F,) where to start.
    """
    assigned = _improve(assigned.clone(), costs)
    table = costs.cpu().numpy().astype(np.float64)
    group = assigned.numpy()
    moves = _Moves(table, group)
    for cycle in moves.cycles():
        moves.turn(cycle)
    return torch.from_numpy(moves.group)


class _Moves:
    """The cheapest row to move from each group to each other one.

    Args:
        costs: (F, E).
        group: (F,) of each row.
    """

    def __init__(self, costs: np.ndarray, group: np.ndarray) -> None:
        self.costs, self.group = costs, group.copy()
        self.count = costs.shape[1]
        self._tolerance = _TOLERANCE * float(np.abs(costs).max(initial=0.0))
        self._price = np.zeros((self.count, self.count))  # of the cheapest move
        self._row = np.zeros((self.count, self.count), np.int64)  # which row that is
        for one in range(self.count):
            self._look(one)

    def _look(self, one: int) -> None:
        members = np.flatnonzero(self.group == one)
        prices = self.costs[members] - self.costs[members, one, None]
        best = prices.argmin(axis=0)
        self._price[one], self._row[one] = prices[best, np.arange(self.count)], members[best]
        self._price[one, one] = np.inf

    def cycles(self) -> Iterator[list[int]]:
        """Cycles of groups that lower the sum, one after another, until there is none."""
        while (cycle := self._cycle()) is not None:
            yield cycle

    def _cycle(self) -> list[int] | None:
        """A cycle of groups whose prices add up to less than 0, by Bellman and Ford."""
        distance, before = np.zeros(self.count), np.zeros(self.count, np.int64)
        changed = np.zeros(self.count, bool)
        for _ in range(self.count):
            through = distance[:, None] + self._price
            best = through.argmin(axis=0)
            shorter = through[best, np.arange(self.count)]
            changed = shorter < distance - self._tolerance
            if not changed.any():
                return None
            distance, before = np.where(changed, shorter, distance), np.where(changed, best, before)
        place = int(changed.argmax())
        for _ in range(self.count):  # into the cycle
            place = int(before[place])
        found = [place]
        while (place := int(before[place])) != found[0]:
            found.append(place)
        return found[::-1]

    def turn(self, cycle: list[int]) -> None:
        """Move a row from each group of a cycle to the next."""
        pairs = list(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        for one, other in pairs:
            self.group[self._row[one, other]] = other
        for one in cycle:
            self._look(one)


def token_clusters(rows: Tensor, groups: int, generator: torch.Generator, slack: float = 0.4) -> tuple[Tensor, Tensor]:
    """Clusters of rows (T, H) whose sizes are within ``slack`` of equal (LLaMA-MoE-v2 2411.15708).

    Prices on the groups keep the sizes in their bounds; rows and bounds are too many to ask for the optimum.

    Returns:
        The cluster of each row (T,), and the centroids (E, H).
    """
    low, high = int((1 - slack) * len(rows) / groups), -int(-(1 + slack) * len(rows) // groups)
    centroids = _first_centroids(rows, groups, generator)
    assigned = torch.full((len(rows),), -1)
    for _ in range(_ITERATIONS):
        before, assigned = assigned, _priced(_costs(rows, centroids), low, high)
        if torch.equal(before, assigned):
            break
        centroids = means(rows, assigned, groups)
    return assigned, centroids


def _priced(costs: Tensor, low: int, high: int) -> Tensor:
    """The cheapest group of each row (F,) where prices on the groups keep between low and high rows in each."""
    groups = costs.shape[1]
    if groups == 1:
        return torch.zeros(len(costs), dtype=torch.int64)
    prices = torch.zeros(groups)
    for _ in range(_SWEEPS):
        before = prices.clone()
        for group in range(groups):
            others = (costs + prices).index_fill(1, torch.tensor(group), torch.inf)
            # Up to which price each row stays in the group; a price between two of these keeps so many rows.
            stays = (others.min(dim=1).values - costs[:, group]).sort(descending=True).values
            least = (stays[high - 1] + stays[high]) / 2 if high < len(stays) else torch.tensor(-torch.inf)
            most = (stays[low - 1] + stays[low]) / 2 if low else torch.tensor(torch.inf)
            prices[group] = torch.minimum(torch.maximum(torch.tensor(0.0), least), most)
        if torch.equal(before, prices):
            break
    return (costs + prices).argmin(dim=1)


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
