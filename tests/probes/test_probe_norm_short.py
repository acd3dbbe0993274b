"""norm_vs_score with a dense reference, on texts short enough to picture, and its ranks against plain sorting."""

import numpy as np
import pytest
import torch
from output_cases import output_view, plain_text
from scipy.stats import rankdata

from probes.figures.drawing import to_rgb
from probes.measures.ranks import ranks
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
