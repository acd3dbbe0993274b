"""Every other command given twice: the same files, the same words, the same exit code; killed, it goes on."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from moebed.cli import main
from tests.twice.conftest import fit, write_model


def kept(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder but TensorBoard's events, of which each command adds some."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tfevents" not in path.name
    }


@pytest.fixture(scope="module")
def run(run_recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert fit(run_recipe, folder) == 0
    return folder


def test_fit_twice_changes_nothing(run_recipe, run):
    before = kept(run)
    assert {"checkpoints/last.ckpt", "config.yaml", "run_summary.json", "summary.json", "report.html"} <= set(before)
    assert fit(run_recipe, run) == 0
    after = kept(run)
    changed = {name for name in before if after.get(name) != before[name]}
    assert (set(after) - set(before), changed - {"checkpoints/last.ckpt"}) == (set(), set())
    assert torch.load(run / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_evaluations_say_the_same_and_write_nothing(run_recipe, run, capfd):
    before, said = kept(run), []
    for _ in range(2):
        for command in ("validate", "test"):
            assert fit(run_recipe, run, command=command) == 0
        said.append([line for line in capfd.readouterr().out.splitlines() if "loss" in line or "bits" in line])
    assert said[0] == said[1]
    assert said[0]
    assert kept(run) == before


def test_predict_twice_gives_the_same_bytes(run_recipe, run):
    assert fit(run_recipe, run, command="predict") == 0
    first = (run / "token_losses.npz").read_bytes()
    assert fit(run_recipe, run, command="predict") == 0
    assert (run / "token_losses.npz").read_bytes() == first
    (run / "token_losses.npz").unlink()


def test_report_twice_gives_the_same_page(run, tmp_path):
    for name in ("one.html", "two.html"):
        assert main(["report", str(run), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


@pytest.mark.parametrize("command", ["export", "upcycle"])
def test_a_checkpoint_written_twice_is_the_same_and_none_is_overwritten(command, run, tmp_path, capsys):
    if command == "export":
        arguments = ["export", str(run / "checkpoints" / "last.ckpt"), "--out"]
    else:
        write_model(tmp_path / "unused")
        torch.manual_seed(0)
        from moebed.checkpoints import write_checkpoint
        from tests.twice.conftest import SIZES, Decoder, ModelConfig

        dense = Decoder(ModelConfig(**{**SIZES, "num_experts": 0}))
        write_checkpoint(dense, "mistral", tmp_path / "dense", torch.float32)
        arguments = ["upcycle", str(tmp_path / "dense"), "--method", "copy", "--num-experts", "2", "--out"]
    folders = [tmp_path / "a" / "model", tmp_path / "b" / "model"]
    for folder in folders:
        assert main([*arguments, str(folder)]) == 0
    first, second = (kept(folder) for folder in folders)
    first.pop("start.yaml", None), second.pop("start.yaml", None)  # it names its folder
    assert first == second
    capsys.readouterr()
    assert main([*arguments, str(folders[0])]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert kept(folders[0]).items() >= first.items()


def test_size_twice_says_the_same(run_recipe, capsys):
    said = []
    for _ in range(2):
        assert main(["size", str(run_recipe)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def _study(folder: Path, recipe: Path) -> Path:
    path = folder / "study.yaml"
    content = {
        "base": str(recipe),
        "question": "Does it run twice?",
        "baseline": "one",
        "arms": {"one": {}, "two": {"model.config.num_experts_per_tok": 1, "model.config.norm_topk_prob": False}},
        "seeds": [0],
        "budget": {"steps": 2},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_study_twice_runs_nothing_again(run_recipe, tmp_path, capfd):
    study, out = _study(tmp_path, run_recipe), tmp_path / "out"
    assert main(["study", str(study), "--out", str(out)]) == 0
    before = kept(out)
    assert main(["study", str(study), "--out", str(out)]) == 0
    assert kept(out) == before
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0


def _started(recipe: Path, folder: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "moebed.cli", "fit", "--config", str(recipe), "--ckpt_path", "last"]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.max_steps", str(steps)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def whole(run_recipe, tmp_path_factory) -> Path:
    """The folder of a run that nothing killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert _started(run_recipe, folder, 40).wait() == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.05, 0.2])
def test_a_run_killed_and_continued_leaves_what_the_whole_one_leaves(run_recipe, whole, tmp_path, after):
    process = _started(run_recipe, tmp_path / "run", 40)
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert _started(run_recipe, tmp_path / "run", 40).wait() == 0
    wanted, found = kept(whole), kept(tmp_path / "run")
    compared = [name for name in wanted if name.startswith("results/") or name == "summary.json"]
    assert len(compared) == 4
    assert [found[name] for name in compared] == [wanted[name] for name in compared]
    states = [torch.load(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (whole, tmp_path / "run")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".partial", ".old"))]
