"""repeats on choices whose repeats can be counted by eye."""

import numpy as np
import pytest
import torch
from probe_cases import probe
from routed_cases import chosen_view, text_of

from moebed.views.layer import LayerView
from probes.figures.drawing import to_rgb
from probes.repeats import LONGEST_RUN, Repeats


def repeats(views):
    return probe(views, "repeats")["repeats"]


TEXT = text_of([[1, 2, 3, 4], [5], [6, 7, 8]], [0, 0, 1], ("code", "prose"))
CHOICES = [[0, 1], [0, 2], [2, 3], [1, 0], [1, 2], [1, 3], [1, 0], [1, 2]]


@pytest.mark.parametrize("unsorted", [False, True])
def test_repeats_by_hand(unsorted):
    arrays = repeats([chosen_view(CHOICES, 4, TEXT, 2, unsorted)]).arrays
    # code: 0→0 repeats, 0→2 shares expert 2, {2,3}→{1,0} shares none; the one token after it begins a sequence
    assert float(arrays["repeat_first/2/code"]) == pytest.approx(1 / 3)
    assert float(arrays["repeat_any/2/code"]) == pytest.approx(2 / 3)
    assert float(arrays["repeat_first/2/prose"]) == 1
    assert float(arrays["repeat_first/2/all"]) == pytest.approx(3 / 5)
    assert float(arrays["repeat_any/2/all"]) == pytest.approx(4 / 5)
    assert float(arrays["random_first/2"]) == 0.25
    assert float(arrays["random_any/2"]) == pytest.approx(5 / 6)
    assert float(arrays["repeat_first_expected/2/all"]) == pytest.approx((2 / 8) ** 2 + (5 / 8) ** 2 + (1 / 8) ** 2)


def test_runs_end_with_their_sequence():
    arrays = repeats([chosen_view(CHOICES, 4, TEXT)]).arrays
    # 0 0 | 2 | 1 || 1 || 1 1 1
    assert arrays["run_length/0"][:4].tolist() == [3, 1, 1, 0]
    assert arrays["run_length/0"].sum() == 5
    assert float(arrays["mean_run/0"]) == pytest.approx(8 / 5)


def test_a_run_longer_than_the_last_bar():
    text = text_of([list(range(50))], [0], ("a",))
    result = repeats([chosen_view([0] * 40 + [1] * 10, 2, text)])
    assert result.arrays["run_length/0"][[9, LONGEST_RUN - 1]].tolist() == [1, 1]
    for build in result.figures.values():
        assert to_rgb(build()).std() > 1


def test_random_choices_repeat_as_often_as_chance():
    random = torch.Generator().manual_seed(0)
    text = text_of([[1] * 500] * 8, [0, 1] * 4, ("a", "b"))
    choices = torch.rand(4000, 8, generator=random).topk(2).indices
    result = repeats([chosen_view(choices, 8, text)])
    assert result.headlines["repeat_first"].value == pytest.approx(1 / 8, abs=0.015)
    assert result.headlines["repeat_any"].value == pytest.approx(0.464, abs=0.025)
    assert float(result.arrays["mean_run/0"]) == pytest.approx(float(result.arrays["mean_run_expected/0"]), rel=0.02)
    low, high = result.headlines["repeat_first"].interval
    assert low < result.headlines["repeat_first"].value < high
    assert high - low < 0.04
    assert "12.5%" in result.headlines["repeat_first"].sentence


def test_a_collapsed_router_always_repeats():
    result = repeats([chosen_view([[3, 1]] * 8, 4, TEXT)])
    assert result.headlines["repeat_first"].value == 1
    assert result.headlines["repeat_first"].interval is None
    assert result.notes[0].startswith("one text of each domain: ")
    result = repeats([chosen_view([[3, 1]] * 8, 4, text_of([[1] * 5, [2] * 3], [0, 0], ("a",)))])
    assert result.headlines["repeat_first"].interval == (1, 1)
    assert not result.notes
    assert float(result.arrays["mean_run/0"]) == pytest.approx(float(result.arrays["mean_run_expected/0"]))


def test_a_deep_model_names_the_layers_of_the_mixtral_table():
    views = [chosen_view(CHOICES, 4, TEXT, layer) for layer in range(32)]
    names = set(repeats(views).headlines)
    assert {f"repeat_{kind}_layer_{layer}" for kind in ("first", "any") for layer in (0, 15, 31)} <= names
    assert set(repeats(views[:4]).headlines) == {"repeat_first", "repeat_any"}


def test_ragged_layers_one_expert_and_dense_ones():
    views = [LayerView(0, 4, 0, 0, None), chosen_view([0] * 8, 1, TEXT, 1), chosen_view(CHOICES, 6, TEXT, 2)]
    result = repeats(views)
    assert float(result.arrays["repeat_first/1/all"]) == 1
    assert float(result.arrays["random_any/1"]) == 1
    assert float(result.arrays["random_first/2"]) == pytest.approx(1 / 6)
    again = Repeats.describe(dict(result.arrays))
    assert again.scalars == result.scalars
    for build in again.figures.values():
        assert to_rgb(build()).std() > 1


def test_nothing_to_repeat():
    text = text_of([[1], [2]], [0, 0], ("a",))
    result = repeats([chosen_view([0, 1], 2, text)])
    assert result.notes
    assert not result.figures
    assert repeats([LayerView(0, 1, 0, 0, None)]).notes


def test_the_whole_text_is_not_the_sum_of_unequal_domains():
    arrays = repeats([chosen_view(CHOICES, 4, TEXT)]).arrays
    parts = [float(arrays[f"repeat_first/0/{name}"]) for name in ("code", "prose")]
    assert float(arrays["repeat_first/0/all"]) == pytest.approx(np.dot(parts, [3, 2]) / 5)
