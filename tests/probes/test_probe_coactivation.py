"""coactivation against pairs counted one by one."""

import numpy as np
import pytest
import torch
from probe_cases import probe
from routed_cases import chosen_view

from moebed.views.layer import LayerView
from probes.coactivation import Coactivation
from probes.figures.drawing import to_rgb


def coactivation(views):
    return probe(views, "coactivation")["coactivation"]


def counted(choices, experts, others=None, other_experts=None):
    """N_ij / N_i, token by token."""
    others, other_experts = (choices, experts) if others is None else (others, other_experts)
    pairs, single = np.zeros((experts, other_experts)), np.zeros(experts)
    for own, other in zip(choices, others, strict=True):
        for i in own:
            single[i] += 1
            for j in other:
                pairs[i, j] += 1
    with np.errstate(invalid="ignore"):
        return pairs / single[:, None]


def test_all_pairs_are_counted_in_ragged_layers():
    random = torch.Generator().manual_seed(0)
    first, second = (torch.rand(50, n, generator=random).topk(k).indices for n, k in ((6, 3), (5, 2)))
    views = [chosen_view(first, 6, index=1), LayerView(2, 4, 0, 0, None), chosen_view(second, 5, index=3)]
    arrays = coactivation(views).arrays
    np.testing.assert_allclose(arrays["coactivation/1"], counted(first.tolist(), 6), rtol=1e-6)
    np.testing.assert_allclose(arrays["coactivation/3"], counted(second.tolist(), 5), rtol=1e-6)
    wanted = counted(first.tolist(), 6, second.tolist(), 5)
    np.testing.assert_allclose(arrays["coactivation_next/1"], wanted, rtol=1e-6)
    assert int(arrays["next_layer/1"]) == 3
    assert "coactivation_next/3" not in arrays
    assert not [key for key in arrays if key.startswith("choice/")]
    assert np.diag(arrays["coactivation/1"]) == pytest.approx(np.ones(6))
    off = arrays["coactivation/1"].sum(axis=1) - 1
    assert off == pytest.approx(np.full(6, 2), rel=1e-5)  # K − 1 partners


def test_what_is_expected_goes_by_load():
    arrays = coactivation([chosen_view([[0, 1], [0, 2], [0, 1], [2, 1]], 3)]).arrays
    # N = 3, 3, 2, each pair being in as many tokens as the loads leave: of three experts there is one way.
    assert arrays["coactivation_expected/0"][0] == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-4)
    assert arrays["coactivation_expected/0"][2] == pytest.approx([1 / 2, 1 / 2, 1], abs=1e-4)


def test_partners_that_always_come_together_stand_out():
    pairs = [[2 * (token % 4), 2 * (token % 4) + 1] for token in range(200)]
    result = coactivation([chosen_view(pairs, 8)])
    assert float(result.arrays["partner/0"]) == 1
    assert 1 / 7 < float(result.arrays["partner_chance/0"]) < 0.4
    assert result.headlines["partner"].value == 1


def test_random_partners_are_at_chance_which_finite_counts_raise():
    random = torch.Generator().manual_seed(0)
    views = [chosen_view(torch.rand(400, 16, generator=random).topk(2).indices, 16, index=n) for n in range(2)]
    scalars = coactivation(views).scalars
    assert scalars["partner"] == pytest.approx(scalars["partner_chance"], rel=0.15)
    assert scalars["partner_chance"] > 1.5 / 15
    assert scalars["next_partner"] == pytest.approx(scalars["next_partner_chance"], rel=0.15)


def test_a_layer_that_follows_the_one_before():
    choices = torch.arange(40)[:, None] % 4
    result = coactivation([chosen_view(choices, 4), chosen_view(3 - choices, 4, index=1)])
    np.testing.assert_array_equal(result.arrays["coactivation_next/0"], np.eye(4)[::-1])
    assert result.headlines["next_partner"].value == 1
    assert set(result.headlines) == {"next_partner"}  # K = 1: nothing within a layer
    assert "one expert" in result.notes[0]
    assert "coactivation/0" not in result.arrays


def test_experts_that_nobody_chose_have_no_row():
    result = coactivation([chosen_view([[0, 1], [1, 0]], 4), chosen_view([[0, 3], [3, 0]], 4, index=1)])
    assert np.isnan(result.arrays["coactivation/0"][2:]).all()
    assert np.isnan(result.arrays["coactivation_next/0"][2:]).all()
    assert result.arrays["coactivation_next/0"][0] == pytest.approx([1, 0, 0, 1])
    assert np.isfinite(list(result.scalars.values())).all()
    for build in result.figures.values():
        assert to_rgb(build()).std() > 1


def test_all_experts_chosen_and_a_layer_of_one_expert():
    result = coactivation([chosen_view([[0, 1]] * 5, 2), chosen_view([0] * 5, 1, index=1)])
    assert result.arrays["coactivation/0"].tolist() == [[1, 1], [1, 1]]
    assert result.arrays["coactivation_next/0"].tolist() == [[1], [1]]
    for build in result.figures.values():
        assert to_rgb(build()).std() > 1


def test_a_layer_that_was_forgotten_is_not_the_next_one():
    one = Coactivation()
    for index in range(3):
        one.update(chosen_view([[0, 1], [1, 2]], 3, index=index))
    one.forget(1)
    arrays = one.compute().arrays
    assert int(arrays["next_layer/0"]) == 2
    assert not [key for key in arrays if key.split("/")[1:2] == ["1"]]
    assert Coactivation.describe(arrays).headlines["partner"].value > 0


def test_no_experts():
    result = coactivation([LayerView(0, 1, 0, 0, None)])
    assert result.notes
    assert not result.figures
