"""Interventions as a person writes them."""

import pytest

from moebed.errors import ConfigError
from moebed.views.intervention_names import parse


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("mask 3 @ layer 5", "mask 3 refill @ layer 5"),
        ("mask 4, 3 zero @ layers 6,5", "mask 3,4 zero @ layers 5,6"),
        ("mask 3 drop_norm", "mask 3 drop_norm"),
        ("keep 2,0 @ layer 1", "keep 0,2 @ layer 1"),
        ("keep_top 1", "keep_top 1 zero"),
        ("drop_top 2 refill @ layer 0", "drop_top 2 refill @ layer 0"),
        ("force 1", "force 1"),
        ("shift 1,2 by -0.5 @ layer 3", "shift 1,2 by -0.5 @ layer 3"),
        ("random_set 7 temperature 0.5", "random_set 7 temperature 0.5"),
        ("swap @ layer 2", "swap @ layer 2"),
        ("identity", "identity"),
        ("mask 3 zero @ layer 5 alone", "mask 3 zero @ layer 5 alone"),
        ("swap alone", "swap alone"),
    ],
)
def test_names_are_read_back(written, name):
    assert parse(written).name == name
    assert parse(name).name == name


@pytest.mark.parametrize(
    "written",
    ["", "msk 3", "mask", "mask x", "mask 3 gone", "mask 3 @ 5", "mask 3 @ layer", "keep_top 0", "keep_top 1 refill",
     "shift 3 1.5", "shift 3 by nan", "random_set 1 temperature 0", "swap 3", "force", "identity 1"],
)  # fmt: skip
def test_what_says_nothing_is_refused(written):
    with pytest.raises(ConfigError, match="intervention"):
        parse(written)
