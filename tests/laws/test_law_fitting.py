"""Planted laws are found again from their runs: predictions and optima; constants where nothing scatters."""

import numpy as np
import pytest
from planted import EXPERTS, GRIDS, PLANTED, YUN, grid, problem, top2

from moebed.errors import UserError
from moebed.laws.choices import COSTS, bounded_loss, budget_for_loss, optimum
from moebed.laws.contract import Shape
from moebed.laws.fitting import Problem, bootstrap, check, fit, huber, interval, leave_largest_out, refine
from moebed.laws.registry import LAWS

BEYOND = grid(N=[2 * 679e6, 4 * 679e6], tok=[4e10, 1e11], E=EXPERTS)  # 2 to 4 times N, 2 to 5 times the tokens


def _error(form, constants, columns):
    return np.abs(LAWS[form].log_target(constants, columns) - LAWS[form].log_target(PLANTED[form], columns)).max()


@pytest.fixture(scope="module")
def exact():
    return fit(problem("yun", fixed=True), 0)


@pytest.fixture(scope="module")
def noisy():
    return fit(problem("yun", sigma=0.004), 0)


@pytest.mark.parametrize("form", LAWS)
def test_slopes_are_those_of_small_differences(form):
    law = LAWS[form]
    planted = Problem(
        law, {**GRIDS[form], law.target: np.full(len(GRIDS[form]["G" if form == "leverage" else "N"]), 2.0)}
    )
    vector = law.pack(PLANTED[form])
    residuals, slopes = planted.linearised(vector[None])
    assert residuals[0] == pytest.approx(planted.residuals(vector), abs=1e-14)
    steps = 1e-6 * np.eye(len(vector))
    differences = (planted.residuals(vector + steps) - planted.residuals(vector - steps)) / 2e-6
    assert slopes[0] == pytest.approx(differences, rel=1e-5, abs=1e-7)


def test_5_1_constants_are_found_where_nothing_scatters(exact):
    found = exact.constants
    assert all(found[name] == pytest.approx(value, rel=0.06 if name == "d" else 0.04) for name, value in YUN.items())
    assert _error("yun", found, BEYOND) < 3e-4


def test_5_1_predictions_are_found_where_the_saturation_is_free():
    found = fit(problem("yun"), 0).constants
    assert _error("yun", found, BEYOND) < 2e-3
    assert _error("yun", found, GRIDS["yun"]) < 1e-3


def test_5_1_optima_and_claims_follow_from_a_fit(exact):
    law, budget = LAWS["yun"], 2.12e21
    four = optimum(law, exact.constants, budget, top2(4))
    assert four.size[0] == pytest.approx(2.85e9, rel=0.01)
    assert four.loss[0] == pytest.approx(2.3142, abs=1e-3)
    assert budget_for_loss(law, exact.constants, top2(16), four.loss)[0] / budget == pytest.approx(0.393, abs=0.004)
    costs = [bounded_loss(law, exact.constants, budget, top2(4), top2(e), COSTS["total"])[0] for e in (8, 16, 32)]
    assert costs == pytest.approx([0.486, 0.564, 0.810], abs=0.01)


def test_5_1_noise_of_a_seed_hides_constants_but_not_predictions(noisy):
    found = noisy.constants
    assert _error("yun", found, BEYOND) < 0.02
    assert _error("yun", found, GRIDS["yun"]) < 0.01
    assert abs(found["E_max"] / YUN["E_max"] - 1) > 0.5  # nobody should read it


def test_5_1_intervals_tell_which_constants_to_believe(noisy):
    """Of 60 resamples: predictions within the runs are sure to 1 %, and the constants span factors."""
    law = LAWS["yun"]
    draws = law.unpack(bootstrap(noisy, 60, 0))
    place = {"N": np.array([3e8]), "tok": 1e10, "E": 8.0}
    low, high = interval(law.predict(draws, **place)[:, 0])
    assert low < law.predict(YUN, **place)[0] < high
    assert high / low - 1 < 0.01
    ends = interval(draws["E_max"][:, 0])
    assert ends[1] / ends[0] > 10


@pytest.mark.parametrize(("sigma", "within"), [(0.0, 1e-3), (0.004, 0.008)])
def test_5_2_predictions_and_optima_of_72_runs(sigma, within):
    law = LAWS["joint"]
    found = fit(problem("joint", sigma, fixed=True), 0).constants
    assert _error("joint", found, GRIDS["joint"]) < within
    for experts in (1, 32):
        best, planted = (optimum(law, constants, 1e20, Shape(experts)) for constants in (found, law.published))
        assert best.loss[0] == pytest.approx(planted.loss[0], rel=within)
        assert best.size[0] == pytest.approx(planted.size[0], rel=0.25 if sigma else 1e-3)


@pytest.mark.parametrize("form", ["krajewski", "abnar", "leverage"])
def test_5_3_to_5_5_predictions_are_found_again(form):
    found = fit(problem(form), 0).constants
    assert _error(form, found, GRIDS[form]) < 1e-4


def test_huber_is_a_square_then_as_steep_as_there():
    values = huber(np.array([-3.0, -0.5, 0.0, 1.0, 2.0]), 1.0)
    assert values.tolist() == [2.5, 0.125, 0.0, 0.5, 1.5]


def test_one_run_gone_wrong_does_not_carry_the_fit():
    wrong = problem("joint", fixed=True)
    wrong.columns["loss"][17] *= 1.2
    found = refine(wrong, wrong.law.pack(PLANTED["joint"])[wrong.free][None], np.ones((1, 72)))
    assert _error("joint", wrong.law.unpack(wrong.whole(found[0])), GRIDS["joint"]) < 0.003  # .034 by least squares


def test_a_weight_of_nothing_leaves_a_run_out():
    noisy = problem("joint", 0.004, fixed=True)
    start = noisy.law.pack(PLANTED["joint"])[noisy.free][None]
    kept = np.arange(72) % 9 != 4
    fewer = Problem(noisy.law, {name: column[kept] for name, column in noisy.columns.items()}, noisy.fixed)
    weighted = refine(noisy, start.copy(), kept[None].astype(float))
    without = refine(fewer, start.copy(), np.ones((1, kept.sum())))
    places = [noisy.law.predict(noisy.law.unpack(noisy.whole(one[0])), **GRIDS["joint"]) for one in (weighted, without)]
    assert places[0] == pytest.approx(places[1], rel=1e-5)


def test_the_largest_runs_are_predicted_without_them():
    planted = problem("leverage", sigma=0.02, seed=3)
    order = planted.columns["flops"]
    left = leave_largest_out(planted, order, 0)
    assert left.runs == 12  # all of the largest budget
    assert abs(left.mean) <= left.rms <= left.worst < 0.15
    assert (
        leave_largest_out(Problem(planted.law, {k: v[:11] for k, v in planted.columns.items()}), order[:11], 0) is None
    )


def test_a_fit_is_the_same_again():
    first, second = (fit(problem("leverage", 0.02), 0) for _ in range(2))
    assert np.array_equal(first.free, second.free)
    assert np.array_equal(bootstrap(first, 40, 1), bootstrap(second, 40, 1))


def test_an_interval_of_what_is_seldom_defined_is_none():
    assert interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((1.05, 2.95))
    assert interval(np.array([1.0, np.nan, 3.0])) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {k: v[:15] for k, v in c.items()}, ("15 runs", "11 constants", "at least 16")),
        (lambda c: {**c, "E": np.full(72, 8.0)}, ("E is the same in all 72 runs",)),
        (lambda c: {**c, "E": np.full(72, 8.0), "N": np.full(72, 1e9)}, ("N, E are the same",)),
        (
            lambda c: {k: np.tile(v[[0, 13, 26, 40, 51, 60, 67, 71]], 9) for k, v in c.items()},
            ("72 runs, but only 8 that differ in N, tok, E",),
        ),
    ],
)
def test_5_6_a_table_that_cannot_tell_is_refused(change, words):
    columns = change(problem("joint").columns)
    with pytest.raises(UserError) as error:
        check(LAWS["joint"], columns, {}, "table.csv")
    assert all(word in str(error.value) for word in words)
