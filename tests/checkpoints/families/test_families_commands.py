"""Commands on the families whose norms, biases and choice differ most from Mixtral's, each given twice."""

import numpy as np
import pytest
from odd_checkpoints import write_base

from moebed.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flex_olmo", "phimoe"])
def test_a_command_does_its_work_or_says_in_one_line_why_not(family, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("probes.running.callback.ProbeCallback._draw", lambda *arguments, **options: None)
    monkeypatch.setattr("probes.report.page.write_report", lambda folders, path: path)
    write_base(family, tmp_path / "base")
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 48, (2, 40)))
    probing = ["probe", "--input-ids", str(ids), "--out"]
    asked = [
        ([*probing, str(tmp_path / "probed"), str(tmp_path / "base")], (0, 0), "report: "),
        (["export", str(tmp_path / "base"), "--out", str(tmp_path / "exported")], (0, 2), "is not empty"),
        (["upcycle", str(tmp_path / "base"), "--method", "copy", "--out", str(tmp_path / "up")], (2, 2), "has experts"),
        ([*probing, str(tmp_path / "again"), str(tmp_path / "exported")], (0, 0), "report: "),
    ]
    capsys.readouterr()
    for arguments, codes, said in asked:
        for code in codes:
            assert main(arguments) == code
            told = capsys.readouterr().err
            assert code == 0 or told.startswith("moebed: error: ")
            assert code == 0 or told.count("\n") == 1
        assert said in told
    first, second = ((tmp_path / name / "results") for name in ("probed", "again"))
    arrays = sorted(path.name for path in first.glob("*.npz"))
    assert arrays
    for name in arrays:
        one, other = np.load(first / name), np.load(second / name)
        for key in one.files:
            np.testing.assert_array_equal(one[key], other[key], err_msg=f"{name}: {key}")
