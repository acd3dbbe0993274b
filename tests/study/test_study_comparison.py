"""What a comparison is made of, by hand: which runs, which numbers, which words; a branch at a time."""

import dataclasses

import numpy as np
import pytest
from study_runs import made_up_study

from moebed.study.comparison import ArmResult, compare_arms, power, verdict
from moebed.study.statistics import compare, deviation_range, pairs_needed, pooled_freedom

BASE = [4.0, 4.1, 3.9, 4.05]


def _runs(study, arm):
    return study["arms"][arm]["runs"]


def _without(study, arm, *seeds):
    for seed in seeds:
        _runs(study, arm)[str(seed)].update(status="not run", why="", loss=None)


def _arm(arm, baseline):
    return ArmResult("new", "", [], None, None, None, None, {}, compare(arm, baseline))


def test_the_baseline_is_first_wherever_the_file_has_it():
    found = compare_arms(made_up_study({"a": BASE, "b": BASE, "c": BASE}, baseline="b"))
    assert list(found.arms) == ["b", "a", "c"]
    assert [arm.difference is None for arm in found.arms.values()] == [True, False, False]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("total_parameters", "total parameters"),
        ("active_parameters", "active parameters"),
        ("active_flops_per_token", "active FLOPs per token"),
    ],
)
@pytest.mark.parametrize(("ratio", "said"), [(0.5, "0.5"), (0.75, None), (1.25, None), (1.375, "1.38")])
def test_a_size_is_marked_where_it_differs_by_more_than_the_tolerance(key, words, ratio, said):
    study = made_up_study({"base": BASE, "other": BASE}, tolerance=0.25)
    study["arms"]["other"][key] *= ratio
    wanted = [] if said is None else [f"has {said} times the baseline's {words}"]
    assert compare_arms(study).arms["other"].marks == wanted


def test_an_arms_numbers_are_those_of_its_finished_seeds_in_order():
    study = made_up_study({"base": [1.0, 2.0, 4.0], "other": [1.0, 2.0, 4.0]})
    runs = _runs(study, "other")
    for seed, bits, speed in ((1, 0.5, 300.0), (2, 0.75, 500.0), (3, 1.5, 0.0)):
        runs[str(seed)].update(bits_per_byte=bits, tokens_per_second=speed)
    study["arms"]["other"]["runs"] = {seed: runs[seed] for seed in "312"}
    arm = compare_arms(study).arms["other"]
    assert arm.finished == [1, 2, 3]
    assert (arm.loss, arm.bits_per_byte, arm.tokens_per_second) == pytest.approx((7 / 3, 2.75 / 3, 800 / 3))
    assert arm.loss_deviation == pytest.approx(np.sqrt((16 + 1 + 25) / 9 / 2))
    assert arm.facts == {key: value for key, value in study["arms"]["other"].items() if key != "runs"}
    _without(study, "other", 3)
    assert compare_arms(study).arms["other"].loss_deviation == pytest.approx(np.sqrt(0.5))
    _without(study, "other", 2)
    arm = compare_arms(study).arms["other"]
    assert (arm.loss, arm.loss_deviation) == (1.0, None)
    assert arm.marks == ["seed 3 not run", "seed 2 not run", "1 of 3 pairs: without seeds 2, 3"]
    _runs(study, "other")["1"].update(status="failed", why="no space")
    found = compare_arms(study)
    assert found.arms["other"].marks[1] == "seed 1 FAILED: no space"
    assert found.arms["other"].marks[-1] == "0 of 3 pairs: without seeds 1, 2, 3"
    assert found.warnings == [
        "LEFT OUT of every mean and difference: other, seed 3: not run; other, seed 1: failed; other, seed 2: not run."
    ]


def test_settings_are_said_by_their_short_names_after_the_steps_before():
    study = made_up_study({"base": BASE, "other": BASE, "plain": BASE})
    study["arms"]["other"] |= {
        "steps_before": [["fit", {"trainer.max_steps": 5, "model.config.num_experts": 4}], ["upcycle", {"seed": 1}]],
        "settings": {"model.learning_rate": 0.1, "data.seed": 2},
    }
    study["arms"]["plain"] |= {"steps_before": [["fit", {}]], "settings": {}}
    arms = compare_arms(study).arms
    assert arms["base"].settings == "the base recipe"
    wanted = "fit max_steps 5, num_experts 4; then upcycle seed 1; then learning_rate 0.1, data.seed 2"
    assert arms["other"].settings == wanted
    assert arms["plain"].settings == "fit ; then the base recipe"


@pytest.mark.parametrize(("loss", "marked"), [(7.599, False), (7.6, True)])
def test_a_run_has_learned_something_where_its_loss_is_below_guessing(loss, marked):
    study = made_up_study({"base": [4.0, 4.0], "other": [4.0, loss]})
    found = compare_arms(study).arms["other"].marks
    assert found == ["seed 2 NO BETTER THAN GUESSING, whose loss is 7.600"] * marked
    for run in _runs(study, "other").values():
        del run["guessing_loss"]  # a file of an earlier version
    assert compare_arms(study).arms["other"].marks == []


def test_steps_are_those_that_every_pairs_two_runs_have():
    study = made_up_study({"base": BASE, "other": [loss + 0.5 for loss in BASE]})
    _runs(study, "base")["2"]["curve"]["loss"][0] = None
    _runs(study, "other")["3"]["loss"] = None  # its last validation was not finite: it is in no pair, nor its curve
    _runs(study, "other")["3"]["curve"]["loss"] = [None, 9.0, None]
    found = compare_arms(study).arms["other"].by_step
    assert list(found) == [200, 300]
    assert [(one.pairs, one.mean) for one in found.values()] == [(3, pytest.approx(0.5))] * 2


def test_headlines_are_the_last_probings_and_each_that_any_run_has():
    study = made_up_study({"base": [4.0, 4.1], "other": [4.0, 4.1], "last": [4.0, 4.1]})
    every = [f"probe/{name}" for name in "edcba"]
    for arm in study["arms"]:
        for seed, run in _runs(study, arm).items():
            run["headlines"] = {key: {"step": [1, 2], "value": [9.0, 2.0 * int(seed)]} for key in every}
            run["domains"] = {"a": 1.0, "b": None}
    _runs(study, "other")["2"]["headlines"][every[0]]["value"][-1] = 0.0
    _runs(study, "last")["2"]["headlines"]["own/alone"] = {"step": [1], "value": [3.0]}
    del _runs(study, "last")["1"]["domains"], _runs(study, "last")["2"]["domains"]["a"]
    found = compare_arms(study)
    assert list(found.headlines) == [*every, "own/alone"]
    first = found.headlines[every[0]]
    assert {name: result.mean for name, result in first.items()} == {"base": 3.0, "other": 1.0, "last": 3.0}
    assert first["base"].difference is None
    assert first["other"].difference.mean == -2.0
    reach = 12.706 * np.sqrt(2) / np.sqrt(2)  # t of one degree of freedom, of the values 2 and 4
    assert first["base"].interval == pytest.approx((3 - reach, 3 + reach), rel=1e-4)
    (alone,) = found.headlines["own/alone"].items()
    assert alone[0] == "last"
    assert dataclasses.astuple(alone[1]) == (3.0, None, None)
    assert found.domains == {}  # "b" is no run's
    _runs(study, "base")["1"]["domains"]["b"] = 0.5
    assert {key: set(by_arm) for key, by_arm in compare_arms(study).domains.items()} == {
        "a": {"base", "other"},
        "b": {"base"},
    }


def test_a_headline_is_a_mean():
    study = made_up_study({"base": [4.0, 4.1, 4.2]})
    for run, value in zip(_runs(study, "base").values(), (0.0, 0.0, 3.0), strict=True):
        run["headlines"] = {"own/alone": {"step": [1], "value": [value]}}
    assert compare_arms(study).headlines["own/alone"]["base"].mean == 1.0


def test_what_holds_for_the_whole_study_is_said_where_it_holds():
    two = compare_arms(made_up_study({"base": BASE[:2], "other": [4.0, 4.2]}))
    assert two.warnings == []
    four = compare_arms(made_up_study({"base": BASE, **{name: [4.0, 4.2, 4.0, 4.1] for name in "abc"}}))
    (warning,) = four.warnings
    assert warning.startswith(
        "3 comparisons: if no arm differed, the interval of at least one would exclude 0 in up to 14 %"
    )


def _likely(pooled, freedom):
    low, high = deviation_range(pooled, freedom)
    return f"pooled {pooled:.4f} (95 % interval {low:.4f} to {high:.4f})"


def test_an_arm_that_is_the_baseline_tells_nothing_of_how_far_apart_pairs_lie():
    losses = {"base": BASE, "other": [4.0, 4.15, 3.95, 4.0]}
    sentence = power(compare_arms(made_up_study(losses)))
    assert sentence == power(compare_arms(made_up_study({**losses, "same": BASE})))
    differences = np.subtract(losses["other"], BASE)
    assert (
        f"standard deviations of {differences.std(ddof=1):.4f} nats, {_likely(differences.std(ddof=1), 3)}" in sentence
    )
    correlation = np.corrcoef(losses["other"], BASE)[0, 1]
    assert f" Losses of a seed correlate with the baseline's at {correlation:+.2f}. Over" in sentence


@pytest.mark.parametrize("losses", [[4.0, 4.2], [4.2, 4.2, 4.2, 4.2]], ids=["two pairs", "no spread"])
def test_a_correlation_that_means_nothing_is_not_said(losses):
    assert "correlate" not in power(compare_arms(made_up_study({"base": BASE[: len(losses)], "other": losses})))


def test_three_pairs_have_a_correlation_and_all_deviations_a_range():
    losses = {"base": BASE[:3], "near": [4.01, 4.1, 3.9], "far": [4.3, 4.0, 3.9]}
    sentence = power(compare_arms(made_up_study(losses)))
    assert "standard deviations of 0.0058 to 0.2082 nats" in sentence
    assert "at +0.24 to +1.00." in sentence


@pytest.mark.parametrize(
    ("near", "far", "freedom"),
    [
        ((1, 2, 3), (2, 3, 4), None),  # two seeds that all have: of their covariance
        ((1, 2), (2, 3), 1),
        ((1, 2, 3), (4, 5), 2),  # none: of the arm that has most pairs
    ],
)
def test_freedom_is_of_the_seeds_that_every_arm_has_or_of_most_pairs(near, far, freedom):
    base = np.array([4.0, 4.1, 3.9, 4.05, 3.95])
    losses = {"near": base + np.array([0.0, 0.1, 0.05, 0.2, 0.1]), "far": base + np.array([0.3, 0.1, 0.2, 0.0, 0.15])}
    study = made_up_study({"base": base.tolist(), **{name: values.tolist() for name, values in losses.items()}})
    pairs = {"near": near, "far": far}
    for name, seeds in pairs.items():
        _without(study, name, *({1, 2, 3, 4, 5} - set(seeds)))
    of = {name: (losses[name] - base)[np.array(seeds) - 1] for name, seeds in pairs.items()}
    if freedom is None:
        freedom = pooled_freedom(np.array([(losses[name] - base)[1:3] for name in pairs]))
    pooled = np.sqrt(np.mean([values.var(ddof=1) for values in of.values()]))
    assert _likely(pooled, freedom) in power(compare_arms(study))


@pytest.mark.parametrize("spread", [1e-4, 0.02, 1.0])
def test_what_more_pairs_would_see_is_said_of_four_differences(spread):
    differences = np.array([0.0, spread, -spread, spread])
    sentence = power(compare_arms(made_up_study({"base": BASE, "other": (BASE + differences).tolist()})))
    said = []
    for wanted in (0.05, 0.03, 0.02, 0.01):
        needed = [pairs_needed(deviation, wanted) for deviation in deviation_range(differences.std(ddof=1), 3)]
        ends = ["more than 200" if pairs is None else str(pairs) for pairs in needed]
        said.append(f"{wanted} nats {' to '.join(dict.fromkeys(ends))}")
    assert sentence.endswith(f"takes pairs: {', '.join(said)}.")


def test_a_verdict_has_the_sign_and_the_certainty_of_its_pairs():
    said = {
        "new: equal to old in every one of 3 pairs; no difference.": ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        "new: a higher loss than old (+0.5000 nats, 95 % interval [+0.5000, +0.5000], 3 pairs).": (
            [2.0] * 3,
            [1.5] * 3,
        ),
        "new: a lower loss than old (-0.5000 nats, 95 % interval [-0.5000, -0.5000], 2 pairs).": ([1.0] * 2, [1.5] * 2),
        "new: -0.5000 nats from old in one pair; no interval, nothing can be concluded.": ([1.0], [1.5]),
    }
    for sentence, pairs in said.items():
        assert verdict(_arm(*pairs), "old") == sentence
    arm = _arm([1.0, 2.0, 3.0], [1.5, 1.5, 3.0])  # a mean of 0, of pairs that are not equal
    low, high = arm.difference.detectable_range
    assert verdict(arm, "old").startswith("new: no difference from old was found (+0.0000 nats")
    assert f"such studies ({low:.4f} to {high:.4f}, as" in verdict(arm, "old")


@pytest.mark.parametrize(("holm", "doubted"), [(None, False), (0.04, False), (0.05, False), (0.06, True)])
def test_a_call_is_doubted_where_holms_p_is_above_one_in_twenty(holm, doubted):
    arm = dataclasses.replace(_arm([2.0, 2.0, 2.1], [1.0, 1.0, 1.0]), holm=holm)
    assert ("may still be chance" in verdict(arm, "old")) is doubted
