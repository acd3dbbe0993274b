"""The statistics of a study, by simulation: what intervals cover, what is called, and what could have been seen."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from simulate_coverage import SHAPES, coverage, coverage_of_deviation

from moebed.study.statistics import compare, detectable, deviation_range
from probes.measures.significance import holm

ROOT = Path(__file__).resolve().parents[2]
SIMULATED = 1000
# Measured in METHODS.md: validation loss over seeds, and paired over seed and data.
SEED_DEVIATION, PAIRED_DEVIATION = 0.029, 0.012


def _pairs(rng, n, difference, seed_deviation=SEED_DEVIATION, paired_deviation=PAIRED_DEVIATION):
    """Losses of a baseline and an arm over n seeds: what a seed does to both, and what it does to each alone."""
    common = 3.97 + rng.normal(0, np.sqrt(seed_deviation**2 - paired_deviation**2 / 2), n)
    own = rng.normal(0, paired_deviation / np.sqrt(2), (2, n))
    return common + own[0] + difference, common + own[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pairs", [2, 3, 4, 8, 12])
def test_interval_covers_what_it_says(shape, pairs):
    """95 % within the error of the simulation (sd .007); of differences as skewed as an exponential, above 85 %."""
    covered = coverage(SHAPES[shape], pairs, SIMULATED)
    if shape == "normal":
        assert covered == pytest.approx(0.95, abs=0.02)
    else:
        assert 0.85 < covered < 0.97


@pytest.mark.parametrize(("arms", "shared"), [(1, 1.0), (3, 1.0), (3, 3.0)])
def test_the_interval_of_the_deviation_covers_what_it_says(arms, shared):
    """Of arms that share the baseline's runs, whether these scatter as much as the arms' or are most of what varies."""
    assert 0.92 < coverage_of_deviation(arms, 8, shared, SIMULATED) < 0.99


@pytest.mark.parametrize("pairs", [3, 4, 8])
def test_equal_arms_are_called_different_in_one_of_twenty_studies(pairs):
    rng = np.random.default_rng(10 + pairs)
    called = sum(compare(*_pairs(rng, pairs, 0.0)).called for _ in range(400))
    assert called / 400 == pytest.approx(0.05, abs=0.035)


@pytest.mark.parametrize(("pairs", "paired_deviation", "least"), [(4, 0.012, 0.97), (8, 0.029, 0.90)])
def test_a_planted_difference_of_five_hundredths_is_found(pairs, paired_deviation, least):
    """Four pairs see it at the paired deviation that was measured; where pairing gains nothing, eight do."""
    rng = np.random.default_rng(pairs)
    found = [compare(*_pairs(rng, pairs, 0.05, SEED_DEVIATION, paired_deviation)) for _ in range(200)]
    assert np.mean([one.called and one.mean > 0 for one in found]) >= least
    assert detectable(paired_deviation, pairs) < 0.05


def test_the_same_runs_twice_show_exactly_nothing():
    found = compare([3.9, 4.1, 4.0], [3.9, 4.1, 4.0])
    assert (found.mean, found.deviation, found.interval, found.p) == (0.0, 0.0, (0.0, 0.0), 1.0)
    assert not found.called


def test_one_pair_has_no_interval_and_is_never_called():
    found = compare([4.5], [4.0])
    assert found.mean == 0.5
    assert (found.interval, found.p, found.detectable, found.called) == (None, None, None, False)


@pytest.mark.parametrize("pairs", [2, 3, 4, 12])
def test_detectable_difference_is_detected_in_four_of_five(pairs):
    """Drawn, against the paired t-test of scipy."""
    from scipy import stats

    rng = np.random.default_rng(pairs)
    values = rng.normal(detectable(0.012, pairs), 0.012, (20_000, pairs))
    assert (stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.015)


def test_holm_by_hand():
    """Sorted .01, .02, .03, .04: times 4, 3, 2, 1, never falling."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_statistics_and_pictures_need_no_torch():
    modules = "moebed.study.statistics, moebed.study.comparison, moebed.study.tables, moebed.study.figures"
    code = f"import {modules}, sys; print(sorted({{'torch', 'lightning'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_interval_and_p_never_contradict_each_other(pairs):
    """An interval excludes 0 exactly where p is below .05, and Holm's p of one comparison is that p."""
    rng = np.random.default_rng(pairs)
    for _ in range(2000):
        found = compare(*_pairs(rng, pairs, 0.01))
        assert found.called == (found.p < 0.05)


def test_what_could_be_seen_has_the_range_that_few_pairs_leave():
    few, many = compare([0.0, 0.01, 0.05], [0.0, 0.0, 0.0]), compare([0.0, 0.01, 0.05] * 5, [0.0] * 15)
    for found in (few, many):
        low, high = found.detectable_range
        assert low < found.detectable < high
    assert few.detectable_range[1] / few.detectable_range[0] > 10
    assert many.detectable_range[1] / many.detectable_range[0] < 2.5


def test_the_deviations_range_covers_the_deviation():
    rng = np.random.default_rng(1)
    ends = [deviation_range(values.std(ddof=1), 3) for values in rng.normal(0, 0.5, (2000, 4))]
    assert np.mean([low <= 0.5 <= high for low, high in ends]) == pytest.approx(0.95, abs=0.015)
