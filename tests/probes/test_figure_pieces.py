"""Pieces that pictures are drawn with."""

import numpy as np
import pytest

from probes.figures.drawing import cell_text, ratio_norm


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
