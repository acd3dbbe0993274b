"""The compiled assignment: optimal over its candidates, with prices that prove it; what it does not take."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moebed.model import native
from moebed.model.native import assignment

SIZE = 300


@pytest.fixture
def similarity():
    values = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    if not assignment.fits(values):
        pytest.skip(f"no compiled library: {native.load()}")
    return values


def solved(similarity, edges, known=None, allowed=0):
    """What ``improve`` returns, and price, profit and permutation."""
    size = len(similarity)
    arrays = [a.copy() for a in known] if known else [np.zeros(size), np.zeros(size), np.full(size, -1)]
    return assignment.improve(similarity, edges, *arrays, allowed), arrays


def test_prices_prove_the_optimum_and_it_goes_on_from_that_over_fewer_candidates(similarity):
    values, every = similarity.double().numpy(), np.arange(SIZE)
    best = values[every, linear_sum_assignment(values, maximize=True)[1]].sum()
    few, known = solved(similarity, np.flatnonzero((values > 0.9) | np.eye(SIZE, dtype=bool)))
    for start in (None, known):
        left, (price, profit, permutation) = solved(similarity, np.arange(SIZE * SIZE), start)
        assert few == left == 0
        assert sorted(permutation) == list(range(SIZE))
        assert values[every, permutation].sum() == pytest.approx(best, abs=1e-9)
        assert (values - profit[:, None] - price).max() < 1e-12
        assert np.allclose(values[every, permutation], profit + price[permutation], atol=1e-12, rtol=0)


def test_prices_prove_the_optimum_of_small_ones(similarity):
    """Of few candidates, some of them equal: searches of a few columns, the last of which is as near as the first."""
    for number in range(300):
        size, some = 2 + number % 60, torch.Generator().manual_seed(number)
        values = torch.rand(size, size, generator=some)
        values = (values * 8).round() / 8 if number % 3 == 0 else values
        wanted = torch.rand(size, size, generator=some) < (4 if number % 2 else 12) / size
        wanted[torch.arange(size), torch.randperm(size, generator=some)] = True
        left, (price, profit, permutation) = solved(values, np.flatnonzero(wanted.numpy()))
        over = values.double().numpy() - profit[:, None] - price
        assert left == 0
        assert sorted(permutation) == list(range(size))
        assert over[wanted.numpy()].max() < 1e-12, number
        assert np.abs(over[np.arange(size), permutation]).max() < 1e-12, number


def test_rows_without_a_column_are_as_few_as_can_be_and_no_more_than_allowed(similarity):
    """Nine rows have the same four candidates."""
    wanted = torch.eye(SIZE, dtype=torch.bool)
    wanted[:9] = False
    wanted[:9, :4] = True
    edges = np.flatnonzero(wanted.numpy())
    left, (_, _, permutation) = solved(similarity, edges, allowed=5)
    assert left == (permutation < 0).sum() == 5
    assert solved(similarity, edges, allowed=4)[0] == -1


def test_what_reaches_the_least_of_its_row_is_found_if_there_is_room(similarity):
    price, least = torch.linspace(0, 0.5, SIZE), torch.linspace(0.5, 1, SIZE)
    want = np.flatnonzero((similarity - price >= least.unsqueeze(1)).numpy())
    assert np.array_equal(assignment.reached(similarity, price, least, len(want)), want)
    assert assignment.reached(similarity, price, least, len(want) - 1) is None
    for room in (0, 1, 60, 127):  # of which all that are looked at together want some
        assert assignment.reached(similarity, price, price - 1, room) is None
    for dear in (price, price + 2):  # whose gains are below 0
        sampled = (similarity - dear)[:, ::7].topk(5, dim=1).values[:, -1:]
        want = np.flatnonzero((similarity - dear >= sampled).numpy())
        assert np.array_equal(assignment.reached(similarity, dear, None, SIZE * SIZE, rank=5, every=7), want)


def test_what_it_does_not_take(similarity, monkeypatch):
    assert not assignment.fits(similarity.double())
    assert not assignment.fits(similarity.T)
    assert not assignment.fits(similarity.to("meta"))
    monkeypatch.setattr(native, "load", lambda: "no compiler")
    assert not assignment.fits(similarity)
