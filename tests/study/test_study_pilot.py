"""The pilot: few runs, those that exist among them, and what they say that more would see."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from study_runs import made_up_study

from moebed.cli import main
from moebed.errors import UserError
from moebed.study.comparison import compare_arms
from moebed.study.pilot import pilot_runs, power_of, rows, seconds_of, sentences
from moebed.study.statistics import detectable, pairs_needed

BASE = [4.0, 4.1, 4.05, 3.95, 4.02, 4.03]


def _study(differences, seeds=6, **changes):
    arms = {"topk": BASE[:seeds]}
    arms |= {name: (np.array(BASE[:seeds]) + np.array(found)).tolist() for name, found in differences.items()}
    return made_up_study(arms, **changes)


def _stop(study, arm, seed):
    study["arms"][arm]["runs"][str(seed)] |= {"status": "not run", "loss": None, "tokens_per_second": None}


def test_seeds_follow_from_the_deviation_of_the_pairs_that_are_there():
    """Differences of ±.02 about .01: σ = .0231 with four pairs; the file of the other two says nothing yet."""
    study = _study({"other": [0.03, -0.01, 0.03, -0.01, 9.0, 9.0]})
    for seed in (5, 6):
        _stop(study, "other", seed)
    found = compare_arms(study)
    power = power_of(found.arms["other"])
    assert power.pairs == 4
    assert power.deviation == pytest.approx(0.02 * np.sqrt(4 / 3))
    assert power.likely[0] < power.deviation < power.likely[1]
    assert power.seeds(0.03)[1] == pairs_needed(power.deviation, 0.03) == 7
    assert power.seeds(0.03)[0] < 7 < power.seeds(0.03)[2]
    assert power.seeds(1e-6) == [None] * 3
    for seeds, likely in zip(power.seeds(0.03), (power.likely[0], power.deviation, power.likely[1]), strict=True):
        assert detectable(likely, seeds) <= 0.03 < detectable(likely, seeds - 1)
    (_, row) = rows(found, [0.03])
    assert row[0] == "other"
    assert row[1] == "4"
    assert row[4] == f"{detectable(power.deviation, 6):.4f}"
    assert row[5].startswith("7 (")


def test_a_test_of_several_comparisons_takes_more():
    """Bonferroni's: the two-sided test at 5 % / m has 80 % power by simulation."""
    assert detectable(1.0, 8, 1) == detectable(1.0, 8)
    assert detectable(1.0, 8, 5) > detectable(1.0, 8)
    from scipy import stats

    rng = np.random.default_rng(0)
    for pairs, comparisons in ((4, 1), (4, 7), (12, 5)):
        samples = rng.normal(size=(20_000, pairs)) + detectable(1.0, pairs, comparisons)
        p = stats.ttest_1samp(samples, 0, axis=1).pvalue
        assert (p < 0.05 / comparisons).mean() == pytest.approx(0.8, abs=0.01)


def test_what_the_whole_study_takes_goes_by_the_worst_arm_and_leaves_out_what_is_done():
    study = _study({"calm": [0.001, -0.001] * 3, "wild": [0.06, -0.06] * 3})
    for arm in study["arms"].values():
        for run in arm["runs"].values():
            run["seconds"] = 30.0
    found = compare_arms(study)
    assert seconds_of(found, "wild") == 30
    worst = power_of(found.arms["wild"])
    alone, together = (worst.seeds(0.05, comparisons)[1] for comparisons in (1, 2))
    assert alone < together
    (line,) = sentences(found, [0.05], 2)[1:]
    runs = 3 * (together - 6)
    assert f"takes {alone} seeds, or {together} if all 2 comparisons are to hold together: {runs} more runs" in line
    assert f"{int(np.ceil(runs * 30 / 2 / 60))} minutes with --jobs 2" in line
    assert "wild has the largest" in sentences(found, [0.05], 2)[0]
    assert "more than 200 seeds" in sentences(found, [1e-4], 1)[1]


def test_time_is_reckoned_from_tokens_where_it_was_not_measured():
    study = _study({"other": [0.01] * 6})
    tokens = study["arms"]["topk"]["tokens"]
    expected = np.mean([tokens / run["tokens_per_second"] for run in study["arms"]["topk"]["runs"].values()])
    assert seconds_of(compare_arms(study), "topk") == pytest.approx(expected)


def test_finished_runs_count():
    """Seeds 2 and 5 are finished in both; of the others seed 4 lacks one run alone."""
    study = _study({"other": [0.01, -0.01] * 3, "third": [0.0] * 6})
    for seed in (1, 3, 6):
        for arm in ("topk", "other", "third"):
            _stop(study, arm, seed)
    _stop(study, "other", 4)
    found = compare_arms(study)
    assert [seed for _, seed in pilot_runs(found, ["other"], 3)][::2] == [2, 5, 4]
    assert pilot_runs(found, ["other"], 2)[0] == ("topk", 2)
    assert len(pilot_runs(found, ["other", "third", "topk"], 2)) == 6
    assert len(pilot_runs(found, ["other"], 6)) == 12
    for pairs in (1, 7):
        with pytest.raises(UserError, match="give at least 2 pairs, and at most the study's 6 seeds"):
            pilot_runs(found, ["other"], pairs)


def test_one_pair_and_equal_pairs_say_so():
    study = _study({"same": [0.0] * 6, "one": [0.1] * 6})
    for seed in range(2, 7):
        _stop(study, "one", seed)
    found = compare_arms(study)
    assert power_of(found.arms["same"]).seeds(0.01) == [2, 2, 2]
    assert power_of(found.arms["one"]) is None
    assert power_of(found.arms["topk"]) is None
    one = next(row for row in rows(found, [0.01]) if row[0] == "one")
    assert one[1:5] == ["1", "+0.1000 (ONE PAIR)", "–", "–"]
    for seed in range(1, 7):
        _stop(study, "same", seed)
    assert sentences(compare_arms(study), [0.01], 1)[0].startswith("No arm has two pairs")


def test_arms_of_other_widths_at_one_rate_carry_a_note():
    from moebed.study.runs import Arm, _widths
    from tests.conftest import tiny_config

    def arm(**changes):
        return Arm(tiny_config(**changes), {}, 1, 1, 1, 1, 1)

    arms = {
        "base": arm(),
        "same": arm(num_experts=8),
        "wide": arm(hidden_size=64),
        "fine": arm(moe_intermediate_size=8),
    }
    said = _widths(arms, "base")
    assert [line.split(" than base")[0] for line in said] == [
        "wide: another hidden_size",
        "fine: another moe_intermediate_size",
    ]
    assert not _widths({"base": arm(), "wide": arm(hidden_size=64, base_hidden_size=32)}, "base")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--difference", "0.03"], "--difference is 0.03; give it with --pilot"),
        (["--pilot", "--difference", "0"], "--difference is '0'; give a number above 0"),
        (["--pilot", "--slurm"], "--pilot goes with neither --run nor --slurm"),
    ],
)
def test_refuses_in_one_line(arguments, words, capsys):
    recipe = Path(__file__).parents[2] / "recipes" / "studies" / "planted_small.yaml"
    assert main(["study", str(recipe), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_pilot_runs_few_and_says_what_more_take(tmp_path, capsys):
    base = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 20, "val_check_interval": 20, "precision": 32},
        "checkpoint": {"every_n_train_steps": 20},
        "model": {"config": {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
        "data": {
            "tokenizer": {"kind": "symbols"},
            "sequence_length": 16,
            "batch_size": 4,
            "max_validation_windows": 8,
            "sources": [{"name": "d", "kind": "planted", "max_bytes": 200_000, "planted": {"domains": 1}}],
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    base["model"]["config"] |= {"num_experts": 4, "moe_intermediate_size": 16}
    base["model"]["optimizer"] = {"learning_rate": 1e-2, "warmup_steps": 2}  # better than guessing in the end
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    arms = {"topk": {}, "wide": {"model.config.moe_intermediate_size": 32}, "random": {"model.config.router": "random"}}
    study = {"base": "base.yaml", "seeds": [1, 2, 3, 4], "arms": arms, "baseline": "topk"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    arguments = ["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--pilot", "2", "--arms", "wide", "--difference", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "seeds for 0.5" in said
    assert "To see 0.5 nats in every arm takes" in said
    finished = json.loads((tmp_path / "out" / "study.json").read_text())["arms"]
    done = {
        arm: [s for s, run in found["runs"].items() if run["status"] == "finished"] for arm, found in finished.items()
    }
    assert done == {"topk": ["1", "2"], "wide": ["1", "2"], "random": []}
    assert all(finished["wide"]["runs"][seed]["seconds"] > 0.5 for seed in ("1", "2"))
    assert main([*arguments, "--pilot", "2", "--collect"]) == 0  # runs nothing
    assert not (tmp_path / "out" / "runs" / "random").exists()


def test_the_most_pairs_that_are_looked_for_may_be_needed():
    needed = detectable(1.0, 5)
    assert [pairs_needed(1.0, needed, most=most) for most in (4, 5, 6)] == [None, 5, 5]
