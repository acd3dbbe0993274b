"""The assignment is exact whatever the similarities look like, and large ones do not take the dense solver."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moebed.model.native import assignment as native_assignment
from probes.measures import assignment
from probes.measures.assignment import assign
from tests.probes.measures.test_probe_matching import neurons, similarity_of

OF_NEURONS = (
    "random",
    "correlated",
    "permuted",
    "tied",
    "few values",
    "hubs",
    "constant",
    "leaning",
    "clusters",
    "dead",
)
OF_NUMBERS = ("integers", "rank one", "same columns", "one value")
PARTNERLESS = ("rank one", "clusters", "dead")  # many rows whose candidates are taken


def similarities(kind, size, width, strength, seed):
    """(N, N) float32: cosines of made-up neurons, or numbers that no neurons have."""
    if kind in OF_NEURONS:
        return similarity_of(*neurons(kind, size, width, strength, seed))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(size, size, generator=generator)
    made = {
        "integers": lambda: torch.randint(-3, 4, (size, size), generator=generator).float(),
        "rank one": lambda: noise[0] * noise[-1].unsqueeze(1),  # the larger of one wants the larger of the other
        "same columns": lambda: noise * 0.01 + torch.linspace(0, 1, size) ** 2,  # every row wants the last ones
        "one value": lambda: torch.full((size, size), 0.5),
    }
    return made[kind]()


def total(similarity, permutation):
    return similarity.double().numpy()[np.arange(len(permutation)), permutation].sum()


def best_total(similarity):
    return total(similarity, linear_sum_assignment(similarity.double().numpy(), maximize=True)[1])


@pytest.mark.parametrize("way", ["compiled", "scipy", "dense"])
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(OF_NEURONS + OF_NUMBERS),
    size=st.integers(1, 90),
    width=st.integers(2, 40),
    strength=st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_assignment_is_as_good_as_scipys(way, kind, size, width, strength, seed):
    similarity = similarities(kind, size, width, strength, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_DENSE_BELOW", 1000 if way == "dense" else 0)
        if way == "scipy":
            patch.setattr(native_assignment, "fits", lambda similarity: False)
        patch.setattr(assignment, "_CANDIDATES", 8)  # few, so that the proof finds some missing
        patch.setattr(assignment, "_SAMPLED_ROWS", (16, 16))
        permutation = assign(similarity)
    assert sorted(permutation) == list(range(size))
    assert total(similarity, permutation) == pytest.approx(best_total(similarity), abs=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.15, 0.5])
@pytest.mark.parametrize("kind", [*OF_NEURONS, *OF_NUMBERS])
def test_large_ones_take_the_dense_solver_only_where_candidates_leave_many_without_a_partner(
    kind, strength, compiled, monkeypatch
):
    similarity = similarities(kind, 400, 300, strength, 0)
    if not compiled:
        monkeypatch.setattr(native_assignment, "fits", lambda similarity: False)
    want = best_total(similarity)
    taken, dense = [], assignment.linear_sum_assignment
    monkeypatch.setattr(assignment, "linear_sum_assignment", lambda cost: taken.append(1) or dense(cost))
    monkeypatch.setattr(assignment, "_CANDIDATES", 24)
    monkeypatch.setattr(assignment, "_EVERY", 2)
    assert total(similarity, assign(similarity)) == pytest.approx(want, abs=1e-6)
    assert bool(taken) == (kind in PARTNERLESS)


def test_rows_that_lean_one_way_are_matched_at_once(monkeypatch):
    """Prices that balance what columns are asked for leave next to nothing to the proof."""
    similarity = similarities("leaning", 1000, 300, 0.0, 0)
    missing = assignment._missing
    found = []
    monkeypatch.setattr(assignment, "_missing", lambda *a: found.append(missing(*a)) or found[-1])
    assign(similarity)
    assert found
    assert sum(len(entries) for entries in found) < 20
    monkeypatch.setattr(assignment, "_balancing_prices", lambda similarity: np.zeros(1000))
    monkeypatch.setattr(assignment, "linear_sum_assignment", None)
    with pytest.raises(TypeError):  # without prices the dense solver would be needed
        assign(similarity)


def test_prices_balance_what_columns_are_asked_for():
    similarity = similarities("leaning", 1000, 300, 0.0, 0)

    def rows_that_want(price):
        return np.bincount(assignment._candidates(similarity, price) % 1000, minlength=1000)

    assert rows_that_want(np.zeros(1000)).min() < 10
    assert rows_that_want(assignment._balancing_prices(similarity)).min() > 25


def test_few_rows_without_a_partner_are_given_one(monkeypatch):
    """A hundred rows want the same 97 columns and nothing else: three go without."""
    similarity = similarities("random", 400, 300, 0.0, 0)
    similarity[:100, :97] += 0.5
    want, given_one = best_total(similarity), []
    left_over = assignment._left_over
    monkeypatch.setattr(assignment, "linear_sum_assignment", None)
    monkeypatch.setattr(assignment, "_left_over", lambda found: given_one.append(left_over(found)) or given_one[-1])
    assert total(similarity, assign(similarity)) == pytest.approx(want, abs=1e-6)
    assert [len(edges) for edges in given_one] == [9]


def test_a_proof_that_fails_adds_what_was_missing(monkeypatch):
    similarity = similarities("correlated", 400, 300, 0.1, 3)
    monkeypatch.setattr(assignment, "_CANDIDATES", 8)
    monkeypatch.setattr(assignment, "_EVERY", 1)
    found = []
    missing = assignment._missing
    monkeypatch.setattr(assignment, "_missing", lambda *a: found.append(missing(*a)) or found[-1])
    permutation = assign(similarity)
    assert len(found) > 1
    assert len(found[0])
    assert total(similarity, permutation) == pytest.approx(best_total(similarity), abs=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
def test_what_float32_cannot_tell_is_missing_too(compiled, monkeypatch):
    """One row in two would gain 1e-9 by its nearest column at these prices, the others nothing."""
    if not compiled:
        monkeypatch.setattr(native_assignment, "fits", lambda similarity: False)
    similarity = similarities("random", 300, 50, 0.0, 0)
    price = np.random.default_rng(0).uniform(0, 2, 300)
    gain = similarity.double().numpy() - price
    profit = gain.max(axis=1) - np.where(np.arange(300) % 2, 1e-9, 0.0)
    found = assignment._missing(similarity, profit, price)
    assert found.tolist() == np.flatnonzero(gain - profit[:, None] > 1e-10).tolist()
    assert len(found) >= 150


@pytest.mark.parametrize("compiled", [True, False])
def test_prices_that_do_not_prove_it_are_an_error(compiled, monkeypatch):
    """Scipy's sparse solver writes beyond its memory where an edge is there twice, and ends the process."""
    if not compiled:
        monkeypatch.setattr(native_assignment, "fits", lambda similarity: False)
    missing = assignment._missing
    monkeypatch.setattr(
        assignment, "_missing", lambda similarity, profit, price: missing(similarity, profit - 0.1, price)
    )
    with pytest.raises(RuntimeError, match=r"prices do not prove it: [1-9]"):
        assign(similarities("random", 300, 50, 0.0, 0))


def test_of_many_missing_each_row_has_its_largest():
    row, entry = np.array([0, 0, 0, 2, 2]), np.array([1, 4, 7, 22, 25])
    excess = np.array([0.1, 0.3, 0.2, 0.5, 0.6])
    assert assignment._foremost(row, entry, excess, 2).tolist() == [4, 7, 22, 25]
    assert assignment._foremost(row, entry, excess, 1).tolist() == [4, 25]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_has_no_best_assignment_is_refused(bad):
    similarity = torch.rand(5, 5)
    similarity[3, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        assign(similarity)
    with pytest.raises(ValueError, match="4 × 5 are not square"):
        assign(torch.rand(4, 5))
