"""What ``tests.golden`` writes is the same twice, and a difference in it is found."""

import copy

import pytest

from tests.golden import FITTED, PROBED, compare, write


def assert_same_twice(names):
    before = write(names)
    assert set(before) == set(names)
    assert not compare(before, write(names))
    return before


@pytest.mark.shared("oracles")
def test_two_writes_in_a_row_are_equal():
    before = assert_same_twice(("tiny_dense", "mistral"))
    assert "train/loss@19" in before["tiny_dense"]
    after = copy.deepcopy(before)
    after["tiny_dense"]["train/loss@19"] *= 1 + 2**-23
    (line,) = compare(before, after)
    assert line.startswith("tiny_dense: train/loss@19: ")


@pytest.mark.slow
@pytest.mark.shared("oracles")
def test_two_writes_of_everything_are_equal():
    assert_same_twice(FITTED + PROBED)
