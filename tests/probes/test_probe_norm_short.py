"""norm_vs_score with a dense reference, on texts short enough to picture, and its ranks against plain sorting."""

import numpy as np
import pytest
import torch
from output_cases import output_view, plain_text
from scipy.stats import rankdata

from moebed.views.layer import ProbeText
from probes.figures.drawing import to_rgb
from probes.measures.ranks import first_of_largest, joined, rankable, ranks, settled
from probes.norm_vs_score import NormVsScore
from probes.running.driver import run_probes


def run(*views):
    return run_probes(views, [NormVsScore()])["norm_vs_score"]


def test_the_reference_has_a_norm_and_no_rank():
    outputs = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    others = {"SE": torch.ones(4, 2), "F": torch.tensor([3.0, 4.0]) * torch.arange(4.0).unsqueeze(1)}
    arrays = run(output_view(outputs, [[0]] * 4, others=others)).arrays
    assert arrays["dense_ffn_output_norm/0"].tolist() == [0, 5, 10, 15]
    assert arrays["output_norm/0"].shape == (4, 3)
    plain = run(output_view(outputs, [[0]] * 4)).arrays
    assert set(arrays) - set(plain) == {"dense_ffn_output_norm/0"}
    np.testing.assert_array_equal(arrays["output_norm/0"], plain["output_norm/0"])


@pytest.mark.parametrize(("tokens", "drawn"), [(12, True), (13, False)])
def test_bars_only_for_short_texts(tokens, drawn):
    outputs = torch.randn(20, tokens, 2)
    probs = torch.rand(tokens, 20)
    result = run(output_view(outputs, [[0]] * tokens, probs=probs, text=plain_text([tokens])))
    assert ("tokens" in result.figures) == ("score/0" in result.arrays) == drawn
    if drawn:
        np.testing.assert_array_equal(result.arrays["score/0"], probs)


def test_bars_are_drawn():
    layers = [
        output_view(
            torch.randn(experts, 2, 2), [[0]] * 2, index, {"F": torch.ones(2, 2)}, text=plain_text([2], ("a", "b"))
        )
        for index, experts in enumerate((3, 20))
    ]
    fig = run(*layers).figures["tokens"]()
    assert [ax.get_title() for ax in fig.axes[:4]] == ["a", "b", "a", "b"]
    to_rgb(fig)


@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
def test_ranks(levels):
    values = np.random.default_rng(0).integers(levels, size=(200, 9)).astype(np.float32)
    found = ranks(values)
    np.testing.assert_array_equal(found.whole, values.argsort(axis=1, kind="stable").argsort(axis=1))
    np.testing.assert_array_equal(found.shared, rankdata(values, axis=1) - 1)


def test_ranks_of_many_entries_with_a_few_ties():
    """A sort that is not stable shows with more entries than it sorts by insertion."""
    values = np.random.default_rng(0).integers(500, size=(300, 64)).astype(np.float32)
    np.testing.assert_array_equal(ranks(values).whole, values.argsort(axis=1, kind="stable").argsort(axis=1))
    np.testing.assert_array_equal(ranks(values).shared, rankdata(values, axis=1) - 1)


def test_values_that_rounding_tells_apart_share_their_rank():
    """In fixed steps some would lie on both sides of an end."""
    rng = np.random.default_rng(0)
    levels = rng.integers(40, size=(200, 64)) + 1.0
    values = (levels * (1 + 1e-7 * rng.standard_normal(levels.shape)) - 20).astype(np.float32)
    found = ranks(values, within=1e-4)
    np.testing.assert_array_equal(found.shared, rankdata(levels, axis=1) - 1)
    np.testing.assert_array_equal(found.whole, levels.argsort(axis=1, kind="stable").argsort(axis=1))
    assert (ranks(values).shared != found.shared).mean() > 0.5
    tails = np.array([[1e-9, 1.0, 2e-9, 0.5, 0.0, 0.0]])
    np.testing.assert_array_equal(ranks(tails).shared, [[2, 5, 3, 4, 0.5, 0.5]])
    np.testing.assert_array_equal(ranks(tails, within=1e-5).shared, [[1.5, 5, 1.5, 4, 1.5, 1.5]])


@pytest.mark.parametrize("within", [0.0, 1e-5])
def test_what_is_infinite_is_larger_than_all_else(within):
    values = np.array([[np.inf, 3.0, -np.inf, np.inf, 3.0]])
    np.testing.assert_array_equal(ranks(values, within).shared, [[3.5, 1.5, 0, 3.5, 1.5]])
    np.testing.assert_array_equal(ranks(values, within).whole, [[3, 1, 0, 4, 2]])
    for none in (np.empty((0, 4)), np.empty((3, 0))):
        assert ranks(none, within).shared.shape == none.shape


def test_tokens_that_are_one_have_the_same_values_where_rounding_alone_tells_them_apart():
    """And stay as they are where a router, say, treats them otherwise."""
    values = np.array([1.0, 5.0, 1.0 + 1e-6, 1.5, 5.0], np.float32)
    assert settled(values, np.array([0, 1, 0, 0, 1])).tolist() == [1.0, 5.0, 1.0, 1.5, 5.0]
    of_size = np.array([[1e-4, -800.0], [2e-4, -800.5]])
    assert settled(of_size, np.array([0, 0])).tolist() == [[1e-4, -800.0], [2e-4, -800.0]]
    ids = torch.tensor([[7, 8, 9, 9], [7, 8, 8, 9], [8, 7, 0, 0], [7, 8, 9, 9]])
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False], [True] * 4])
    domain = torch.zeros(4, dtype=torch.long)
    text = ProbeText(ids, mask, domain)
    assert text.first_with_past.tolist() == [0, 1, 2, 3, 0, 1, 6, 7, 8, 9, 0, 1, 2, 3]
    again = ProbeText(torch.tensor([[7, 7, 7, 8, 7], [8, 8, 7, 8, 8]]), torch.ones(2, 5, dtype=torch.bool), domain[:2])
    assert again.first_with_past.tolist() == [0, 0, 0, 3, 4, 5, 5, 7, 8, 9]
    zero = ProbeText(torch.tensor([[0, 7, 3], [7, 3, 0], [0, 0, 7]]), torch.ones(3, 3, dtype=torch.bool), domain[:3])
    assert zero.first_with_past.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 8]  # 7 after two is not 7 after one


def test_the_largest_of_several_that_are_equal_is_the_first():
    values = np.array([[1, 2, 2 + 1e-7, 0], [3, 1, 1, 1], [-np.inf] * 4, [0, np.inf, 1, np.inf]])
    np.testing.assert_array_equal(first_of_largest(values), [1, 0, 0, 1])
    np.testing.assert_array_equal(ranks(values[:2], within=1e-5).top(), [[0, 0.5, 0.5, 0], [1, 0, 0, 0]])


def test_rows_can_be_ranked_whose_entries_differ_by_more_than_rounding_of_the_largest():
    values = np.array([[1, 1 + 2e-5], [1, 1 + 5e-6], [-100, -100 + 5e-4], [-100, -98], [0, 0], [-1e-9, 1e-9]])
    assert rankable(values).tolist() == [True, False, False, True, False, True]


def test_copies_of_experts_are_joined_and_others_are_not():
    rng = np.random.default_rng(0)
    values = rng.random((50, 6)).astype(np.float32) + 0.5
    values[-1, :2] = values[-1, 5]  # equal at one token alone
    assert joined(values) is values
    values[:, 4] = values[:, 1] * (1 + 1e-7 * rng.standard_normal(50))
    values[:, 3] = values[:, 1] * (1 + 1e-7 * rng.standard_normal(50))
    one = joined(values)
    assert (one[:, [3, 4]] == one[:, [1]]).all()
    np.testing.assert_allclose(one, values, rtol=1e-6)
    assert (one[:, [0, 2, 5]] == values[:, [0, 2, 5]]).all()
    assert joined(values[:0]).shape == (0, 6)
    few = values.copy()
    few[1::4, 3] += 0.1  # tokens that are not among those that are looked at first
    assert (joined(few)[:, 3] == few[:, 3]).all()
    drifting = values[:, :1] * (1 + np.array([0, 8e-6, 1.6e-5]))  # the third equals the second, and not the first
    assert (joined(drifting) == drifting[:, [0, 0, 2]]).all()
