"""Coloured tokens as page and picture; the batch-wise violation of balance."""

import numpy as np
import pytest
from probe_cases import probe
from routed_cases import chosen_view, text_of

from probes.figures.coloured_tokens import _pieces, expert_colours
from probes.figures.drawing import to_rgb
from probes.routing import RoutingMap

WORDS = ("<script>", "a&b", "\n", "日本", " $x$", "\x07", "end")
TEXT = text_of([[10, 11, 12, 13], [14, 15, 16]], [0, 1], ("code", "<prose>"), WORDS)
CHOICES = [[0, 1], [1, 2], [2, 0], [0, 1], [1, 0], [2, 1], [0, 2]]


def routing(text, unsorted=False):
    return probe([chosen_view(CHOICES, 3, text, 1, unsorted)], "routing")["routing"]


def test_the_page_colours_by_first_choice_and_tells_the_weights():
    result = routing(TEXT, unsorted=True)
    assert result.arrays["token_text"].tolist() == list(WORDS)
    page = RoutingMap.describe(dict(result.arrays)).pages["coloured_tokens"]()
    assert "<script>" not in page
    assert '<span class="e3-0" title="experts 0 (1.00), 1 (0.50)">&lt;script&gt;</span>' in page
    assert '<span class="e3-1" title="experts 1 (1.00), 2 (0.50)">a&amp;b</span>' in page
    assert "⏎\n" in page
    assert "&lt;prose&gt;" in page
    assert "\x07" not in page
    for expert, colour in enumerate(expert_colours(3)):
        assert f".e3-{expert}{{background:{colour}" in page


def test_without_text_ids_are_shown():
    result = routing(text_of([[10, 11, 12, 13], [14, 15, 16]], [0, 1], ("code", "prose")))
    assert "token_text" not in result.arrays
    assert ">14 </span>" in result.pages["coloured_tokens"]()
    assert to_rgb(result.figures["coloured_tokens"]()).std() > 1


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_picture_draws_any_text():
    assert to_rgb(routing(TEXT).figures["coloured_tokens"]()).std() > 1


def test_a_long_word_and_line_ends_are_cut():
    assert _pieces("a\n\nb") == ["a", "\n", "\n", "b"]
    assert [len(piece) for piece in _pieces("x" * 150)] == [62, 62, 26]
    assert _pieces("") == []


def test_long_texts_are_cut():
    text = text_of([[1] * 2000], [0], ("a",), ("w",) * 2000)
    result = probe([chosen_view(np.zeros(2000, int), 2, text)], "routing")["routing"]
    assert result.pages["coloured_tokens"]().count("title=") == 200


@pytest.mark.parametrize("experts", [1, 8, 64, 256])
def test_every_expert_has_a_light_colour_of_its_own(experts):
    colours = expert_colours(experts)
    assert len(colours) == experts
    assert len(set(colours)) > 0.9 * experts
    for colour in colours:
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        assert 0.3 * red + 0.59 * green + 0.11 * blue > 110


def test_batch_violation_is_of_each_sequence():
    text = text_of([[1, 2], [], [3, 4], [5]], [0, 0, 0, 0], ("a",))
    arrays = probe([chosen_view([0, 0, 1, 1, 0], 2, text)], "balance")["balance"].arrays
    assert float(arrays["max_violation_batch/0"]) == 1  # each sequence goes to one expert
    assert float(arrays["max_violation/0"]) == pytest.approx(3 / 2.5 - 1)
    even = probe([chosen_view([0, 1, 1, 0, 1], 2, text)], "balance")["balance"]
    assert float(even.arrays["max_violation_batch/0"]) == pytest.approx(1 / 3)
    assert even.scalars["max_violation_batch/layer_00"] == pytest.approx(1 / 3)
    assert "max_violation_batch/0" not in probe([chosen_view([0, 1], 2)], "balance")["balance"].arrays
