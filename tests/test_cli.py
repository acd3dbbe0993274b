"""The command line as a person meets it: what it writes, and one line with exit code 2 when it cannot."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moebed.cli import SPINCOUNT, main
from moebed.machine.precision import computed_in
from moebed.model.config import ModelConfig
from probes.report.units import UNITS, unit_of
from tests.small_run import probing, small_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[1]
PROBED = ["balance", "norm_vs_score", "matrix_similarity"]


@pytest.fixture
def recipe(tmp_path):
    """A run that takes a second, as a YAML file, and its content to change."""
    content = small_recipe(
        tmp_path,
        trainer={"max_steps": 6, "val_check_interval": 3, "callbacks": probing(6, probes=PROBED)},
    )

    def write(change=None):
        if change:
            change(content)
        return write_recipe(tmp_path, content)

    return write


def _fails(capsys, arguments, *words):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    return lines[0]


def test_fit_writes_a_whole_run_folder_and_continues(recipe, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, run = recipe(), tmp_path / "run"
    assert main(["fit", "--config", str(path)]) == 0
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert "<html" in (run / "report.html").read_text()[:2000]
    summary = json.loads((run / "run_summary.json").read_text())
    assert summary["step"] == 6
    assert 0 < summary["val/bits_per_byte"] < 8.5
    assert summary["gzip -9 bits per byte"] > 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert summary["computed in"] == (said := computed_in(config["trainer"]["precision"]))
    assert f"Computed in {said}." in (run / "report.html").read_text(encoding="utf-8")
    assert ModelConfig.from_dict(config["model"]["config"]).num_experts == 4
    assert {path.name for path in (run / "results").glob("*.npz")} >= {"balance.npz", "norm_vs_score.npz"}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/bits_per_byte", "train/load_balancing_loss", "val/bits_per_byte"} <= set(
        tags["scalars"]
    )
    assert set(UNITS) <= {part for tag in tags["scalars"] for part in tag.split("/")}  # of the report's curves
    history = [json.loads(line) for line in (run / "results" / "history.jsonl").read_text().splitlines()]
    drawn = [*history[-1]["headlines"], *(name for name in history[-1]["scalars"] if "/layer_" in name)]
    assert drawn
    assert [name for name in drawn if not unit_of(name)] == []  # each panel says what its numbers are in
    assert any(tag.startswith("layers/balance/max_violation/layer_00") for tag in tags["scalars"])
    assert any(tag.startswith("matrix_similarity/") for tag in tags["images"])
    assert {"run/config/text_summary", "run/computed_in/text_summary", "run/samples/text_summary"} <= set(
        tags["tensors"]
    )

    _fails(capsys, ["fit", "--config", path], "already holds a run", "--ckpt_path last")
    before = (run / "run_summary.json").read_text()
    assert main(["fit", "--config", str(path), "--ckpt_path", "last"]) == 0  # finished: nothing more to train
    assert (run / "run_summary.json").read_text() == before
    assert main(["fit", "--config", str(path), "--ckpt_path", "last", "--trainer.max_steps", "9"]) == 0
    assert json.loads((run / "run_summary.json").read_text())["step"] == 9
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 9  # saved every second step, and after the last one
    assert main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]) == 0
    assert "val/bits_per_byte" in capsys.readouterr().out
    assert main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]) == 0
    assert capsys.readouterr().err.count("reads ") == 1
    with np.load(run / "token_losses.npz") as losses:
        predicted = losses["labels"] != -100
        assert predicted.sum() > 50
        assert (losses["nats"][predicted] > 0).all()
        assert (losses["nats"][~predicted] == 0).all()
    assert main(["report", str(run), "--out", str(tmp_path / "two.html")]) == 0
    assert (tmp_path / "two.html").stat().st_size > 10_000


def test_a_run_without_validation_ends_well(recipe, tmp_path):
    path = recipe(lambda content: content["trainer"].update(limit_val_batches=0, max_steps=2, callbacks=[]))
    assert main(["fit", "--config", str(path)]) == 0
    summary = json.loads((tmp_path / "run" / "run_summary.json").read_text())
    assert set(summary) == {"step", "computed in", "train/loss", "train/tokens_per_second"}


def _recorded(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["precision"]


def _machine(monkeypatch, bfloat16):
    """A CPU of 100 GFLOP/s a core in float32."""
    monkeypatch.setattr("moebed.machine.precision.measured_rates", lambda: (100.0, bfloat16))


def test_auto_precision_is_written_as_what_it_became_and_kept_elsewhere(recipe, tmp_path, capsys, monkeypatch):
    def short(content):
        content["trainer"] |= {"limit_val_batches": 0, "max_steps": 2, "callbacks": []}

    path, run = recipe(short), tmp_path / "run"
    _machine(monkeypatch, 800.0)
    assert main(["fit", "--config", str(path)]) == 0
    assert "precision auto: bf16-mixed here (a core multiplies bf16 at 800" in capsys.readouterr().err
    assert _recorded(run) == "bf16-mixed"

    _machine(monkeypatch, 2.0)  # the run goes on at another machine
    assert main(["fit", "--config", str(path), "--ckpt_path", "last", "--trainer.max_steps", "4"]) == 0
    assert f"precision auto: bf16-mixed, as {run / 'config.yaml'} has it" in capsys.readouterr().err
    assert _recorded(run) == "bf16-mixed"
    last = run / "checkpoints" / "last.ckpt"
    elsewhere = ["fit", "--config", str(path), "--trainer.max_steps", "5", "--trainer.default_root_dir"]
    assert main([*elsewhere, str(tmp_path / "two"), "--ckpt_path", str(last)]) == 0
    alone = tmp_path / "alone" / "a" / "kept.ckpt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(last.read_bytes())  # without the config that it was written under
    assert main([*elsewhere, str(tmp_path / "three"), "--ckpt_path", str(alone)]) == 0
    assert _recorded(tmp_path / "two") == _recorded(tmp_path / "three") == "bf16-mixed"
    assert main([*elsewhere, str(tmp_path / "four")]) == 0
    assert _recorded(tmp_path / "four") == "32-true"
    one_more = ["--ckpt_path", "last", "--trainer.precision", "32-true", "--trainer.max_steps", "6"]
    assert main(["fit", "--config", str(path), *one_more]) == 0  # a person decides
    assert _recorded(run) == "32-true"


def test_a_run_computes_in_what_auto_became(recipe, monkeypatch):
    from moebed.training.module import MoEModule

    seen = []
    step = MoEModule.training_step

    def spy(self, batch, batch_idx):
        seen.append((self.trainer.precision, torch.is_autocast_enabled("cpu")))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MoEModule, "training_step", spy)

    def short(content):
        content["trainer"] |= {"limit_val_batches": 0, "max_steps": 1, "callbacks": []}

    path = recipe(short)
    for number, bfloat16 in enumerate((800.0, 2.0)):
        _machine(monkeypatch, bfloat16)
        folder = str(path.parent / str(number))
        assert main(["fit", "--config", str(path), "--trainer.default_root_dir", folder]) == 0
    assert seen == [("bf16-mixed", True), ("32-true", False)]


def test_a_log_is_told_of_a_long_first_step_and_of_the_way_on(recipe, capsys, monkeypatch):
    from moebed.machine import progress
    from moebed.training import progress as training_progress
    from moebed.training.module import MoEModule

    step = MoEModule.training_step

    def slow(self, batch, batch_idx):
        time.sleep(0.5 if self.global_step == 0 else 0.1)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MoEModule, "training_step", slow)
    monkeypatch.setattr(progress, "SECONDS", 0.1)
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (0.2, 0.1))
    monkeypatch.setattr(training_progress, "SILENCE", 0.3)
    monkeypatch.setattr(training_progress, "FORECAST_SECONDS", 0.15)
    path = recipe(lambda content: content["trainer"].pop("enable_progress_bar"))
    assert main(["fit", "--config", str(path)]) == 0
    said = capsys.readouterr().err
    first, then = said.index("step 1 is going on, 0 s so far"), said.index("first steps: ")
    assert first < then < said.index("step 5 of 6, loss ") < said.index("step 6 of 6, loss ")
    assert "to come take about " in said[then:].splitlines()[0]
    assert "s left" in said[said.index("step 5 of 6") :].splitlines()[0]
    assert "\r" not in said


def test_no_progress_is_shown_where_none_is_wanted(recipe, capsys, monkeypatch):
    from moebed.machine import progress

    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (0.0, 0.0))
    assert main(["fit", "--config", str(recipe())]) == 0
    said = capsys.readouterr().err
    assert not [words for words in ("going on", "so far", " left", "first steps") if words in said]


def _set(content, dotted, value):
    *parents, last = dotted.split(".")
    for key in parents:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("dotted", "value", "words"),
    [
        ("model.config.num_experts_per_tok", 5, ["num_experts_per_tok is 5", "4 experts"]),
        ("model.config.num_attention_heads", 5, ["hidden_size 32 is not divisible by num_attention_heads 5"]),
        ("model.config.num_expert", 5, ["unknown key", "num_expert"]),
        ("trainer.max_step", 5, ["unknown key", "max_step"]),
        ("model.config.hidden_act", "relu", ["hidden_act", "relu"]),
        ("model.config.hidden_size", "wide", ["hidden_size", "wide"]),
        ("model.config.router", "sofmax_topk", ["router is 'sofmax_topk'", "did you mean 'softmax_topk'?"]),
        ("model.config.vocab_size", 100, ["vocab_size is 100"]),
        ("data.sources", [{"name": "x", "kind": "files", "path": "nowhere/at/all.txt"}], ["nowhere/at/all.txt"]),
        ("data.tokenizer", {"kind": "auto", "path": "nowhere/tokenizer"}, ["nowhere/tokenizer"]),
        (
            "trainer.callbacks",
            [{"class_path": "probes.ProbeCallback", "init_args": {"probes": ["balanc"]}}],
            ["balanc"],
        ),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(recipe, tmp_path, capsys, dotted, value, words):
    path = recipe(lambda content: _set(content, dotted, value))
    _fails(capsys, ["fit", "--config", path], *words)
    assert not (tmp_path / "run").exists()


def test_empty_corpus(recipe, tmp_path, capsys):
    path = recipe()
    (tmp_path / "text.txt").write_text("\n \n")
    _fails(capsys, ["fit", "--config", path], "'text' has no text")
    assert not (tmp_path / "run").exists()


def test_output_folder_that_cannot_be_written(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    path = recipe(lambda content: _set(content, "trainer.default_root_dir", str(tmp_path / "file" / "run")))
    _fails(capsys, ["fit", "--config", path], str(tmp_path / "file" / "run"), "cannot be written", "default_root_dir")


@pytest.mark.parametrize("name", ["summary.json", "run_summary.json"])
def test_a_run_does_not_replace_the_results_of_a_probing_or_of_tasks(recipe, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    for more in ([], ["--ckpt_path", "last"]):
        _fails(capsys, ["fit", "--config", recipe(), *more], str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize("command", ["probe", "tasks", "report"])
def test_so_it_is_said_of_other_commands_before_any_work(command, tmp_path, capsys):
    """By the option that they have; a report is drawn for a minute before it is written."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "run_summary.json").write_text("{")
    more = ["--tasks", "moebed_recall"] if command == "tasks" else []
    out = tmp_path / "file" / "out" / "page.html"
    line = _fails(capsys, [command, tmp_path, "--out", out, *more], "cannot be written", "--out")
    assert "default_root_dir" not in line


def test_what_is_misspelt_is_one_line_whatever_the_command(capsys):
    """Of the commands that have parsers of their own kind as well."""
    for given in (["ft"], ["bench"], ["bench", "trian"], ["bench", "train", "--size"]):
        capsys.readouterr()
        assert main(given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--help` lists" in line or "did you mean" in line


def test_the_folder_of_a_run_in_the_place_of_its_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    for given in (tmp_path, tmp_path / "checkpoints"):
        for command in ("export", "probe"):
            _fails(capsys, [command, given, "--out", tmp_path / "o"], f"give its checkpoint, {tmp_path}", "last.ckpt")


def test_missing_recipe_and_missing_checkpoint(recipe, tmp_path, capsys):
    _fails(capsys, ["fit", "--config", tmp_path / "none.yaml"], "none.yaml")
    _fails(capsys, ["validate", "--config", recipe()], "needs a checkpoint")
    _fails(capsys, ["validate", "--config", recipe(), "--ckpt_path", tmp_path / "none.ckpt"], "none.ckpt")
    _fails(capsys, ["report", tmp_path / "norun"], "norun")


@pytest.mark.skipif(not torch.backends.openmp.is_available() or sys.platform != "linux", reason="GNU's OpenMP")
def test_threads_spin_as_long_as_they_are_told():
    """What GNU's OpenMP says when PyTorch brings it along."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-m", "moebed.cli", "size", "recipes/tiny_mixtral.yaml"]
    told = {**environment, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(command, capture_output=True, text=True, env=told, cwd=ROOT)
    assert f"GOMP_SPINCOUNT = '{SPINCOUNT}'" in done.stderr, done.stderr


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_what_a_person_has_set_of_spinning_stays(given, monkeypatch):
    monkeypatch.setattr("os.environ", dict(given))
    monkeypatch.setattr(sys, "argv", ["moebed"])
    assert main() == 0
    assert os.environ == given


def test_help_is_quick_and_complete():
    begin = os.times()
    done = subprocess.run([sys.executable, "-m", "moebed.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert os.times().children_user - begin.children_user < 1  # of the processor, whatever else is running
    assert done.returncode == 0
    for command in ("fit", "validate", "test", "predict", "report", "bench"):
        assert command in done.stdout


def test_fit_help_has_a_sentence_for_every_model_knob(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    import dataclasses

    from moebed.model.routers import all_options

    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "router_options"]
    names += [f"router_options.{field.name}" for field in dataclasses.fields(all_options())]
    options = text[text.index("options:") :]
    for name in names:
        values = (f"--model.config.{name} {{", f"--model.config.{name} {name.rpartition('.')[2].upper()}")
        at = max(options.find(value) for value in values)
        assert at >= 0, name
        sentence = options[at : at + 400].split("(type:")[0]
        assert len(sentence.split()) > 3, name
