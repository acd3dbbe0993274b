"""The table at the end of a run."""

import pytest

from moebed.commands.training_run import print_closing_table


@pytest.mark.parametrize("there", [(), ("results", "figures", "tensorboard", "elsewhere/last.ckpt")])
def test_what_is_not_there_is_not_named(tmp_path, capsys, monkeypatch, there):
    """A run without probes has no results and no pictures; checkpoints may lie elsewhere."""
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "report.html").write_text("")
    for name in there:
        (tmp_path / name).mkdir(parents=True)
    print_closing_table({"step": 3}, tmp_path, tmp_path / "report.html", tmp_path / "elsewhere")
    said = capsys.readouterr().err
    named = {"probe results": "results", "figures": "figures", "curves and images": "--logdir", "checkpoint": "last"}
    assert f"{tmp_path / 'report.html'}" in said
    for row, words in named.items():
        assert (f"│ {row} " in said, words in said) == (bool(there), bool(there)), said
