"""Which neurons of a dense FFN an expert gets: the rules of LLaMA-MoE (2406.16554) that need no weights.

E experts, D neurons of the dense FFN, F of an expert. Importance is (E, D): of each neuron, for each expert's texts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_groups(count: int, groups: int, generator: torch.Generator) -> Tensor:
    """A random permutation of the D neurons, cut into E runs: (E, D / E) int64."""
    return torch.randperm(count, generator=generator).view(groups, -1)


def contiguous_groups(count: int, groups: int) -> Tensor:
    """Runs in stored order: (E, D / E) int64."""
    return torch.arange(count).view(groups, -1)


def most_important(importance: Tensor, width: int) -> Tensor:
    """Each expert's F neurons of largest importance (*inner*): (E, F) int64, the largest first.

    Experts overlap, and some neurons end nowhere.
    """
    return importance.argsort(dim=1, descending=True, stable=True)[:, :width]


def dealt_by_importance(importance: Tensor, width: int) -> Tensor:
    """Each neuron once: again and again the largest importance left goes to its expert, if that has room.

    Args:
        importance: (E, D) with D = E·F; -inf in the column of a neuron that is not to be dealt.
        width: F.

    Returns:
        (E, F) int64, the largest first.
    """
    experts, count = importance.shape
    found: list[list[int]] = [[] for _ in range(experts)]
    taken = importance.isneginf().all(dim=0).tolist()
    for place in importance.flatten().argsort(descending=True, stable=True).tolist():
        expert, neuron = divmod(place, count)
        if not taken[neuron] and len(found[expert]) < width:
            found[expert].append(neuron)
            taken[neuron] = True
    return torch.tensor(found)


def voted_residual(importance: Tensor, count: int, width: int) -> Tensor:
    """The neurons that every token passes (*inter*), by votes and not by importance.

    Each expert votes for its F most important neurons of those that are left; all neurons with the largest number of
    votes are taken, in the order of their index as far as there is room, and the experts vote anew.

    Args:
        importance: (E, D).
        count: How many to find.
        width: F.

    Returns:
        (count,) int64, in the order in which they were found.
    """
    left = importance.clone()
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        listed = most_important(left, min(width, importance.shape[1] - len(found)))
        votes = torch.bincount(listed.flatten(), minlength=importance.shape[1])
        first = (votes == votes.max()).nonzero()[:, 0][: count - len(found)]
        found = torch.cat([found, first])
        left[:, first] = -torch.inf
    return found


def residual_and_routed(importance: Tensor, residual: int, width: int, sharing: bool) -> tuple[Tensor, Tensor]:
    """The neurons of ``residual`` experts that every token passes, and of the E routed ones (*inter*).

    Args:
        importance: (E, D).
        residual: R.
        width: F.
        sharing: The routed experts have their F most important of what is left, in common or not; otherwise it is dealt
            out, and D must be (R + E)·F.

    Returns:
        (R·F,) and (E, F), int64.
    """
    common = voted_residual(importance, residual * width, width)
    left = importance.clone()
    left[:, common] = -torch.inf
    return common, most_important(left, width) if sharing else dealt_by_importance(left, width)
