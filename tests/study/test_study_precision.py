"""All runs of a study have one precision, whichever machine goes on with it."""

import json

import pytest
import yaml

from moebed.study.precision import keep_precision
from moebed.study.recipe import read_recipe
from moebed.study.runner import check_unchanged
from moebed.study.runs import plan_study

BASE = {
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 6, "precision": "auto"},
    "model": {
        "config": {
            "vocab_size": 260,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_experts": 4,
            "moe_intermediate_size": 32,
        }
    },
    "data": {"tokenizer": {"kind": "bytes"}, "sequence_length": 32, "batch_size": 2},
}


@pytest.fixture
def study(tmp_path):
    """A study of two arms that leave the precision to the machine, and one that does not."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    arms = {"a": {}, "b": {"model.config.norm_topk_prob": False}, "c": {"trainer.precision": "bf16-true"}}
    (tmp_path / "try.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "arms": arms, "seeds": [1, 2]}))
    return read_recipe(tmp_path / "try.yaml")


def _machine(monkeypatch, *bfloat16):
    """CPUs that are asked one after the other, as if the measurement differed from time to time."""
    rates = iter(bfloat16)
    monkeypatch.setattr("moebed.machine.precision.measured_rates", lambda: (100.0, next(rates)))


def _precisions(plan):
    return {name.split("/")[1]: run.identity["trainer.precision"] for name, run in plan.runs.items()}


def test_auto_is_asked_once_and_is_part_of_what_a_run_is(study, tmp_path, monkeypatch):
    _machine(monkeypatch, 800.0, 2.0, 2.0)
    plan = plan_study(study, tmp_path / "out")
    assert _precisions(plan) == {"a": "bf16-mixed", "b": "bf16-mixed", "c": "bf16-true"}
    for name, run in plan.runs.items():
        assert ("--trainer.precision=bf16-mixed" in run.arguments) == ("runs/c" not in name)
    assert plan.precision_said.startswith("precision auto: bf16-mixed here (a core multiplies bf16 at 800")
    assert plan.notes == []
    assert not (tmp_path / "out").exists()  # nothing is written by looking


def test_another_machine_goes_on_in_the_same_precision(study, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _machine(monkeypatch, 800.0)
    first = plan_study(study, out)
    assert keep_precision(out, first.precision) == "bf16-mixed"
    _machine(monkeypatch, 2.0)
    second = plan_study(study, out)
    assert [run.hash for run in second.runs.values()] == [run.hash for run in first.runs.values()]
    assert second.precision_said == f"precision auto: bf16-mixed, as the study in {out} was begun"
    assert keep_precision(out, "32-true") == "bf16-mixed"  # a call that planned before the other wrote
    _machine(monkeypatch, 2.0)
    assert plan_study(study, tmp_path / "other").precision == "32-true"


def test_a_study_whose_recipe_once_named_its_precision_goes_on_in_it(study, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _machine(monkeypatch, 800.0)
    begun = plan_study(study, out).runs["runs/a/seed_1"]
    (out / begun.name).mkdir(parents=True)
    status = out / "status" / f"{begun.name}.json"
    status.parent.mkdir(parents=True)
    status.write_text(json.dumps({"hash": begun.hash, "identity": dict(begun.identity)}))
    _machine(monkeypatch, 2.0)
    plan = plan_study(study, out)
    check_unchanged(list(plan.runs.values()), out)
    assert _precisions(plan)["b"] == "bf16-mixed"
