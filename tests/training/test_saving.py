"""When a run saves, what it calls its files, and that it goes on from them as if it had never stopped."""

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from moebed.cli import main
from tests.small_run import made_up_text, small_recipe, write_recipe


class Signal(Callback):
    """Sends this process a signal after a micro-batch."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


class Stop(Callback):
    """Ends the run early, after a step that nothing else saves at."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


class Saves(Callback):
    """Writes after how many micro-batches each checkpoint is taken."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        with self.path.open("a") as file:
            file.write(f"{trainer.fit_loop.epoch_loop.batch_progress.current.ready}\n")


ACCUMULATE = ["--trainer.accumulate_grad_batches", 4]


@pytest.fixture(scope="module", autouse=True)
def _without_reports():
    """Drawing a report's figures takes longer than the run that it is of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probes.report.page.write_report", lambda runs, path: path)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Of a run of a second; all runs share its text."""
    folder = tmp_path_factory.mktemp("recipe")
    content = small_recipe(
        folder,
        made_up_text(90),
        trainer={"precision": "32-true", "max_steps": 6},
        checkpoint={"every_n_train_steps": 1000},
        samples={"prompt_tokens": 2, "new_tokens": 1},
        config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "moe_intermediate_size": 16},
        model={"optimizer": {"warmup_steps": 2, "learning_rate": 0.01}},
        data={"sequence_length": 16, "max_validation_windows": 2},
    )
    del content["trainer"]["default_root_dir"]
    return write_recipe(folder, content)


def _call(recipe, folder, *options, command="fit"):
    place = [] if folder is None else ["--trainer.default_root_dir", str(folder)]
    try:
        return main([command, "--config", str(recipe), *place, *map(str, options)])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of a run of four micro-batches a step that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert _call(recipe, folder, *ACCUMULATE) == 0
    return folder


@pytest.fixture
def run(recipe, tmp_path, capfd):
    """Calls a training command; gives its exit code, what it said, and the run's folder."""

    def call(name, *options, command="fit", config=recipe, folder=True):
        capfd.readouterr()
        code = _call(config, tmp_path / name if folder else None, *options, command=command)
        return code, "".join(capfd.readouterr()), tmp_path / name

    return call


def _last(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def _require_same_model(one, other):
    assert one["global_step"] == other["global_step"]
    for name, value in other["state_dict"].items():
        assert torch.equal(value, one["state_dict"][name]), name
    for number, state in other["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, one["optimizer_states"][0]["state"][number][key]), (number, key)


def _scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _callback(kind, **arguments):
    return [{"class_path": f"tests.training.test_saving.{kind}", "init_args": arguments}]


@pytest.mark.parametrize("batch", [5, pytest.param(4, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)])
def test_sigterm_between_micro_batches_waits_for_the_end_of_the_step(run, whole, batch):
    code, said, folder = run("run", *ACCUMULATE, "--trainer.callbacks", json.dumps(_callback("Signal", batch=batch)))
    assert code == 143
    assert "stopped at step 2" in said
    assert _last(folder)["global_step"] == 2
    assert run("run", *ACCUMULATE, "--ckpt_path", "last")[0] == 0
    _require_same_model(_last(folder), _last(whole))
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert _scalars(folder, tag) == _scalars(whole, tag)


def test_the_clock_waits_for_the_end_of_the_step(run, tmp_path):
    watch = ["--trainer.callbacks", json.dumps(_callback("Saves", path=str(tmp_path / "saves")))]
    assert run("run", *ACCUMULATE, *watch, "--checkpoint.train_time_interval", "0:00:00")[0] == 0
    assert (tmp_path / "saves").read_text().split() == ["4", "8", "12", "16", "20", "24"]


def test_files_are_named_and_ranked_by_the_validation_of_their_own_step(run):
    """Saves are due at steps 3 and 6, validation comes at 2, 4 and 6."""
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.filename", "{step}-{val/loss:.5f}"]
    keep = ["--checkpoint.save_top_k", "-1", "--checkpoint.every_n_train_steps", "3"]
    code, said, folder = run("run", *best, *keep)
    assert code == 0, said
    losses = {step + 1: value for step, value in _scalars(folder, "val/loss")}
    assert sorted(losses) == [2, 4, 6]
    wanted = {f"step={step}-val_loss={losses[step]:.5f}.ckpt" for step in (4, 6)}
    assert {file.name for file in (folder / "checkpoints").iterdir()} == wanted | {"last.ckpt"}
    for name in wanted:
        assert _last(folder, name)["global_step"] == int(name[5])
    code, said, _ = run("other", *keep, "--checkpoint.monitor", "val/loss", "--checkpoint.filename", "{val/los}")
    assert code == 2
    assert "checkpoint.filename asks for 'val/los', which is not logged" in said


@pytest.mark.slow
def test_a_run_goes_on_from_a_ranked_file_bit_for_bit(run):
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.save_top_k", "-1", "--checkpoint.every_n_train_steps", 2]
    _, _, folder = run("run", *ACCUMULATE, *best)
    whole, curves = _last(folder), {tag: _scalars(folder, tag) for tag in ("train/loss", "val/loss")}
    path = folder / "checkpoints" / "epoch=0-step=4.ckpt"
    code, said, _ = run("run", *ACCUMULATE, *best, "--ckpt_path", path)
    assert code == 0
    assert f"continuing the run in {folder} from {path}, step 4" in said
    _require_same_model(_last(folder), whole)
    assert {tag: _scalars(folder, tag) for tag in curves} == curves


@pytest.mark.parametrize("mode", ["min", pytest.param("max", marks=pytest.mark.slow)])
def test_a_link_to_the_last_checkpoint_is_never_to_an_older_one(run, mode):
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.save_top_k", 1, "--checkpoint.mode", mode]
    code, said, folder = run("run", *best, "--checkpoint.save_last", "link", "--checkpoint.every_n_train_steps", 2)
    assert code == 0, said
    assert _last(folder)["global_step"] == 6
    assert os.path.islink(folder / "checkpoints" / "last.ckpt") == (mode == "min")
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_a_moved_run_is_itself_wherever_it_lies(run, tmp_path):
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.save_top_k", 1, "--checkpoint.every_n_train_steps", 2]
    _, _, first = run("a", *best)
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["checkpoint"]["dirpath"] is None
    assert saved["ckpt_path"] is None
    moved = first.rename(tmp_path / "b")
    config = moved / "config.yaml"

    code, said, _ = run("b", "--ckpt_path", "last", command="validate", config=config, folder=False)
    assert code == 2
    assert "the config is that of the run in" in said
    code, said, _ = run("b", "--ckpt_path", "last", config=config, folder=False)
    assert code == 2
    assert "add --trainer.default_root_dir" in said
    code, said, _ = run("b", "--ckpt_path", "last", command="validate", config=config)
    assert code == 0
    assert f"reads {moved / 'checkpoints' / 'last.ckpt'}, step 6" in said
    loss = json.loads((moved / "run_summary.json").read_text())["val/loss"]
    assert float(re.search(r"val/loss\D+([\d.]+)", said)[1]) == pytest.approx(loss, rel=1e-6)

    code, said, _ = run("b", "--ckpt_path", "last", "--trainer.max_steps", 8, config=config)
    assert code == 0
    assert "step 6" in said
    assert _last(moved)["global_step"] == 8
    assert len(list((moved / "checkpoints").glob("epoch*"))) == 1  # the best of before is known, and makes room
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_runs_config_begins_another_run_beside_it(run):
    _, _, first = run("a")
    before = (first / "checkpoints" / "last.ckpt").read_bytes()
    code, said, second = run("b", "--seed_everything", 8, config=first / "config.yaml")
    assert code == 0
    assert f"a new run in {second}" in said
    assert (first / "checkpoints" / "last.ckpt").read_bytes() == before
    assert (second / "checkpoints" / "last.ckpt").read_bytes() != before
    code, said, _ = run("c", "--checkpoint.dirpath", first / "checkpoints")
    assert code == 2
    assert "already holds a run's checkpoints" in said
    code, said, _ = run("b", "--ckpt_path", first / "checkpoints" / "last.ckpt")
    assert code == 2
    assert "already holds a run" in said


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_that_is_not_there_is_an_error(run, command):
    code, said, folder = run("none", "--ckpt_path", "last", command=command)
    assert code == 2
    assert f"there is no checkpoint {folder / 'checkpoints' / 'last.ckpt'} to {command}" in said
    assert run("none", "--ckpt_path", "best", command=command)[0] == 2


def test_last_begins_a_run_only_where_none_was(run):
    code, said, folder = run("run", "--ckpt_path", "last")
    assert code == 0
    assert f"a new run in {folder}, which has no checkpoint yet" in said
    (folder / "checkpoints" / "last.ckpt").unlink()
    code, said, _ = run("run", "--ckpt_path", "last")
    assert code == 2
    assert "there is no checkpoint" in said


def test_a_try_of_one_batch_leaves_nothing(run):
    code, said, folder = run("run", "--trainer.fast_dev_run", "true")
    assert code == 0, said
    assert not folder.exists()


def test_the_last_checkpoint_of_a_run_that_was_stopped_is_the_model_of_its_summary(run, whole):
    """And one that goes on from it is the run that was never stopped."""
    _, _, folder = run("run", *ACCUMULATE, "--trainer.callbacks", json.dumps(_callback("Stop", step=3)))
    summary = json.loads((folder / "run_summary.json").read_text())
    assert summary["step"] == _last(folder)["global_step"] == 3
    assert summary["train/loss"] == _scalars(folder, "train/loss")[-1][1]
    assert run("run", *ACCUMULATE, "--ckpt_path", "last")[0] == 0
    _require_same_model(_last(folder), _last(whole))
    assert _scalars(folder, "train/loss") == _scalars(whole, "train/loss")


@pytest.mark.slow
def test_epochs_end_with_a_checkpoint_that_goes_on(run):
    epochs = ["--trainer.max_steps", -1, "--trainer.limit_train_batches", 4, "--model.optimizer.schedule", "constant"]
    _, _, whole = run("whole", *epochs, "--trainer.max_epochs", 3)
    _, _, folder = run("run", *epochs, "--trainer.max_epochs", 2)
    assert _last(folder)["global_step"] == 8
    assert run("run", *epochs, "--trainer.max_epochs", 3, "--ckpt_path", "last")[0] == 0
    _require_same_model(_last(folder), _last(whole))


def test_validation_counts_steps_and_says_so(run):
    code, said, folder = run("run", *ACCUMULATE)
    assert code == 0
    assert "a step has 4 micro-batches; val_check_interval, checkpoints, probes and log count steps" in said
    assert [step + 1 for step, _ in _scalars(folder, "val/loss")] == [2, 4, 6]


@pytest.mark.slow
def test_a_step_may_have_other_micro_batches_after_a_stop(run):
    """Three steps of one micro-batch, then three of four: windows begin where steps do, validation where it did."""
    run("run", "--trainer.callbacks", json.dumps(_callback("Stop", step=3)))
    code, said, folder = run("run", *ACCUMULATE, "--ckpt_path", "last")
    assert code == 0
    assert "a step had 1 micro-batches and has 4 from step 3 on" in said
    saved = _last(folder)
    assert saved["global_step"] == 6
    assert saved["TextDataModule"]["train"]["position"] == 2 * (3 + 3 * 4)
    assert sorted({step + 1 for step, _ in _scalars(folder, "val/loss")}) == [2, 3, 4, 6]


def test_a_schedule_that_needs_a_length_asks_for_it_before_anything_is_written(run):
    code, said, folder = run("run", "--trainer.max_steps", -1)
    assert code == 2
    assert "model.optimizer.schedule cosine needs to know how many steps" in said
    assert not folder.exists()
    endless = ["--trainer.max_steps", -1, "--model.optimizer.schedule", "constant"]
    code, said, folder = run("run", *endless, "--trainer.callbacks", json.dumps(_callback("Stop", step=3)))
    assert code == 0, said
    assert [round(rate, 6) for _, rate in _scalars(folder, "train/learning_rate")] == [0.005, 0.01, 0.01]


def test_what_holds_otherwise_after_a_stop_is_said_and_holds(run):
    run("run", "--trainer.max_steps", 4)
    changed = ["--model.optimizer.learning_rate", 0.02, "--model.config.experts_backend", "loop"]
    more = ["--model.config.router_z_loss_coef", 0.1, "--trainer.max_steps", 6, "--ckpt_path", "last"]
    code, said, folder = run("run", *changed, *more)
    assert code == 0, said
    for sentence in (
        "experts_backend was 'auto' in the checkpoint and is 'loop' now",
        "router_z_loss_coef was 0.0 in the checkpoint and is 0.1 now",
        "the cosine schedule's number of steps was 4 and is 6 from step 4 on",
        "model.optimizer.learning_rate was 0.01 and is 0.02 from step 4 on",
    ):
        assert sentence in said
    rates = [rate for _, rate in _scalars(folder, "train/learning_rate")]
    assert rates[4] == pytest.approx(0.02 * (0.1 + 0.9 * 0.5))  # half-way between steps 2 and 6
    code, said, _ = run("run", "--model.config.num_experts_per_tok", 1, "--ckpt_path", "last")
    assert code == 2
    assert "the checkpoint's model differs from the config in num_experts_per_tok" in said


def test_random_states_of_more_gpus_than_there_are_do_not_matter(monkeypatch):
    from moebed.training.module import MoEModule
    from tests.conftest import tiny_config

    module, state = MoEModule(tiny_config()), torch.arange(3, dtype=torch.uint8)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: asked.append((value, device)))
    monkeypatch.setattr(MoEModule, "device", torch.device("cuda", 1))
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["rng"]["cuda"] is state
    for saved in (state, [torch.zeros(3), state], [state]):  # now, and as all devices were kept before
        checkpoint["rng"]["cuda"] = saved
        module.on_load_checkpoint(checkpoint)
        module.on_train_start()
    assert [(value.tolist(), device.index) for value, device in asked] == [([0, 1, 2], 1)] * 3


def test_what_a_killed_run_logged_after_its_checkpoint_is_taken_out(run):
    """Events that reached the disk after the last checkpoint, and one that a kill left unfinished."""
    from moebed.training.event_files import forget_between

    often = ["--checkpoint.every_n_train_steps", 2, "--trainer.max_steps", 4]
    _, _, folder = run("run", *often)
    wanted = {tag: _scalars(folder, tag) for tag in ("train/loss", "val/loss")}
    checkpoint = folder / "checkpoints" / "last.ckpt"
    kept = _last(folder)
    (file,) = folder.glob("tensorboard/events*")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    assert forget_between(file.parent, 0.0, 1.0) == 0
    assert file.read_bytes() == whole + whole[:20]
    assert forget_between(file.parent, kept["written_at"], 1e12) >= 1  # step 4's numbers, and its validation
    assert len(_scalars(folder, "train/loss")) == 3
    assert run("run", *often, "--trainer.max_steps", 6, "--ckpt_path", checkpoint)[0] == 0
    found = {tag: _scalars(folder, tag) for tag in wanted}
    for tag, values in wanted.items():
        assert found[tag][: len(values)] == values
        assert max(Counter(step for step, _ in found[tag]).values()) == 1


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
    callbacks = json.dumps([own, *_callback("Saves", path=str(tmp_path / "saves"))])
    options = ["--trainer.val_check_interval", "00:00:00:00", "--trainer.limit_val_batches", 1]
    code, said, folder = run("run", *ACCUMULATE, *options, "--trainer.callbacks", callbacks)
    assert code == 0, said
    assert [step + 1 for step, _ in _scalars(folder, "val/loss")] == [1, 2, 3, 4, 5, 6]
    micro_batches = [int(line) for line in (tmp_path / "saves").read_text().split()]
    assert set(micro_batches) == {4, 8, 12, 16, 20, 24}
    assert len({file.name for file in (tmp_path / "own").iterdir()}) == 6


@pytest.mark.slow
def test_a_callback_beside_does_not_save_what_it_goes_on_from_amid_the_next_step(run, tmp_path):
    stopped = json.dumps(_callback("Stop", step=3))
    run("run", *ACCUMULATE, "--trainer.callbacks", stopped)
    own = _own_checkpoints(dirpath=str(tmp_path / "own"), every_n_train_steps=1, save_top_k=-1, filename="{step}")
    code, said, _ = run("run", *ACCUMULATE, "--ckpt_path", "last", "--trainer.callbacks", json.dumps([own]))
    assert code == 0, said
    assert {file.name for file in (tmp_path / "own").iterdir()} == {f"step={step}.ckpt" for step in (4, 5, 6)}
