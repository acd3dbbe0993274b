"""Share of the gain: by hand, its interval, when there is none, and where a study shows it."""

import numpy as np
import pytest
from simulate_gain import coverage
from study_runs import made_up_study

from moebed.errors import ConfigError
from moebed.study.comparison import compare_arms
from moebed.study.gain import fieller, gain_share
from moebed.study.recipe import read_recipe
from moebed.study.statistics import t_interval
from moebed.study.tables import gain_rows, markdown

RANDOM = {1: 2.0, 2: 2.1, 3: 1.9, 4: 2.05}
ORACLE = {1: 1.7, 2: 1.78, 3: 1.62, 4: 1.74}
LEARNED = {1: 1.85, 2: 1.93, 3: 1.77, 4: 1.9}


def test_a_share_by_hand():
    found = gain_share(LEARNED, RANDOM, ORACLE)
    assert found.pairs == 4
    assert found.share == pytest.approx((0.15 + 0.17 + 0.13 + 0.15) / (0.3 + 0.32 + 0.28 + 0.31))
    assert found.interval[0] < found.share < found.interval[1]


def test_the_references_have_0_and_1_by_construction():
    for arm, share in ((RANDOM, 0), (ORACLE, 1)):
        found = gain_share(arm, RANDOM, ORACLE)
        assert (found.share, *found.interval) == pytest.approx((share, share, share), abs=1e-6)


def test_a_ratio_is_in_the_interval_where_a_t_test_does_not_refuse_it():
    """Fieller's interval is all r with which over − r · under may have mean 0."""
    rng = np.random.default_rng(0)
    under, over = rng.normal(1, 0.2, 5), rng.normal(0.5, 0.2, 5)
    low, high = fieller(over, under)
    for ratio in np.linspace(-1, 2, 601):
        ends = t_interval(over - ratio * under)
        assert (ends[0] <= 0 <= ends[1]) == (low <= ratio <= high)


@pytest.mark.parametrize(
    ("oracle", "why"),
    [
        (RANDOM, "is not told from 0: nothing to share"),
        ({1: 2.1, 2: 1.9, 3: 2.0, 4: 2.1}, "is not told from 0"),
        ({seed: loss + 0.3 for seed, loss in RANDOM.items()}, "is below 0"),
    ],
)
def test_where_the_oracle_gains_nothing_there_is_no_share(oracle, why):
    found = gain_share(LEARNED, RANDOM, oracle)
    assert found.share is found.interval is None
    assert why in found.why


def test_seeds_that_are_not_finished_in_all_three_are_left_out():
    assert gain_share(LEARNED, {1: 2.0, 3: 1.9}, ORACLE).pairs == 2
    one = gain_share(LEARNED, {1: 2.0}, ORACLE)
    assert (one.share, one.interval) == (pytest.approx(0.5), None)
    assert gain_share(LEARNED, {9: 2.0}, ORACLE).share is None


@pytest.mark.parametrize("seeds", [3, 8])
def test_the_interval_holds_95_percent(seeds):
    held, drawn, given = coverage(0.5, seeds, 0.02, 600)
    assert given > 0.99
    assert 0.93 <= held <= 0.97
    assert drawn < held  # which is why it is not the bootstrap's


@pytest.fixture
def study():
    by_arm = {"random": RANDOM, "learned": LEARNED, "oracle": ORACLE}
    made = made_up_study({name: list(losses.values()) for name, losses in by_arm.items()})
    return made | {"gain": {"random": "random", "oracle": "oracle"}}


def test_a_study_shows_shares_and_nats_over_the_floor(study):
    for run in study["arms"]["learned"]["runs"].values():
        run["over_floor"] = 0.25
    found = compare_arms(study)
    expected = gain_share(LEARNED, RANDOM, ORACLE)
    assert found.arms["learned"].gain.share == pytest.approx(expected.share)
    columns, rows = gain_rows(found)
    assert columns == ["arm", "nats over the floor", "share of the gain [95 %]"]
    assert rows[1] == [
        "learned",
        "0.2500",
        f"{expected.share:.3f} [{expected.interval[0]:.3f}, {expected.interval[1]:.3f}]",
    ]
    assert [rows[0][2], rows[2][2]] == ["0.000 [0.000, 0.000]", "1.000 [1.000, 1.000]"]
    assert "## What routing gains" in markdown(found)


def test_a_study_without_references_or_floor_says_nothing_of_them(study):
    del study["gain"]
    found = compare_arms(study)
    assert gain_rows(found)[1] == []
    assert "## What routing gains" not in markdown(found)


@pytest.mark.parametrize("gain", [{"random": "a"}, {"random": "a", "oracle": "c"}, {"random": "a", "oracle": "a"}])
def test_references_are_two_arms(gain, tmp_path):
    (tmp_path / "base.yaml").write_text("{}", encoding="utf-8")
    path = tmp_path / "try.yaml"
    path.write_text(f"{{base: base.yaml, arms: {{a: {{}}, b: {{}}}}, seeds: [1], gain: {gain}}}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"try.yaml: gain is .*; name two arms, such as {random: a, oracle: b}"):
        read_recipe(path)
