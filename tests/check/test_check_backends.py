"""What a ladder's records say of the experts backends."""

import json

import pytest
import torch

from moebed.check import backends
from moebed.check.contract import Finding, Verdict
from moebed.check.record import Record
from moebed.model import measured


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),
        ([(10, 1.4), (1, 1.1)], 1),
        ([(1, 0.9), (10, 1.0), (100, 2.0)], 10),
        ([(1, 2.0), (10, 0.9), (100, 2.0)], 100),  # faster at the smallest, but not from there on
        ([(100, 0.99), (1, 3.0)], None),
    ],
)
def test_least_work(rows, expected):
    assert backends.least_work(rows) == expected


def _record(tmp_path, name, findings):
    record = Record(tmp_path / name, {})
    record.names, record.findings = [each.name for each in findings], {each.name: each for each in findings}
    return record


def _speed(name, work, ratio, dtype="bfloat16", agrees=True, phase="both"):
    rows = [
        {"name": "moebed grouped_mm", f"{phase}_seconds": ratio, "agrees": True},
        {"name": "moebed triton", f"{phase}_seconds": 1.0, "agrees": agrees},
    ]
    return Finding(name, Verdict.WORKS, "", {"rows": rows, "work": work, "dtype": dtype, "phase": phase})


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path / "cache"))
    steps = {step for steps in backends.GATES.values() for step in steps}
    made = {step: _record(tmp_path, step, [Finding("one", Verdict.WORKS, "")]) for step in steps}
    speed = [
        _speed("small", 10, 0.8), _speed("large", 1000, 1.4), _speed("decoding", 100, 1.2, phase="forward"),
        _speed("wide", 10, 3.0, "float32"), _speed("wrong", 5000, 0.1, agrees=False),
        Finding("left out", Verdict.NOT_RUN, ""),
    ]  # fmt: skip
    return made | {"speed": _record(tmp_path, "speed", speed)}


def test_what_is_written_is_what_auto_reads(records, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Planted GPU")
    backends.write(records, "Planted GPU")
    measured._of_kind.cache_clear()
    found = [measured.least_work(torch.device("cuda"), t) for t in (torch.bfloat16, torch.float16, torch.float32)]
    measured._of_kind.cache_clear()
    assert found == [100.0, 100.0, 10.0]


@pytest.mark.parametrize("fault", ["wrong", "not run"])
def test_a_type_that_was_not_found_right_is_never_taken(records, tmp_path, fault):
    kernels = records["kernels_bfloat16"]
    if fault == "wrong":
        kernels.findings["one"] = Finding("one", Verdict.WRONG, "")
    else:
        kernels.names.append("two")
    kept = json.loads(backends.write(records, "Planted GPU").read_text(encoding="utf-8"))["least_work"]
    assert kept == {"float16": 100.0, "float32": 10.0} | ({"bfloat16": None} if fault == "wrong" else {})


def test_one_wrong_row_among_many_is_enough(records):
    kernels = records["kernels_float32"]
    kernels.names += ["two", "three"]
    kernels.findings |= {"two": Finding("two", Verdict.WRONG, ""), "three": Finding("three", Verdict.WORKS, "")}
    kept = json.loads(backends.write(records, "Planted GPU").read_text(encoding="utf-8"))["least_work"]
    assert kept == {"bfloat16": 100.0, "float16": 100.0, "float32": None}


@pytest.mark.parametrize("left", ["speed", "kernels_launches"])
def test_a_part_of_the_ladder_leaves_what_a_whole_one_found(records, left):
    records[left].findings.clear()
    assert backends.write(records, "Planted GPU") is None
    assert not measured.path_of("Planted GPU").exists()
