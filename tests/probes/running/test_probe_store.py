"""Results on disk."""

import json

import numpy as np
import pytest

from moebed.errors import UserError
from moebed.machine import storage
from probes.contract import Headline, ProbeResult
from probes.running import store


def line(step, value=1.0):
    result = ProbeResult({}, {"x/layer_00": value}, {"x": Headline(value, "It is so.")})
    return store.history_line(step, {"balance": result})


def steps(out):
    return [entry["step"] for entry in store.load_history(out)]


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {"load/0": np.float32([1, 2]), "dead/0": np.asarray(3), "names": np.array(["a", "bb"])}
    store.save_arrays(tmp_path, "balance", arrays)
    found = store.load_arrays(tmp_path, "balance")
    assert found.keys() == arrays.keys()
    for key, value in arrays.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "results").mkdir()
    np.savez(tmp_path / "results" / "balance.npz", bad=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"balance\.npz"):
        store.load_arrays(tmp_path, "balance")


def test_missing_and_truncated_arrays_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        store.load_arrays(tmp_path, "balance")
    path = store.save_arrays(tmp_path, "balance", {"load/0": np.ones(1000)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot be read") as error:
        store.load_arrays(tmp_path, "balance")
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = store.save_arrays(tmp_path, "balance", {"load/0": np.ones(2)})

    def write_half():
        with storage.new_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert store.load_arrays(tmp_path, "balance")["load/0"].tolist() == [1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["balance.npz"]


def test_history_is_truncated_to_the_resumed_step(tmp_path):
    for step in (0, 10, 20, 30):
        store.append_history(tmp_path, line(step))
    store.truncate_history(tmp_path, 20)
    assert steps(tmp_path) == [0, 10, 20]
    store.truncate_history(tmp_path, -1)
    assert steps(tmp_path) == []


def test_history_of_a_step_written_again_is_replaced(tmp_path):
    for step, value in ((0, 1.0), (10, 2.0), (20, 3.0), (10, 4.0)):
        store.append_history(tmp_path, line(step, value))
    history = store.load_history(tmp_path)
    assert [(h["step"], h["scalars"]["balance/x/layer_00"]) for h in history] == [(0, 1.0), (10, 4.0)]


def test_a_torn_last_line_is_ignored(tmp_path):
    for step in (0, 10):
        store.append_history(tmp_path, line(step))
    path = tmp_path / "results" / "history.jsonl"
    path.write_text(path.read_text()[:-9])
    assert steps(tmp_path) == [0]
    store.append_history(tmp_path, line(20))
    assert steps(tmp_path) == [0, 20]


def test_no_number_is_null(tmp_path):
    store.append_history(tmp_path, line(0, float("nan")))
    assert "NaN" not in (tmp_path / "results" / "history.jsonl").read_text()
    assert store.load_history(tmp_path)[0]["headlines"]["balance/x"] is None


def test_summary_holds_values_sentences_and_notes(tmp_path):
    result = ProbeResult({}, {}, {"x": Headline(0.5, "Half of it.")}, notes=["left out"])
    store.save_summary(tmp_path, 7, {"balance": result}, notes=["in bfloat16"])
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "step": 7,
        "notes": ["in bfloat16"],
        "probes": {"balance": {"headlines": {"x": {"value": 0.5, "sentence": "Half of it."}}, "notes": ["left out"]}},
    }
    assert store.load_summary(tmp_path / "none") == {}
