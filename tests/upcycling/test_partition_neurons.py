"""Which neurons go where: LLaMA-MoE's rules on importance, and balanced k-means with the best assignments there are."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moebed.upcycling.clusters import balanced_kmeans, best_kmeans, optimal_assignment, token_clusters
from moebed.upcycling.neurons import (
    dealt_by_importance,
    most_important,
    random_groups,
    residual_and_routed,
    voted_residual,
)

# Eight neurons, three experts that list two each. Votes: {0, 1}, {0, 2}, {0, 3}: neuron 0 has three.
EIGHT = torch.tensor(
    [
        [9.0, 8, 1, 2, 3, 4, 5, 6],
        [9.0, 1, 8, 2, 4, 3, 6, 5],
        [9.0, 2, 1, 8, 7, 6, 4, 3],
    ]
)


def _draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_1_8_3_inner_is_the_largest_importance_of_each_expert():
    importance = torch.rand(5, 40, generator=_draws())
    groups = most_important(importance, 8)
    for expert in range(5):
        assert torch.equal(groups[expert], (-importance[expert]).argsort()[:8])
    assert len(groups.unique()) < 40  # they overlap, and some neurons end nowhere


def test_1_8_3_inter_by_hand():
    """One residual expert of two neurons, three routed ones of two.

    Round 1: 0 is on all three lists and is taken. Round 2: the lists are {1, 7}, {2, 6}, {3, 4}, one vote each; all six
    have the most votes that occur, but there is room for one, which is the first by index: 1.
    """
    residual, shared = residual_and_routed(EIGHT, 1, 2, sharing=True)
    assert residual.tolist() == [0, 1]
    assert shared.tolist() == [[7, 6], [2, 6], [3, 4]]  # 6 is in two experts, 5 in none
    _, alone = residual_and_routed(EIGHT, 1, 2, sharing=False)
    # 8 of neuron 2 to expert 1, 8 of 3 to expert 2, 7 of 4 to expert 2, 6 of 7 to expert 0, 6 of 6 to expert 1, then 4
    # of 5 to expert 0, which alone has room.
    assert alone.tolist() == [[7, 5], [2, 6], [3, 4]]


def test_1_8_3_every_round_takes_the_largest_vote():
    importance = torch.rand(6, 60, generator=_draws(3))
    found, left = voted_residual(importance, 12, 10).tolist(), importance.clone()
    assert len(set(found)) == 12
    taken = 0
    while taken < 12:
        listed = [set((-left[expert]).argsort()[:10].tolist()) for expert in range(6)]
        votes = [sum(neuron in one for one in listed) for neuron in range(60)]
        wanted = [neuron for neuron in range(60) if votes[neuron] == max(votes)][: 12 - taken]
        assert found[taken : taken + len(wanted)] == wanted
        taken += len(wanted)
        left[:, wanted] = -torch.inf


@pytest.mark.parametrize("sharing", [True, False])
def test_1_8_3_residual_and_routed_are_disjoint(sharing):
    importance = torch.rand(7, 64, generator=_draws(1))
    residual, routed = residual_and_routed(importance, 1, 8, sharing)
    assert (residual.shape, routed.shape) == ((8,), (7, 8))
    assert not set(residual.tolist()) & set(routed.flatten().tolist())
    together = sorted([*residual.tolist(), *routed.flatten().tolist()])
    assert (together == list(range(64))) == (not sharing)


def test_dealing_by_importance_gives_every_neuron_to_one_expert():
    importance = torch.rand(4, 32, generator=_draws(2))
    groups = dealt_by_importance(importance, 8)
    assert sorted(groups.flatten().tolist()) == list(range(32))
    expert, neuron = divmod(int(importance.argmax()), 32)
    assert groups[expert][0] == neuron  # the largest of all goes where it is


def test_random_groups_are_a_permutation_by_the_seed():
    groups = random_groups(48, 4, _draws(1))
    assert sorted(groups.flatten().tolist()) == list(range(48))
    assert torch.equal(groups, random_groups(48, 4, _draws(1)))
    assert not torch.equal(groups, random_groups(48, 4, _draws(2)))


@pytest.mark.parametrize(("count", "groups"), [(16, 2), (60, 5), (256, 16), (384, 3)])
@pytest.mark.parametrize("kind", ["normal", "equal", "integers"])
def test_no_assignment_is_better(count, groups, kind):
    """As the dense solver finds on as many columns as there are rows, whatever the start."""
    costs = torch.randn(count, groups, generator=_draws(count))
    if kind == "equal":
        costs = costs[:1].repeat(count, 1)
    if kind == "integers":  # many of which are alike
        costs = (2 * costs).round()
    table = np.repeat(costs.numpy().astype(np.float64), count // groups, axis=1)
    best = table[linear_sum_assignment(table)].sum()
    for start in (
        torch.arange(groups).repeat_interleave(count // groups),
        torch.arange(groups).repeat(count // groups),
    ):
        found = optimal_assignment(costs, start)
        assert torch.bincount(found, minlength=groups).tolist() == [count // groups] * groups
        total = table[np.arange(count), found.numpy() * (count // groups)].sum()
        assert total == pytest.approx(best, abs=1e-6 * max(1, abs(best)))


def _spread(rows, groups):
    """Sum of squared distances to the groups' means."""
    return sum(float((rows[group] - rows[group].mean(dim=0)).square().sum()) for group in groups)


def test_more_starts_and_best_assignments_do_not_lose():
    rows = torch.randn(240, 6, generator=_draws(4))
    groups = best_kmeans(rows, 8, _draws(5), starts=6)
    assert sorted(groups.flatten().tolist()) == list(range(240))
    assert groups.shape == (8, 30)
    one = _spread(rows, best_kmeans(rows, 8, _draws(5), starts=1))
    assert _spread(rows, groups) <= one
    assert one < 1.02 * _spread(rows, balanced_kmeans(rows, 8, _draws(5)))
    at_random = min(_spread(rows, random_groups(240, 8, _draws(seed))) for seed in range(20))
    assert _spread(rows, groups) < 0.8 * at_random


def test_token_clusters_have_sizes_within_40_percent():
    """Of three heaps of 300, 30 and 30 rows no cluster has more than 168 or fewer than 72."""
    centres = torch.tensor([[8.0, 0], [0, 8.0], [-8.0, -8.0]])
    label = torch.arange(3).repeat_interleave(torch.tensor([300, 30, 30]))
    rows = centres[label] + torch.randn(360, 2, generator=_draws())
    assigned, _ = token_clusters(rows, 3, _draws(1))
    sizes = torch.bincount(assigned, minlength=3)
    assert sizes.max() <= 168
    assert sizes.min() >= 72
    equal = centres[torch.arange(3).repeat_interleave(50)] + 0.1 * torch.randn(150, 2, generator=_draws(2))
    _, found = token_clusters(equal, 3, _draws(1))
    assert torch.cdist(centres, found).min(dim=1).values.max() < 0.2
