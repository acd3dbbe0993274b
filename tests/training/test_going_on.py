"""A run that goes on is the run that was never stopped, and one that begins is another."""

import json
import re
from collections import Counter

import pytest
import torch
import yaml

from tests.training.saving_runs import ACCUMULATE, callback, last, require_same_model, scalars


@pytest.mark.slow
def test_a_run_goes_on_from_a_ranked_file_bit_for_bit(run):
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.save_top_k", "-1", "--checkpoint.every_n_train_steps", 2]
    _, _, folder = run("run", *ACCUMULATE, *best)
    whole, curves = last(folder), {tag: scalars(folder, tag) for tag in ("train/loss", "val/loss")}
    path = folder / "checkpoints" / "epoch=0-step=4.ckpt"
    code, said, _ = run("run", *ACCUMULATE, *best, "--ckpt_path", path)
    assert code == 0
    assert f"continuing the run in {folder} from {path}, step 4" in said
    require_same_model(last(folder), whole)
    assert {tag: scalars(folder, tag) for tag in curves} == curves


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
    assert last(moved)["global_step"] == 8
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


def test_the_last_checkpoint_of_a_run_that_was_stopped_is_the_model_of_its_summary(run, whole):
    """And one that goes on from it is the run that was never stopped."""
    _, _, folder = run("run", *ACCUMULATE, "--trainer.callbacks", json.dumps(callback("Stop", step=3)))
    summary = json.loads((folder / "run_summary.json").read_text())
    assert summary["step"] == last(folder)["global_step"] == 3
    assert summary["train/loss"] == scalars(folder, "train/loss")[-1][1]
    assert run("run", *ACCUMULATE, "--ckpt_path", "last")[0] == 0
    require_same_model(last(folder), last(whole))
    assert scalars(folder, "train/loss") == scalars(whole, "train/loss")


@pytest.mark.slow
def test_a_step_may_have_other_micro_batches_after_a_stop(run):
    """Three steps of one micro-batch, then three of four: windows begin where steps do, validation where it did."""
    run("run", "--trainer.callbacks", json.dumps(callback("Stop", step=3)))
    code, said, folder = run("run", *ACCUMULATE, "--ckpt_path", "last")
    assert code == 0
    assert "a step had 1 micro-batches and has 4 from step 3 on" in said
    saved = last(folder)
    assert saved["global_step"] == 6
    assert saved["TextDataModule"]["train"]["position"] == 2 * (3 + 3 * 4)
    assert sorted({step + 1 for step, _ in scalars(folder, "val/loss")}) == [2, 3, 4, 6]


def test_a_schedule_that_needs_a_length_asks_for_it_before_anything_is_written(run):
    code, said, folder = run("run", "--trainer.max_steps", -1)
    assert code == 2
    assert "model.optimizer.schedule cosine needs to know how many steps" in said
    assert not folder.exists()
    endless = ["--trainer.max_steps", -1, "--model.optimizer.schedule", "constant"]
    code, said, folder = run("run", *endless, "--trainer.callbacks", json.dumps(callback("Stop", step=3)))
    assert code == 0, said
    assert [round(rate, 6) for _, rate in scalars(folder, "train/learning_rate")] == [0.005, 0.01, 0.01]


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
    rates = [rate for _, rate in scalars(folder, "train/learning_rate")]
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
    wanted = {tag: scalars(folder, tag) for tag in ("train/loss", "val/loss")}
    checkpoint = folder / "checkpoints" / "last.ckpt"
    kept = last(folder)
    (file,) = folder.glob("tensorboard/events*")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    assert forget_between(file.parent, 0.0, 1.0) == 0
    assert file.read_bytes() == whole + whole[:20]
    assert forget_between(file.parent, kept["written_at"], 1e12) >= 1  # step 4's numbers, and its validation
    assert len(scalars(folder, "train/loss")) == 3
    assert run("run", *often, "--trainer.max_steps", 6, "--ckpt_path", checkpoint)[0] == 0
    found = {tag: scalars(folder, tag) for tag in wanted}
    for tag, values in wanted.items():
        assert found[tag][: len(values)] == values
        assert max(Counter(step for step, _ in found[tag]).values()) == 1
