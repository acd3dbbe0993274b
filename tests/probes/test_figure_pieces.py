"""Pieces that pictures are drawn with."""

import numpy as np
import pytest

from probes.figures.drawing import (
    cell_text,
    colour_bar,
    heat_map,
    new_figure,
    ratio_norm,
    similarity_grid,
    style_axes,
    to_rgb,
)
from probes.figures.pictures import draw_depth


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.089, "0.089"), (-0.5, "-0.5"), (4.83, "4.8"), (99.6, "100"), (158, "160"), (1660, "1700"),
     (9_960, "10k"), (45_300, "45k"), (2.3e6, "2e+06")],
)  # fmt: skip
def test_a_cells_value_is_in_two_digits_and_short(value, text):
    assert cell_text(value) == text
    assert len(text) <= 5


def test_one_ratio_of_thousands_leaves_the_others_their_colours():
    values = [np.array([[0.5, 1.0, 3.0, 45_000.0]])]
    assert ratio_norm(values).vmax == 45_000
    norm = ratio_norm(values, most=10.0)
    assert (norm.vmin, norm.vcenter, norm.vmax) == (0, 1, 10)
    assert float(norm(3.0)) > 0.6


def test_a_title_takes_as_many_lines_as_it_needs():
    for width in (6.5, 7.1, 12.0):
        figure = new_figure(width, 3.0, "Distance of the subspaces that matrices use most, each layer on its own scale")
        to_rgb(figure)
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
    assert "\n" not in figure.get_suptitle()
    assert new_figure(12.0, 3.0, "One line\nand another").get_suptitle().count("\n") == 1


def test_lines_over_depth_stand_beside_what_means_something_alone():
    """Where 0 is no rank and no distance of what is unrelated, no line says that it is."""
    values = {"up": {0: 57.1, 1: 57.3}}
    (ax,) = draw_depth(values, "Effective rank", "rank", {}).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["up"]
    assert ax.get_ylim()[0] > 50
    (ax,) = draw_depth(values, "Cosine", "cosine").axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["up", "0, unrelated"]


@pytest.mark.parametrize("most", [1.3, 4.0, 80.0])
def test_the_bar_of_ratios_says_where_neutral_is(most):
    values = np.array([[0.0, 1.0, most]])
    fig = new_figure(5, 3, "Ratios")
    ax = fig.subplots()
    colour_bar(fig, heat_map(ax, values, "RdBu_r", norm=ratio_norm([values])), ax, "ratio")
    to_rgb(fig)
    said = [text.get_text() for text in fig.axes[1].get_yticklabels()]
    assert said[:3] == ["0", "0.5", "1"]
    assert 4 <= len(said) <= 8


def test_a_tick_says_its_whole_number():
    fig = new_figure(5, 3, "Nearly the same")
    ax = fig.subplots()
    style_axes(ax)
    ax.plot([0, 1], [0.50002, 0.49992])
    to_rgb(fig)
    assert ax.yaxis.get_offset_text().get_text() == ""
    assert all(text.get_text().startswith(("0.5", "0.49")) for text in ax.get_yticklabels())


@pytest.mark.parametrize("value", [1.0, 0.0, -0.2])
def test_what_is_alike_up_to_rounding_has_one_colour_and_readable_ticks(value):
    values = value + 1e-8 * np.arange(9.0).reshape(3, 3)
    fig = similarity_grid({"up": {0: values}}, "Alike")
    to_rgb(fig)
    (image,) = fig.axes[0].images
    assert np.ptp(image.norm(values)) < 1e-3
    assert fig.axes[1].yaxis.get_offset_text().get_text() == ""
