"""The ladder's real steps: each on this device, and the parts that judge without one."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from moebed.check import command, machine, speed, worker
from moebed.check.contract import Place, Verdict
from moebed.check.record import Record
from moebed.cli import main
from tests.test_architecture import ROOT

STEPS = {step.name: step for rung in command.LADDER for step in rung}
# The kernels have tests/triton_kernels/test_kernels_gpu.py.
GPU_STEPS = [name for name in STEPS if not name.startswith("kernels_")]


def measured(step, tmp_path, gpus):
    """Every row's finding by name; they see those before them, as in the step's own process."""
    record = Record(tmp_path / "record.json", {"gpus": gpus})
    (tmp_path / "scratch").mkdir()
    assert worker.work(step, record, tmp_path / "scratch") == 0
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


def test_a_run_that_forgets_its_optimizer_is_found(tmp_path, monkeypatch):
    """Planted: the checkpoint's moments are dropped when it is read."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from moebed.check import runs

    monkeypatch.setattr(SingleDeviceStrategy, "load_optimizer_state_dict", lambda self, checkpoint: None)
    found = runs.continued(Place("cpu", 0, tmp_path, {}), "32-true")
    assert found.verdict == Verdict.WRONG


@pytest.mark.parametrize("layout", ["FSDP2, 1 rank", "EP, 2 ranks"])
@pytest.mark.slow
def test_ranks_train_the_same_model(layout, tmp_path):
    from moebed.check import ranks

    alone = ranks.run_ranks(Place("cpu", 0, tmp_path, {}), "alone")
    found = ranks.beside(Place("cpu", 0, tmp_path, {}), layout, lambda: alone)
    assert found.verdict == Verdict.WORKS, found.said
    off = ranks.beside(
        Place("cpu", 0, tmp_path, {}),
        layout,
        lambda: {step: [1.001 * v for v in values] for step, values in alone.items()},
    )
    assert off.verdict == Verdict.WRONG


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_rank_that_fails_is_an_error_with_its_words(tmp_path):
    from moebed.check import ranks

    with pytest.raises(RuntimeError, match="rank 0 of 1: exit code 1: "):
        ranks.run_ranks(Place("cuda", 0, tmp_path, {}), "alone")


def test_versions_of_what_is_not_installed_are_no_error(monkeypatch):
    from moebed.bench import command as bench

    monkeypatch.setattr(bench, "PACKAGES", ("torch", "no_such_package"))
    assert bench.machine()["versions"]["no_such_package"] is None


def test_what_is_missing_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    assert "scipy" in machine.missing()
    assert "scipy (probes of weights, studies)" in machine.packages().said
