"""saturation along hand-made trainings."""

import numpy as np
import pytest
import torch
from routed_cases import chosen_view, text_of

from moebed.views.layer import LayerView
from probes.figures.drawing import to_rgb
from probes.saturation import MOST_PROBINGS, Saturation, overlap

TEXT = text_of([[1, 2], [3, 4]], [0, 0], ("a",))
START, MIDDLE, END = [[0, 1]] * 4, [[0, 2], [0, 2], [0, 1], [3, 2]], [[2, 0], [0, 2], [3, 1], [2, 3]]


def probed(training, text=TEXT, earlier=None, experts=4):
    """The arrays after probing these choices, by step, in turn; each probing sees what the one before stored."""
    for step, choices in training.items():
        one = Saturation()
        one.begin(step, earlier or {})
        one.update(LayerView(0, 2, 0, 0, None))
        one.update(chosen_view(choices, experts, text, 1))
        earlier = one.compute().arrays
    return earlier


def test_overlap_by_hand():
    arrays = probed({0: START, 10: MIDDLE, 40: END})
    assert arrays["steps"].tolist() == [0, 10, 40]
    assert arrays["saturation/1"] == pytest.approx([3 / 8, 7 / 8, 1])
    assert np.isnan(arrays["saturation_previous/1"][0])
    assert arrays["saturation_previous/1"][1:] == pytest.approx([4 / 8, 7 / 8])
    assert float(arrays["saturation_random/1"]) == 0.5
    assert arrays["topk_index/1"].shape == (3, 4, 2)
    assert arrays["topk_index/1"].dtype == np.int16


def test_overlap_is_that_of_the_sets():
    random = np.random.default_rng(0)
    one, other = (np.stack([random.permutation(9)[:4] for _ in range(30)]) for _ in range(2))
    wanted = np.mean([len(set(a) & set(b)) / 4 for a, b in zip(one.tolist(), other.tolist(), strict=True)])
    assert overlap(one, other) == pytest.approx(wanted)


def test_when_it_is_settled():
    result = Saturation.describe(probed({0: START, 10: MIDDLE, 40: END}))
    assert result.headlines["settled_at"].value == 0.25
    assert "from step 10 of 40 on" in result.headlines["settled_at"].sentence
    assert result.headlines["previous_to_now"].value == pytest.approx(7 / 8)
    assert to_rgb(result.figures["over_steps"]()).std() > 1
    back_and_forth = Saturation.describe(probed({0: END, 10: START, 40: END}))
    assert back_and_forth.headlines["settled_at"].value == 1
    said = back_and_forth.headlines["settled_at"].sentence
    assert said.startswith(
        "At no probing before were 80% of the experts chosen that tokens go to now; choices at random"
    )
    assert Saturation.describe(probed({0: END, 40: END})).headlines["settled_at"].value == 0


def test_a_resumed_run_drops_what_it_will_do_again():
    arrays = probed({0: START, 10: MIDDLE, 20: START, 30: START})
    again = probed({20: END}, earlier=arrays)
    assert again["steps"].tolist() == [0, 10, 20]
    assert again["saturation/1"] == pytest.approx([3 / 8, 7 / 8, 1])


@pytest.mark.parametrize("ids", [[[1, 2], [3, 5]], [[1, 2], [3]]])
def test_another_text_begins_anew(ids):
    text = text_of(ids, [0, 0], ("a",))
    arrays = probed({20: END[: len(text.token_ids)]}, text, probed({0: START, 10: MIDDLE}))
    assert arrays["steps"].tolist() == [20]
    result = Saturation.describe(arrays)
    assert "probed once" in result.notes[0]
    assert not result.headlines
    assert not result.figures


def test_the_record_is_thinned_evenly_and_keeps_its_ends():
    steps = list(range(0, 200 * 5, 5))
    arrays = probed({step: START for step in steps})
    kept = arrays["steps"]
    assert len(kept) == MOST_PROBINGS == len(arrays["saturation/1"])
    assert kept[0] == 0
    assert kept[-2:].tolist() == steps[-2:]
    assert np.diff(kept).max() <= 2 * np.median(np.diff(kept)) + 5


def test_many_choices_are_kept_fewer_times(monkeypatch):
    monkeypatch.setattr("probes.saturation.MOST_BYTES", 5 * 4 * 2 * 2)
    assert len(probed({step: START for step in range(20)})["steps"]) == 5


def test_a_layer_that_was_not_seen_before():
    arrays = probed({0: START, 10: MIDDLE})
    one = Saturation()
    one.begin(40, arrays)
    one.update(chosen_view(END, 4, TEXT, 1))
    one.update(chosen_view([0, 1, 2, 3], 6, TEXT, 3))  # of another width, too
    arrays = one.compute().arrays
    assert np.isnan(arrays["saturation/3"][:2]).all()
    assert arrays["saturation/3"][2] == 1
    result = Saturation.describe(arrays)
    assert result.headlines["settled_at"].value == 0.25
    assert all(np.isfinite(value) for value in result.scalars.values())
    assert to_rgb(result.figures["over_steps"]()).std() > 1


def test_without_begin_it_is_one_probing():
    one = Saturation()
    one.update(chosen_view(torch.tensor(START), 4, TEXT))
    assert one.compute().notes
    assert Saturation().compute().notes
