"""The model card, and what a person can get wrong."""

import pytest
from exported_runs import write_run

from moebed.cli import main


def export(checkpoint, out, *options):
    return main(["export", str(checkpoint), "--out", str(out), *options])


def test_the_card_tells_what_the_run_was(tmp_path):
    checkpoint, decoder = write_run(tmp_path, num_experts=[0, 4], qk_norm="head")
    assert export(checkpoint, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    total = sum(parameter.numel() for parameter in decoder.parameters())
    for row in (
        "# my_run",
        f"| parameters | {total:,} |",
        "| routed experts of a layer | 0, 4 |",
        "| optimizer steps | 20 |",
        "| batches of a step | 2 |",
        "| learning rate | 0.004 |",
        "| weights at the start | dense_model |",
        "- rhymes: files texts/rhymes.txt, weight 2.0",
        "| val/loss | 3.2500 |",
        "AutoTokenizer",
    ):
        assert row in card
    assert "do not hold" not in card
    assert "/home" not in card


def test_the_card_says_when_the_numbers_are_of_another_step(tmp_path):
    checkpoint, _ = write_run(tmp_path, step=10)
    assert export(checkpoint, tmp_path / "out") == 0
    assert "This checkpoint is of step 10" in (tmp_path / "out" / "README.md").read_text()


def test_without_a_tokenizer_it_says_so(tmp_path, capsys):
    checkpoint, _ = write_run(tmp_path, tokenizer=None)
    assert export(checkpoint, tmp_path / "out") == 0
    assert "has no tokenizer of the run" in capsys.readouterr().err
    assert "AutoTokenizer" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["missing", "not a run", "taken", "unknown family", "unknown option", "inside a file"])
def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys, kind):
    checkpoint, _ = write_run(tmp_path)
    out, options = tmp_path / "out", []
    if kind == "missing":
        checkpoint = tmp_path / "none.ckpt"
    elif kind == "not a run":
        checkpoint.write_bytes(b"nothing")
    elif kind == "taken":
        out = checkpoint.parent
    elif kind == "unknown family":
        options = ["--family", "mixtrl"]
    elif kind == "unknown option":
        options = ["--famly", "mixtral"]
    else:
        out = checkpoint / "out"
    before = sorted(tmp_path.rglob("*"))
    assert export(checkpoint, out, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("moebed: error: ")
    assert said.count("\n") == 1
    if kind == "unknown family":
        assert "--family: unknown family 'mixtrl'; did you mean 'mixtral'?" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_another_folder_s_config_is_not_the_run_s(tmp_path):
    """The checkpoint was moved out of its run, below a folder that has a config.yaml and a tokenizer."""
    checkpoint, _ = write_run(tmp_path)
    moved = tmp_path / "my_run" / "kept" / "here" / "last.ckpt"
    moved.parent.mkdir(parents=True)
    checkpoint.rename(moved)
    assert export(moved, tmp_path / "out") == 0
    assert "rhymes" not in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "tokenizer.json").exists()
