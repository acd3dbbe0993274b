"""From study.json alone: what is said, tables, pictures, report; and that nothing bad is averaged in silence."""

import json

import numpy as np
import pytest
from study_runs import made_up_study

from moebed.cli import main
from moebed.study.comparison import compare_arms, power, verdict
from moebed.study.figures import _band, draw_all, draw_differences, draw_headlines
from moebed.study.statistics import detectable, deviation_range
from moebed.study.tables import arm_rows, headline_differences, headline_note, markdown, verdicts
from probes.figures import drawing
from probes.figures.drawing import to_rgb
from probes.report.units import unit_of

LOSSES = {
    "topk": [3.97, 4.01, 3.95, 3.99],
    "worse": [4.02, 4.065, 3.995, 4.045],
    "alike": [3.96, 4.02, 3.955, 3.985],
}


def test_means_differences_and_verdicts():
    found = compare_arms(made_up_study(LOSSES))
    assert list(found.arms) == ["topk", "worse", "alike"]
    worse = found.arms["worse"]
    assert worse.loss == pytest.approx(np.mean(LOSSES["worse"]))
    assert worse.bits_per_byte == pytest.approx(np.mean(LOSSES["worse"]) / 2)
    assert worse.difference.mean == pytest.approx(np.mean(LOSSES["worse"]) - np.mean(LOSSES["topk"]))
    assert worse.difference.called
    assert worse.holm == pytest.approx(2 * worse.difference.p)
    sentences = verdicts(found)
    assert sentences[0].startswith("worse: a higher loss than topk (+0.0512 nats, 95 % interval [+0.0")
    assert sentences[1].startswith("alike: no difference from topk was found")
    assert f"one below {found.arms['alike'].difference.detectable:.4f} would" in sentences[1]
    assert any("2 comparisons" in warning for warning in found.warnings)


def test_a_result_that_one_comparison_in_many_gives_by_chance_says_so():
    rng = np.random.default_rng(0)
    base = [4.0, 4.1, 4.05, 3.95]
    arms = {f"arm{i}": (np.array(base) + rng.normal(0, 0.01, 4)).tolist() for i in range(9)}
    found = compare_arms(made_up_study({"topk": base, "lucky": [3.99, 4.08, 4.04, 3.935], **arms}))
    lucky = found.arms["lucky"]
    assert lucky.difference.called
    assert lucky.holm > 0.05
    assert "may still be chance (Holm's p" in verdict(lucky, "topk")


def test_the_difference_over_training_is_that_of_each_validation():
    study = made_up_study(LOSSES)
    study["arms"]["worse"]["runs"]["2"]["curve"]["loss"][1] = None  # a validation whose loss was not finite
    found = compare_arms(study)
    worse, alike = found.arms["worse"].by_step, found.arms["alike"].by_step
    assert (list(worse), list(alike)) == ([100, 300], [100, 200, 300])
    assert worse[300] == found.arms["worse"].difference
    assert worse[100].mean == pytest.approx(worse[300].mean)
    text = markdown(found)
    assert "| arm | step 100 | step 300 |" in text
    low, high = worse[300].interval
    cell = f"+0.051 [{low:+.3f}, {high:+.3f}] *; sees {worse[300].detectable:.3f}"
    assert f"| worse | {cell} | {cell} |" in text
    for arm in study["arms"].values():
        for run in arm["runs"].values():
            run["curve"] = {"step": list(range(10, 120, 10)), "loss": [run["loss"]] * 11, "bits_per_byte": [1.0] * 11}
    steps = "| arm | step 10 | step 30 | step 50 | step 70 | step 90 | step 110 |"
    assert steps in markdown(compare_arms(study))


def test_what_more_pairs_would_see():
    """Deviations of the differences are .0024 and .0063; their mean square's root, and what it takes, by hand."""
    found = compare_arms(made_up_study(LOSSES))
    differences = [np.subtract(LOSSES[arm], LOSSES["topk"]) for arm in ("worse", "alike")]
    pooled = np.sqrt(np.mean([values.var(ddof=1) for values in differences]))
    covariance = np.cov(differences)
    freedom = (len(LOSSES["topk"]) - 1) * np.trace(covariance) ** 2 / (covariance**2).sum()
    assert 1 < freedom / (len(LOSSES["topk"]) - 1) < 2  # two arms that share the baseline's runs
    ends = deviation_range(pooled, freedom)
    least, most = (next(n for n in range(2, 99) if detectable(end, n) <= 0.01) for end in ends)
    sentence = power(found)
    assert f"pooled {pooled:.4f}" in sentence
    assert f"(95 % interval {ends[0]:.4f} to {ends[1]:.4f})" in sentence
    assert f"0.01 nats {least} to {most}." in sentence
    assert "correlate with the baseline's at +0.9" in sentence
    assert sentence in markdown(found)
    assert power(compare_arms(made_up_study({"topk": [4.0], "other": [3.5]}))) == ""
    assert power(compare_arms(made_up_study({"topk": LOSSES["topk"], "same": LOSSES["topk"]}))) == ""


def test_headlines_have_their_differences_with_intervals():
    text = markdown(found := compare_arms(made_up_study(LOSSES)))
    base, worse = (found.headlines["norm_vs_score/spearman"][arm] for arm in ("topk", "worse"))
    low, high = base.interval
    assert (
        f"| norm_vs_score/spearman | {base.mean:.3f} [{low:.3f}, {high:.3f}] | {worse.difference.mean:+.3f} [" in text
    )


def test_small_headlines_keep_digits_and_intervals_are_counted():
    study = made_up_study(LOSSES)
    for arm in study["arms"].values():
        for seed, run in arm["runs"].items():
            run["headlines"]["tiny/share"] = {"step": [300], "value": [1e-5 * int(seed)]}
    found = compare_arms(study)
    assert next(row for row in headline_differences(found)[1] if row[0] == "tiny/share")[1].startswith("0.000025 [")
    assert "These are 6 intervals, not adjusted: about 0 would" in headline_note(found)
    assert "These are 0 intervals" in headline_note(compare_arms(made_up_study({"topk": [4.0], "other": [3.5]})))
    seen = found.arms["worse"].difference
    low, high = seen.detectable_range
    assert low < seen.detectable < high
    assert arm_rows(found)[1][7] == f"{seen.detectable:.4f} ({low:.4f} to {high:.4f})"


def test_domains_stand_apart():
    study = made_up_study(LOSSES)
    found = compare_arms(study)
    assert found.domains["code"]["topk"].mean == pytest.approx(np.mean(LOSSES["topk"]) / 3)
    worse = found.domains["prose"]["worse"].difference
    assert worse.mean == pytest.approx(found.arms["worse"].difference.mean / 2)
    text = markdown(found)
    assert "| arm | code | prose |" in text
    low, high = worse.interval
    assert f"{worse.mean:+.3f} [{low:+.3f}, {high:+.3f}] * |" in text
    for arm in study["arms"].values():
        for run in arm["runs"].values():
            del run["domains"]["prose"]
    assert "## By domain" not in markdown(compare_arms(study))


def _spoil(study, arm, seed, **changes):
    study["arms"][arm]["runs"][str(seed)].update(changes)


@pytest.mark.parametrize(
    ("status", "why"),
    [("diverged", "the loss is nan at step 3"), ("failed", "exit code 1: no space"), ("not run", "stopped at step 40")],
)
def test_a_bad_run_leaves_its_pair_and_is_named(status, why):
    study = made_up_study(LOSSES)
    _spoil(study, "worse", 2, status=status, why=why, loss=9.9)
    found = compare_arms(study)
    worse, alike = found.arms["worse"], found.arms["alike"]
    assert worse.finished == [1, 3, 4]
    assert worse.difference.pairs == 3
    assert worse.loss == pytest.approx(np.mean([4.02, 3.995, 4.045]))
    assert worse.difference.mean == pytest.approx(np.mean([0.05, 0.045, 0.055]))
    assert alike.difference.pairs == 4
    text = markdown(found)
    assert f"LEFT OUT of every mean and difference: worse, seed 2: {status}" in text
    assert why in text
    assert "3 of 4 pairs: without seed 2" in text
    assert "| worse | 3 of 4 |" in text


def test_runs_of_more_than_one_code_are_named():
    study = made_up_study(LOSSES)
    assert "CODE" not in markdown(compare_arms(study))  # a file of before this was kept
    for arm in LOSSES:
        for seed in (1, 2, 3, 4):
            _spoil(study, arm, seed, code=[{"source": "3fa2", "torch": "2.9"}])
    assert "CODE" not in markdown(compare_arms(study))
    _spoil(study, "worse", 2, code=[{"source": "3fa2", "torch": "2.9"}, {"source": "77ab", "torch": "2.9"}])
    _spoil(study, "worse", 3, code=[{"source": "77ab", "torch": "2.9"}])
    assert (
        "**NOT ONE CODE: differences may be those of moebed's source, which is 3fa2 (torch 2.9) in topk seeds 1 2 3 4, "
        "worse seeds 1 2 4, alike seeds 1 2 3 4; 77ab (torch 2.9) in worse seeds 2 3.**"
    ) in markdown(compare_arms(study))


def test_runs_that_learned_nothing_count_and_are_named():
    study = made_up_study(LOSSES)
    for seed in (1, 3):
        _spoil(study, "worse", seed, loss=7.62)
    found = compare_arms(study)
    assert found.arms["worse"].finished == [1, 2, 3, 4]
    assert found.arms["worse"].marks == ["seeds 1, 3 NO BETTER THAN GUESSING, whose loss is 7.600"]
    assert found.arms["alike"].marks == []


def test_a_bad_run_of_the_baseline_leaves_every_pair():
    study = made_up_study(LOSSES)
    _spoil(study, "topk", 1, status="diverged", why="")
    found = compare_arms(study)
    assert [found.arms[name].difference.pairs for name in ("worse", "alike")] == [3, 3]
    assert found.arms["worse"].finished == [1, 2, 3, 4]


def test_one_seed_is_marked_loudly_and_has_no_interval():
    found = compare_arms(made_up_study({"topk": [4.0], "other": [3.5]}))
    assert found.warnings == ["ONE SEED: no interval, nothing can be concluded."]
    assert verdict(found.arms["other"], "topk").endswith("no interval, nothing can be concluded.")
    assert arm_rows(found)[1][5] == "-0.5000 (ONE PAIR)"
    assert set(draw_all(found)) == {"loss_curves", "differences", "headlines"}


def test_no_run_at_all_is_said_and_draws_nothing():
    study = made_up_study(LOSSES)
    for arm in LOSSES:
        for seed in (1, 2, 3, 4):
            _spoil(study, arm, seed, status="not run", loss=None)
    found = compare_arms(study)
    assert verdicts(found)[0] == "worse: no pair of finished runs, so it cannot be compared with topk."
    assert draw_all(found) == {}
    assert "| worse | 0 of 4 | – |" in markdown(found)


def test_sizes_that_do_not_match_are_marked():
    study = made_up_study(LOSSES)
    study["arms"]["worse"]["active_flops_per_token"] *= 2
    found = compare_arms(study)
    assert found.arms["worse"].marks == ["has 2 times the baseline's active FLOPs per token"]
    assert found.arms["alike"].marks == []


def test_what_does_nothing_with_a_result_is_refused(capsys):
    """Its table and pictures go where it lies, whatever --out said."""
    for option in (["--out", "elsewhere"], ["--jobs", "2"], ["--arms", "random"], ["--collect"], ["--pilot"]):
        assert main(["study", "recipes/studies/results/planted_small/study.json", *option]) == 2
        assert f"{option[0]} does nothing with a study.json" in capsys.readouterr().err


def test_pictures_say_their_units_and_cut_nothing():
    found = compare_arms(made_up_study(LOSSES))
    panels = draw_headlines(found).axes
    assert [ax.get_ylabel() for ax in panels] == [unit_of(name) for name in found.headlines]
    assert "rank correlation" in [ax.get_ylabel() for ax in panels]
    (ax,) = draw_differences(found).axes
    low, high = ax.get_xlim()
    assert all(low < bar.get_x() and bar.get_x() + bar.get_width() < high for bar in ax.patches)


@pytest.mark.drawn
def test_one_command_makes_everything_again_from_the_file_alone(tmp_path, capsys):
    study = made_up_study(LOSSES)
    _spoil(study, "alike", 3, status="diverged", why="the loss is nan at step 7")
    (tmp_path / "study.json").write_text(json.dumps(study))
    assert main(["study", str(tmp_path / "study.json")]) == 0
    out = capsys.readouterr().out
    assert "worse: a higher loss than topk" in out
    assert "alike: seed 3 DIVERGED: the loss is nan at step 7" in " ".join(out.split())
    names = {"loss_curves.png", "differences.png", "headlines.png"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "study.md").read_text()
    assert "![figures/differences.png](figures/differences.png)" in text
    assert "norm_vs_score/spearman" in text
    page = (tmp_path / "report.html").read_text()
    assert "Study made_up" in page
    assert "worse: a higher loss than topk" in page
    assert page.count("data:image/png;base64,") == 3
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["study", str(tmp_path / "study.json")]) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page


def test_a_single_validation_is_drawn_with_its_range_and_whole_steps():
    """As a short study's: a band over one step has no width, and a step is no fraction."""
    fig = drawing.new_figure(5, 4, "")
    ax = fig.subplots()
    _band(ax, {"1": {4: 3.0}, "2": {4: 3.4}}, {"color": "red"}, "one")
    (line,) = ax.collections
    assert line.get_segments()[0].tolist() == [[4, 3.0], [4, 3.4]]
    to_rgb(fig)
    assert all(step == round(step) for step in ax.get_xticks())
    _band(ax, {"1": {4: 3.0, 40: 2.0}, "2": {4: 3.4, 40: 2.2}}, {"color": "blue"}, "more")
    to_rgb(fig)
    low, high = ax.get_xlim()
    assert low < 4 < 40 < high < 50
