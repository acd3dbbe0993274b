"""vocabulary on texts whose specialisation is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from probe_cases import probe
from routed_cases import chosen_view, text_of

from moebed.views.layer import HeadView, LayerView
from probes.figures.drawing import to_rgb
from probes.measures.resampling import LARGEST
from probes.measures.words import words_of
from probes.vocabulary import Vocabulary

IDS = [7, 7, 7, 9, 9] * 6  # 18 times 7, 12 times 9
TEXT = text_of([IDS[:15], IDS[15:]], [0, 0], ("a",), tuple("<b>" if one == 7 else " $&" for one in IDS))


def vocabulary(views):
    return probe(views, "vocabulary")["vocabulary"]


def test_an_expert_for_each_id():
    choices = [0 if one == 7 else 2 for one in IDS]
    result = vocabulary([chosen_view(choices, 3, TEXT, 4)])
    assert float(result.arrays["vocab_specialisation/4/input"]) == 1
    assert result.arrays["ids_input"].tolist() == [7, 9]
    assert result.arrays["seen_input"].tolist() == [18, 12]
    assert result.arrays["top_ids/4/input"][:, 0].tolist() == [7, -1, 9]
    assert result.arrays["top_shares/4/input"][:, 0].tolist() == [1, 0, 1]
    assert 0.5 < float(result.arrays["vocab_shuffled/4/input"]) < 0.9
    assert "100.0%" in result.headlines["specialisation_input"].sentence
    assert result.notes  # nothing was predicted


def test_the_share_is_of_routings_so_two_choices_halve_it():
    choices = [[0, 1] if one == 7 else [2, 0] for one in IDS]
    arrays = vocabulary([chosen_view(choices, 3, TEXT)]).arrays
    assert float(arrays["vocab_specialisation/0/input"]) == 0.5
    assert arrays["top_shares/0/input"][0, :2] == pytest.approx([0.5, 0.5])
    assert sorted(arrays["top_ids/0/input"][0, :2].tolist()) == [7, 9]


def test_rare_ids_do_not_count():
    text = text_of([[1] * 10 + [2] * 9], [0], ("a",))
    choices = [0] * 5 + [1] * 5 + [2] * 9
    arrays = vocabulary([chosen_view(choices, 3, text)]).arrays
    assert arrays["ids_input"].tolist() == [1]
    assert float(arrays["vocab_specialisation/0/input"]) == 0.5
    # the target of the last token is none; id 1 follows 9 times only, id 2 follows 9 times
    assert "vocab_specialisation/0/target" not in arrays


def test_targets_end_with_their_sequence():
    text = text_of([[5, 6] * 11, [5, 6] * 11], [0, 0], ("a",))
    choices = [0 if one == 5 else 1 for one in text.token_ids.tolist()]
    arrays = vocabulary([chosen_view(choices, 2, text)]).arrays
    assert arrays["seen_target"].tolist() == [20, 22]  # 5 follows 10 times a sequence: not across the border
    assert float(arrays["vocab_specialisation/0/target"]) == 1
    assert arrays["top_ids/0/target"][:, 0].tolist() == [6, 5]


def test_the_ends_of_many_sequences_are_no_id():
    text = text_of([[5]] * 12 + [[6] * 12], [0] * 13, ("a",))
    arrays = vocabulary([chosen_view([0] * 12 + [1] * 12, 2, text)]).arrays
    assert arrays["ids_target"].tolist() == [6]
    assert arrays["ids_input"].tolist() == [5, 6]


def test_what_is_predicted_comes_with_the_head():
    random = torch.Generator().manual_seed(0)
    predicted = torch.randint(2, (30,), generator=random)
    one = Vocabulary()
    one.update(chosen_view(predicted, 4, TEXT, 0))
    one.update(chosen_view(torch.zeros(30, dtype=torch.long), 1, TEXT, 3))
    one.update_head(HeadView(replace(TEXT, says=lambda one: f"<{one}>"), predicted, torch.zeros(30)))
    result = one.compute()
    assert words_of(result.arrays) == {0: "<0>", 1: "<1>", 7: "<b>", 9: " $&"}
    assert float(result.arrays["vocab_specialisation/0/predicted"]) == 1
    assert float(result.arrays["vocab_specialisation/3/predicted"]) == 1  # of one expert, and so shuffled
    assert float(result.arrays["vocab_shuffled/3/predicted"]) == 1
    assert result.headlines["specialisation_predicted"].value == 1
    assert float(result.arrays["vocab_specialisation/0/input"]) < 0.8
    assert len(result.notes) == 1  # why there are no intervals
    assert result.notes[0].endswith(LARGEST)
    assert not [key for key in result.arrays if key.startswith("choice/")]


def test_choices_that_mean_nothing_are_at_the_shuffled_level():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (2000,), generator=random)
    text = text_of([ids.tolist()], [0], ("a",))
    arrays = vocabulary([chosen_view(torch.rand(2000, 8, generator=random).topk(2).indices, 8, text)]).arrays
    measured, shuffled = (float(arrays[f"vocab_{name}/0/input"]) for name in ("specialisation", "shuffled"))
    assert measured == pytest.approx(shuffled, rel=0.05)
    assert measured > 1.2 / 8  # finite counts


def test_the_page_is_escaped_and_names_ids_without_text():
    choices = [0 if one == 7 else 2 for one in IDS]
    result = vocabulary([chosen_view(choices, 3, TEXT)])
    page = Vocabulary.describe(dict(result.arrays)).pages["specialised_tokens"]()
    assert "&lt;b&gt;" in page
    assert "␣$&amp;" in page
    assert "<b>" not in page
    bare = text_of([IDS], [0], ("a",))
    assert "#7" in vocabulary([chosen_view(choices, 3, bare)]).pages["specialised_tokens"]()
    assert to_rgb(result.figures["over_depth"]()).std() > 1


def test_shares_sum_to_one_over_experts():
    random = torch.Generator().manual_seed(0)
    choices = torch.rand(30, 5, generator=random).topk(3).indices
    arrays = vocabulary([chosen_view(choices, 5, TEXT)]).arrays
    ids, shares = arrays["top_ids/0/input"], arrays["top_shares/0/input"]
    for one in (7, 9):
        assert shares[ids == one].sum() == pytest.approx(1)
        tokens = [row for row, own in enumerate(IDS) if own == one]
        count = np.bincount(choices[tokens].ravel().numpy(), minlength=5)
        assert shares[4][ids[4] == one].sum() == pytest.approx(count[4] / (3 * len(tokens)))


def test_nothing_to_say():
    for views in ([LayerView(0, 1, 0, 0, None)], [chosen_view([0, 1], 2, text_of([[1, 2]], [0], ("a",)))]):
        result = vocabulary(views)
        assert result.notes
        assert not result.figures
