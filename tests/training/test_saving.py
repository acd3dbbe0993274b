"""When a run saves, and what it calls its files."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from moebed.cli import main
from tests.parallel.forked import start
from tests.training.saving_runs import ACCUMULATE, callback, last, require_same_model, scalars


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        (5, signal.SIGINT),
        pytest.param(5, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(4, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(7, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_between_micro_batches_waits_for_the_end_of_the_step(run, whole, batch, number):
    """SIGTERM by default stops the runs of ``test_step_numbers.py``; here Ctrl-C does."""
    stops = json.dumps(callback("Signal", batch=batch, number=int(number)))
    code, said, folder = run("run", *ACCUMULATE, "--trainer.callbacks", stops)
    assert code == 128 + number
    assert ("Ctrl-C again ends at once" in said) == (number == signal.SIGINT)
    assert "stopped at step 2" in said
    assert last(folder)["global_step"] == 2
    assert run("run", *ACCUMULATE, "--ckpt_path", "last")[0] == 0
    require_same_model(last(folder), last(whole))
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert scalars(folder, tag) == scalars(whole, tag)


def test_ctrl_c_that_leaves_no_checkpoint_is_said_with_its_exit_code(run, recipe, tmp_path, monkeypatch, capfd):
    """Before the first step, and pressed twice; a shell sees 130, and the folder goes on."""
    monkeypatch.setattr("moebed.cli._require_utf8", lambda: None)
    for hook, times in (("on_fit_start", 1), ("on_train_batch_end", 2)):
        folder = tmp_path / hook
        stops = json.dumps(callback("Interrupted", hook=hook, times=times))
        place = ["--trainer.default_root_dir", str(folder), "--trainer.callbacks", stops]
        monkeypatch.setattr(sys, "argv", ["moebed", "fit", "--config", str(recipe), *place])
        try:
            assert main() == 130
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
        told = capfd.readouterr()
        said = [line for line in (told.out + told.err).splitlines() if "interrupt" in line.lower()]
        assert said == ["moebed: interrupted"]  # and nothing that Lightning says of it
        assert not (folder / "checkpoints" / "last.ckpt").exists()
        assert run(hook, "--ckpt_path", "last")[0] == 0


def test_a_sigterm_before_the_first_step_ends_the_run_after_it(run):
    """As in the probing of the untrained model."""
    stops = json.dumps(callback("Interrupted", hook="on_train_start", number=int(signal.SIGTERM)))
    code, said, folder = run("run", *ACCUMULATE, "--trainer.callbacks", stops)
    assert code == 143, said
    assert "stopped at step 1, saved in" in said
    assert last(folder)["global_step"] == 1


def test_a_signal_in_the_last_step_does_not_wait_for_what_comes_after_it(run, whole):
    """As in a probing that falls due with it: validation, the last pictures and the report can take minutes."""
    stops = json.dumps(callback("Interrupted", hook="on_train_batch_end", step=6))
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.save_top_k", -1, "--checkpoint.every_n_train_steps", 6]
    code, said, folder = run("run", *ACCUMULATE, *best, "--trainer.callbacks", stops)
    assert code == 130, said
    assert "stopped at step 6, saved in" in said
    assert not (folder / "run_summary.json").exists()
    assert run("run", *ACCUMULATE, *best, "--ckpt_path", "last")[0] == 0
    assert list((folder / "checkpoints").glob("*step=6.ckpt"))  # which waited for its validation
    require_same_model(last(folder), last(whole))
    assert scalars(folder, "val/loss") == scalars(whole, "val/loss")


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        pytest.param("on_save_checkpoint", signal.SIGTERM, marks=pytest.mark.slow),  # when it is not saved yet
        pytest.param("on_validation_start", signal.SIGINT, marks=pytest.mark.slow),
        ("on_train_end", signal.SIGINT),
    ],
)
def test_a_signal_after_the_last_step_ends_the_run_at_once(run, whole, hook, number):
    """The last step is saved by then; what comes after it, validation and probing, is done when the run goes on."""
    probing = [{"class_path": "probes.ProbeCallback", "init_args": {"probes": ["balance"], "at_start": False}}]
    stops = callback("Interrupted", hook=hook, step=6, number=int(number))
    code, said, folder = run("run", *ACCUMULATE, "--trainer.callbacks", json.dumps(stops + probing))
    assert code == 128 + number, said
    assert "the last step is saved; --ckpt_path last does what is left" in said
    assert not (folder / "run_summary.json").exists()
    assert not (folder / "summary.json").exists()
    assert last(folder)["global_step"] == 6
    assert run("run", *ACCUMULATE, "--trainer.callbacks", json.dumps(probing), "--ckpt_path", "last")[0] == 0
    assert json.loads((folder / "summary.json").read_text())["step"] == 6
    require_same_model(last(folder), last(whole))
    assert dict(scalars(folder, "val/loss")) == dict(scalars(whole, "val/loss"))


@pytest.mark.parametrize(
    ("hook", "options"),
    [
        ("on_train_end", ["--trainer.max_steps", -1, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 4]),
        ("on_validation_batch_end", ["--trainer.max_steps", 3]),  # of the closing numbers; it is not one that is due
    ],
)
def test_nor_where_epochs_end_the_run_and_in_the_validation_after_it(run, hook, options):
    """Lightning made exit code 0 of it, or nothing at all."""
    stops = json.dumps(callback("Interrupted", hook=hook, step=3, number=int(signal.SIGTERM)))
    code, said, folder = run("run", *options, "--trainer.callbacks", stops)
    assert code == 143, said
    assert "the last step is saved; --ckpt_path last does what is left" in said
    assert not (folder / "run_summary.json").exists()
    assert run("run", *options, "--ckpt_path", "last")[0] == 0
    assert json.loads((folder / "run_summary.json").read_text())["step"] == last(folder)["global_step"] >= 3


def test_sigterm_ends_a_validation_alone_as_it_ends_any_process(run, recipe, whole, tmp_path):
    """Of which nothing is kept; Lightning made exit code 0 of it."""

    def before(rank):
        from moebed.training.module import MoEModule

        MoEModule.on_validation_batch_end = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    checkpoint = str(whole / "checkpoints" / "last.ckpt")
    arguments = ["validate", "--config", str(recipe), "--trainer.default_root_dir", str(tmp_path / "run")]
    ranks = start([*arguments, "--ckpt_path", checkpoint], 1, tmp_path / "logs", before)
    assert ranks.wait(60) == [-signal.SIGTERM], ranks.said


def test_ctrl_c_in_a_validation_ends_with_a_checkpoint_that_goes_on(run, whole):
    stops = json.dumps(callback("Interrupted", hook="on_validation_batch_end"))
    code, said, folder = run("run", *ACCUMULATE, "--trainer.callbacks", stops)
    assert code == 130, said
    assert last(folder)["global_step"] == 3
    assert run("run", *ACCUMULATE, "--ckpt_path", "last")[0] == 0
    require_same_model(last(folder), last(whole))


def test_the_clock_waits_for_the_end_of_the_step(run, tmp_path):
    watch = ["--trainer.callbacks", json.dumps(callback("Saves", path=str(tmp_path / "saves")))]
    assert run("run", *ACCUMULATE, *watch, "--checkpoint.train_time_interval", "0:00:00")[0] == 0
    assert (tmp_path / "saves").read_text().split() == ["4", "8", "12", "16", "20", "24"]


def test_files_are_named_and_ranked_by_the_validation_of_their_own_step(run):
    """Saves are due at steps 3 and 6, validation comes at 2, 4 and 6."""
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.filename", "{step}-{val/loss:.5f}"]
    keep = ["--checkpoint.save_top_k", "-1", "--checkpoint.every_n_train_steps", "3"]
    code, said, folder = run("run", *best, *keep)
    assert code == 0, said
    losses = {step + 1: value for step, value in scalars(folder, "val/loss")}
    assert sorted(losses) == [2, 4, 6]
    wanted = {f"step={step}-val_loss={losses[step]:.5f}.ckpt" for step in (4, 6)}
    assert {file.name for file in (folder / "checkpoints").iterdir()} == wanted | {"last.ckpt"}
    for name in wanted:
        assert last(folder, name)["global_step"] == int(name[5])
    code, said, _ = run("other", *keep, "--checkpoint.monitor", "val/loss", "--checkpoint.filename", "{val/los}")
    assert code == 2
    assert "checkpoint.filename asks for 'val/los', which is not logged" in said


BY_STEPS = ["--checkpoint.every_n_train_steps", 2]
BY_EPOCHS = ["--checkpoint.every_n_train_steps", "null", "--checkpoint.every_n_epochs", 1]


@pytest.mark.parametrize(
    ("due", "monitor"),
    [
        pytest.param(BY_STEPS, [], id="steps"),
        pytest.param(BY_EPOCHS, [], id="epochs", marks=pytest.mark.slow),
        pytest.param(BY_EPOCHS, ["--checkpoint.monitor", "val/loss"], id="epochs, ranked", marks=pytest.mark.slow),
    ],
)
def test_a_signal_at_a_step_that_is_saved_leaves_out_none_of_its_files(run, due, monitor):
    """An epoch has two steps; the run goes on after this one, and comes to it no more."""
    epochs = ["--trainer.limit_train_batches", 2, "--trainer.val_check_interval", 2]
    options = [*epochs, *due, *monitor, "--checkpoint.save_top_k", -1, "--checkpoint.filename", "{step}"]
    stops = json.dumps(callback("Interrupted", hook="on_train_batch_end", step=4, number=int(signal.SIGTERM)))
    code, said, folder = run("run", *options, "--trainer.callbacks", stops)
    assert code == 143, said
    assert "stopped at step 4" in said
    assert run("run", *options, "--ckpt_path", "last")[0] == 0
    wanted = {f"step={step}.ckpt" for step in (2, 4, 6)} | {"last.ckpt"}
    assert {file.name for file in (folder / "checkpoints").iterdir()} == wanted
    assert last(folder, "step=4.ckpt")["global_step"] == 4


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_link_to_the_last_checkpoint_is_never_to_an_older_one(run, mode):
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.save_top_k", 1, "--checkpoint.mode", mode]
    code, said, folder = run("run", *best, "--checkpoint.save_last", "link", "--checkpoint.every_n_train_steps", 2)
    assert code == 0, said
    assert last(folder)["global_step"] == 6
    assert os.path.islink(folder / "checkpoints" / "last.ckpt") == (mode == "min")
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_a_try_of_one_batch_leaves_nothing(run):
    code, said, folder = run("run", "--trainer.fast_dev_run", "true")
    assert code == 0, said
    assert not folder.exists()


def test_validation_counts_steps_and_says_so(run):
    code, said, folder = run("run", *ACCUMULATE)
    assert code == 0
    assert "a step has 4 micro-batches; val_check_interval, checkpoints, probes and log count steps" in said
    assert [step + 1 for step, _ in scalars(folder, "val/loss")] == [2, 4, 6]


def test_saving_in_the_middle_of_a_step_cannot_be_asked_for(run):
    code, said, folder = run("run", "--checkpoint.save_on_exception", "true")
    assert code == 2
    assert "checkpoint.save_on_exception would save in the middle of a step" in said
    assert not Path(folder).exists()


def _own_checkpoints(**arguments):
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}


@pytest.mark.parametrize("asked", [{"train_time_interval": "0:00:00"}, {"save_on_exception": True}])
def test_nor_of_a_callback_beside(run, asked):
    code, said, folder = run("run", *ACCUMULATE, "--trainer.callbacks", json.dumps([_own_checkpoints(**asked)]))
    assert code == 2
    assert f"trainer.callbacks: ModelCheckpoint.{next(iter(asked))} would save in the middle of a step" in said
    assert not Path(folder).exists()


def test_validation_by_the_clock_waits_for_the_end_of_the_step_and_so_do_callbacks_that_save_then(run, tmp_path):
    """Every micro-batch is time to validate, and every validation time to save."""
    own = _own_checkpoints(dirpath=str(tmp_path / "own"), save_top_k=-1, filename="{step}")
    callbacks = json.dumps([own, *callback("Saves", path=str(tmp_path / "saves"))])
    options = ["--trainer.val_check_interval", "00:00:00:00", "--trainer.limit_val_batches", 1]
    code, said, folder = run("run", *ACCUMULATE, *options, "--trainer.callbacks", callbacks)
    assert code == 0, said
    assert [step + 1 for step, _ in scalars(folder, "val/loss")] == [1, 2, 3, 4, 5, 6]
    micro_batches = [int(line) for line in (tmp_path / "saves").read_text().split()]
    assert set(micro_batches) == {4, 8, 12, 16, 20, 24}
    assert len({file.name for file in (tmp_path / "own").iterdir()}) == 6


@pytest.mark.slow
def test_a_callback_beside_does_not_save_what_it_goes_on_from_amid_the_next_step(run, tmp_path):
    stopped = json.dumps(callback("Stop", step=3))
    run("run", *ACCUMULATE, "--trainer.callbacks", stopped)
    own = _own_checkpoints(dirpath=str(tmp_path / "own"), every_n_train_steps=1, save_top_k=-1, filename="{step}")
    code, said, _ = run("run", *ACCUMULATE, "--ckpt_path", "last", "--trainer.callbacks", json.dumps([own]))
    assert code == 0, said
    assert {file.name for file in (tmp_path / "own").iterdir()} == {f"step={step}.ckpt" for step in (4, 5, 6)}
