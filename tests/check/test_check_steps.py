"""The ladder's real steps: each on this device, and the parts that judge without one."""

import dataclasses
import importlib.util
import json
import math
import os

import pytest
import torch

from moebed.check import command, machine, speed, worker
from moebed.check.contract import Finding, Place, Row, Verdict
from moebed.check.record import Record
from moebed.cli import main
from tests.check import planted
from tests.test_architecture import ROOT

STEPS = {step.name: step for rung in command.LADDER for step in rung}
# The kernels have tests/triton_kernels/test_kernels_gpu.py.
GPU_STEPS = [name for name in STEPS if not name.startswith("kernels_")]


def measured(step, tmp_path, gpus):
    """Every row's finding by name; they see those before them, as in the step's own process."""
    record = Record(tmp_path / "record.json", {"gpus": gpus})
    (tmp_path / "scratch").mkdir()
    assert worker.work(step, record, tmp_path / "scratch", 0.0) == 0
    return record.findings


def assert_nothing_is_wrong(found):
    wrong = [f"{each.name}: {each.said}" for each in found.values() if each.verdict == Verdict.WRONG]
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", GPU_STEPS)
def test_gpu_steps(name, tmp_path, monkeypatch):
    for variable, value in STEPS[name].environment.items():
        monkeypatch.setenv(variable, value)
    assert_nothing_is_wrong(measured(STEPS[name], tmp_path, torch.cuda.device_count()))


@pytest.mark.parametrize("name", ["machine", "probes", "checkpoints"])
def test_steps_on_a_cpu(name, tmp_path):
    found = measured(STEPS[name], tmp_path, 0)
    assert_nothing_is_wrong(found)
    assert [each for each in found.values() if each.verdict == Verdict.WORKS]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_ladder_on_a_cpu_twice_and_without_optional_packages(tmp_path, monkeypatch, capsys):
    """No network, no ``datasets``, no ``jsonargparse``: every step ends, nothing is wrong, the second call is short."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("datasets", "jsonargparse"):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')")
    (absent / "sitecustomize.py").write_text(
        "import socket\ndef refused(*a, **k):\n raise OSError('no network')\nsocket.create_connection = refused\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{absent}:{ROOT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "out"
    assert main(["check", "--minutes", "20", "--out", str(out)]) == 0
    first = {path.name: path.read_text() for path in (out / "steps").iterdir()}
    assert len(first) == len(STEPS)
    rows = [finding for text in first.values() for finding in json.loads(text)["findings"]]
    assert not [row for row in rows if row["verdict"] == "wrong"]
    assert sum(row["verdict"] == "works" for row in rows) > 40
    assert main(["check", "--minutes", "20", "--out", str(out)]) == 0
    assert {path.name: path.read_text() for path in (out / "steps").iterdir()} == first


# Judging --------------------------------------------------------------------------------------------------------------


def contestants(triton, grouped_mm, **changes):
    row = {"agrees": True, "difference": 1e-3, "peak_bytes": 1e9, "share_of_roofline": 0.5}
    rows = [
        {"name": "moebed triton", **row, "both_seconds": triton, "forward_seconds": triton / 3, **changes},
        {"name": "moebed grouped_mm", **row, "both_seconds": grouped_mm, "forward_seconds": grouped_mm / 3},
        {"name": "transformers x", **row, "agrees": False, "both_seconds": 1e-9, "forward_seconds": 1e-9},
        {"name": "dense", **row, "agrees": None, "both_seconds": 1e-9, "forward_seconds": 1e-9},
    ]
    return {"rows": rows, "left_out": {"Liger": "no module"}}


def test_speed_is_judged_beside_grouped_mm_and_what_differs_counts_for_nothing():
    fast = speed.judge(contestants(0.002, 0.003), "both")
    assert fast.verdict == Verdict.WORKS
    assert "2.000 ms; times 1.50 moebed grouped_mm; 0.50 of the roofline" in fast.said
    assert "different: transformers x; left out: Liger" in fast.said
    assert speed.judge(contestants(0.003, 0.002), "both").verdict == Verdict.SLOW
    assert speed.judge(contestants(0.002, 0.003, agrees=False), "both").verdict == Verdict.WRONG
    gone = contestants(0.002, 0.003)
    gone["left_out"]["moebed triton"] = "ptxas fatal"
    gone["rows"] = gone["rows"][1:]
    assert speed.judge(gone, "forward").verdict == Verdict.WRONG
    assert "ptxas fatal" in speed.judge(gone, "forward").said


def test_a_training_step_with_other_losses_is_wrong(tmp_path, monkeypatch):
    from moebed.check import training

    of = training.Contestant("tiny", "grouped_mm", False, "32-true")
    right = training.measure(Place("cpu", 0, tmp_path, {}), of, lambda loop: training._reference_losses("cpu", loop))
    assert right.verdict == Verdict.WORKS
    losses = right.figures["losses"]
    wrong = training.measure(Place("cpu", 0, tmp_path, {}), of, lambda loop: [loss * 1.001 for loss in losses])
    assert wrong.verdict == Verdict.WRONG
    assert "losses differ from the loop's by 1.0e-03" in wrong.said


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """What is said of a step of loss 3 that is as fast as is said."""
    from moebed.check import training

    def measure(of, rate=50.0, reference=3.0, found=()):
        monkeypatch.setattr(training, "make_step", lambda of, device: None)
        monkeypatch.setattr(training, "losses_of", lambda step, of, device: [3.0])
        monkeypatch.setattr(training, "fastest", lambda work, *_: training.size_of(of.size).tokens / rate)
        rows = {
            name: Finding(name, Verdict.WORKS, "", {"tokens_per_second": rate}) for name, rate in dict(found).items()
        }
        return training.measure(Place("cpu", 0, tmp_path, rows), of, lambda loop: [reference])

    return measure


def test_losses_that_are_no_numbers_are_wrong(judged):
    from moebed.check.training import Contestant

    assert judged(Contestant("tiny", "grouped_mm", False, "32-true"), reference=math.nan).verdict == Verdict.WRONG


@pytest.mark.parametrize(
    ("size", "name", "rate", "verdict", "times"),
    [
        ("A", "grouped_mm", 90.0, Verdict.SLOW, "0.90"),
        ("A", "grouped_mm", 150.0, Verdict.WORKS, "1.50"),
        ("A", "loop", 90.0, Verdict.WORKS, "0.90"),  # it is there to be compared with
        ("tiny", "grouped_mm", 90.0, Verdict.WORKS, "0.90"),  # of which speed says nothing
    ],
)
def test_a_training_step_is_slow_beside_the_best_of_transformers(judged, size, name, rate, verdict, times):
    from moebed.check.training import PEERS, Contestant

    of = Contestant(size, name, False, "32-true")
    found = judged(of, rate, found={str(of._replace(name=peer)): 100.0 / n for n, peer in enumerate(PEERS, 1)})
    assert found.verdict == verdict
    assert found.said.endswith(f"; {times} times transformers' best")


def test_probes_that_differ_are_named(tmp_path):
    from moebed.check import probing

    results = probing.live_results("cpu", ["balance", "routing"])
    assert probing.compare(results, results).verdict == Verdict.WORKS
    key = next(key for key, value in results["routing"].arrays.items() if value.dtype.kind == "f")
    arrays = {**results["routing"].arrays, key: results["routing"].arrays[key] * 1.01 + 0.01}
    other = {**results, "routing": dataclasses.replace(results["routing"], arrays=arrays)}
    found = probing.compare(other, results)
    assert found.verdict == Verdict.WRONG
    assert f"routing {key}" in found.said
    for named in ({**arrays, "more": arrays[key]}, {name: arrays[name] for name in arrays if name != key}):
        other = {**results, "routing": dataclasses.replace(results["routing"], arrays=named)}
        found = probing.compare(other, results)
        assert found.verdict == Verdict.WRONG
        assert found.said.endswith("differ: routing has other arrays")


def test_a_run_that_forgets_its_optimizer_is_found(tmp_path, monkeypatch):
    """Planted: the checkpoint's moments are dropped when it is read."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from moebed.check import runs

    monkeypatch.setattr(SingleDeviceStrategy, "load_optimizer_state_dict", lambda self, checkpoint: None)
    found = runs.continued(Place("cpu", 0, tmp_path, {}), "32-true")
    assert found.verdict == Verdict.WRONG


@pytest.mark.slow
def test_ranks_train_the_same_model_and_are_started_once(tmp_path, monkeypatch):
    """A process imports for longer than a row trains; the second call begins where the first was stopped."""
    from moebed.check import ranks, standing

    started, start = [], standing._start
    monkeypatch.setattr(standing, "_start", lambda world: started.append(world) or start(world))
    monkeypatch.setattr(ranks.os, "cpu_count", lambda: 2)
    place = Place("cpu", 0, tmp_path, {})
    found = {row.name: worker.measure(row, place) for row in ranks.rows(place)}
    assert_nothing_is_wrong(found)
    assert [name for name, each in found.items() if each.verdict == Verdict.WORKS] == [
        "one process", "FSDP2, 2 ranks", "EP, 2 ranks", "EP by all-gather, 2 ranks", "FSDP2, 1 rank",
    ]  # fmt: skip
    assert started == [1, 2]
    kept = {step: [1.001 * value for value in values] for step, values in found["one process"].figures["steps"].items()}
    begun = {"one process": dataclasses.replace(found["one process"], figures={"steps": kept})}
    again = {row.name: row for row in ranks.rows(Place("cpu", 0, tmp_path, begun))}["FSDP2, 1 rank"].measure()
    assert again.verdict == Verdict.WRONG
    assert started == [1, 2, 1]  # what one process did was kept


def test_ranks_that_fail_are_an_error_with_their_words_and_others_stand_in_their_place():
    from moebed.check.standing import StandingRanks

    ranks = StandingRanks(2, 50.0)
    assert ranks.call(planted.rank) == "0"
    pids = [rank.process.pid for rank in ranks._ranks]
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: ValueError: of rank 1$"):
        ranks.call(planted.rank, "raises")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: it ended with exit code 9$"):
        ranks.call(planted.rank, "ends")


def test_ranks_that_do_not_end_are_slow_and_not_wrong(tmp_path):
    """As on a machine that has much else to do."""
    from moebed.check.standing import StandingRanks

    row = Row("x", lambda: StandingRanks(1, 1.0).call(planted.rank, "hangs"))
    found = worker.measure(row, Place("cpu", 0, tmp_path, {}))
    assert found.verdict == Verdict.SLOW
    assert found.said == "rank 0 of 1 had not ended after 1 s"


def test_versions_of_what_is_not_installed_are_no_error(monkeypatch):
    from moebed.bench import command as bench

    monkeypatch.setattr(bench, "PACKAGES", ("torch", "no_such_package"))
    assert bench.machine()["versions"]["no_such_package"] is None


def test_what_is_missing_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    assert "scipy" in machine.missing()
    assert "scipy (probes of weights, studies)" in machine.packages().said
