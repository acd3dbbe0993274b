"""Runs of a study on GPUs: each sees its own, as many as it asks for. The machine's number of GPUs is made up."""

from collections import Counter

import pytest
from study_runs import FakeRun, program

from moebed.study.placement import VARIABLE, Placement, visible_devices
from moebed.study.resolving import resolve
from moebed.study.runner import run_all
from tests.parallel.parallel_runs import ROOT


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (None, ["0", "1", "2", "3"]),
        ("2,0", ["2", "0"]),
        ("GPU-8f2a,MIG-77", ["GPU-8f2a", "MIG-77"]),
        ("1, 3,-1,2", ["1", "3"]),
        ("", []),
        ("-1", []),
    ],
)
def test_the_gpus_are_those_that_the_variable_names(named, found, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert visible_devices({} if named is None else {VARIABLE: named}) == found


def _seen(placement, run, number=1):
    return placement.take(run, number).get(VARIABLE)


def test_runs_take_the_gpus_in_turn_and_then_those_with_the_fewest():
    placement = Placement(["0", "1", "2"])
    assert [_seen(placement, str(run)) for run in range(3)] == ["0", "1", "2"]
    assert _seen(placement, "3") == "0"
    placement.release("1")
    assert _seen(placement, "4") == "1"
    assert _seen(placement, "5", 2) == "1,2"
    assert _seen(placement, "6", 5) == "0,1,2"
    assert placement.take("7", 0) == {}
    assert Placement([]).take("0", 1) == {}


@pytest.mark.parametrize(("jobs", "gpus", "most"), [(4, 4, 1), (4, 2, 2), (2, 4, 1)])
def test_running_runs_have_gpus_of_their_own(jobs, gpus, most, tmp_path, monkeypatch):
    monkeypatch.setattr("moebed.study.runner.POLL_SECONDS", 0.01)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv(VARIABLE, raising=False)
    runs = [FakeRun(f"runs/a/seed_{seed}", steps=30, devices=1) for seed in range(jobs)]
    assert len(run_all(runs, tmp_path, jobs, program(tmp_path)).finished) == jobs
    seen = Counter((tmp_path / run.name / "gpus").read_text() for run in runs)
    assert set(seen) == {str(index) for index in range(min(jobs, gpus))}
    assert max(seen.values()) == most


def test_a_run_sees_as_many_as_it_asks_for_among_those_that_are_visible(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "7,5,3")
    runs = [FakeRun("runs/a/seed_0", devices=2), FakeRun("runs/b/seed_0", devices=0)]
    run_all(runs, tmp_path, 1, program(tmp_path))
    assert (tmp_path / runs[0].name / "gpus").read_text() == "7,5"
    assert (tmp_path / runs[1].name / "gpus").read_text() == "7,5,3"  # it names its own, or takes none


@pytest.mark.parametrize(
    ("accelerator", "devices", "wanted", "processes"),
    [("auto", "auto", 1, 1), ("gpu", "2", 2, 2), ("gpu", "[0,2]", 0, 2), ("cpu", "auto", 0, 1), ("auto", "-1", 1, 1)],
)
def test_what_a_recipe_asks_for_on_a_machine_of_four_gpus(accelerator, devices, wanted, processes, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    arguments = ["--config", str(ROOT / "recipes" / "tiny_mixtral.yaml"), "--trainer.precision=32-true"]
    found = resolve([*arguments, f"--trainer.accelerator={accelerator}", f"--trainer.devices={devices}"])
    assert found.devices == wanted
    trainer, data = found.content["trainer"], found.content["data"]
    per_process = trainer["accumulate_grad_batches"] * data["batch_size"] * data["sequence_length"]
    assert found.tokens_per_step == processes * per_process
