"""What goes wrong in a run of several ranks: it ends with an error, never waits forever, and continues bit for bit."""

import os
import random
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moebed.machine import storage
from moebed.training.not_finite import NotFinite
from tests.parallel.forked import Ranks, call, run, start
from tests.parallel.parallel_runs import curves, fit, recipe

STEPS = 120
KILLS = 20
EXACT = ("train/loss", "train/grad_norm", "train/load_balancing_loss", "val/bits_per_byte")


def _wait_for_a_checkpoint(path: Path, ranks: Ranks) -> None:
    """Return when these ranks have written one."""
    before = path.stat().st_mtime_ns if path.exists() else None
    for _ in range(12000):
        try:
            if path.stat().st_mtime_ns != before:
                return
        except FileNotFoundError:  # between two renames
            pass
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in ranks.pids):
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint within a minute\n{ranks.said}")


def _wait_for_a_save(path: Path, ranks: Ranks) -> None:
    """Return while these ranks write the next one."""
    for _ in range(100_000):
        if storage.leftovers(path, sole=True):
            return
        time.sleep(0.0005)
    raise AssertionError(f"no save within a minute\n{ranks.said}")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("layout", "kills"), [("EP-2", KILLS), ("DDP-2", 4)])
def test_killed_ranks_end_the_run_and_it_continues_bit_for_bit(tmp_path, layout, kills):
    """kill -9 of one rank or of all of them, at random moments, during a save as well."""
    path = recipe(tmp_path, STEPS)
    options = ["--checkpoint.every_n_train_steps", "2"]
    run(*fit(path, tmp_path / "whole", layout, *options), tmp_path / "logs" / "whole")
    killed, draw, saving = tmp_path / "killed", random.Random(0), 0
    last = killed / "checkpoints" / "last.ckpt"
    arguments, ranks = fit(path, killed, layout, *options, "--ckpt_path", "last")
    for number in range(kills):
        started = start(arguments, ranks, tmp_path / "logs" / f"kill{number}")
        _wait_for_a_checkpoint(last, started)
        if number % 3 == 2:
            _wait_for_a_save(last, started)
        else:
            time.sleep(draw.uniform(0.0, 0.3))
        whole_job = number % 2 == 0
        saving += bool(storage.leftovers(last, sole=True))
        for pid in started.pids if whole_job else [draw.choice(started.pids)]:
            os.kill(pid, signal.SIGKILL)
        codes = started.wait(60)
        assert sorted(codes) == ([-9] * ranks if whole_job else [-9, 2]), f"{codes}\n{started.said}"
        assert whole_job or "another process of this run has ended" in started.said
    print(f"\n{layout}: {kills} kills, {saving} of them during a save, and {ranks} ranks went on each time")
    run(arguments, ranks, tmp_path / "logs" / "last")
    found, wanted = curves(killed), curves(tmp_path / "whole")
    for tag in EXACT:
        assert found[tag] == wanted[tag], tag


def _small_files(rank: int) -> None:
    """No file may grow past 200 kB in this process, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["1 process", "DDP-2", "EP-2"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, layout):
    path, folder = recipe(tmp_path, 6), tmp_path / "run"
    arguments, ranks = fit(path, folder, layout)
    run(arguments, ranks, tmp_path / "logs" / "first")
    last = folder / "checkpoints" / "last.ckpt"
    before = {file.name: file.read_bytes() for file in ([last] if last.is_file() else last.iterdir())}
    arguments, ranks = fit(path, folder, layout, "--ckpt_path", "last", "--trainer.max_steps", "12")
    started = start(arguments, ranks, tmp_path / "logs" / "second", before=_small_files)
    assert started.wait(120) == [2] * ranks, started.said
    assert "last.ckpt could not be written" in started.said
    assert "continue with --ckpt_path last; what was there before is whole" in started.said
    assert before == {file.name: file.read_bytes() for file in ([last] if last.is_file() else last.iterdir())}
    assert [file.name for file in last.parent.iterdir()] == ["last.ckpt"]
    run(arguments, ranks, tmp_path / "logs" / "third")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("left", ["file", "folder"])
@pytest.mark.parametrize("layout", ["1 process", "DDP-2", "EP-2"])
def test_what_a_killed_run_left_does_not_stop_the_next_one(tmp_path, layout, left):
    path, folder = recipe(tmp_path, 6), tmp_path / "run"
    arguments, ranks = fit(path, folder, layout)
    checkpoints = folder / "checkpoints"
    for name in ("last.ckpt.partial", ".last.ckpt.elsewhere-1.7.partial"):
        leftover = checkpoints / name / "part" if left == "folder" else checkpoints / name
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_text("half")
    run(arguments, ranks, tmp_path / "logs" / "first")
    assert [file.name for file in checkpoints.iterdir()] == ["last.ckpt"]
    # A kill between the two renames of a replacement.
    (checkpoints / "last.ckpt").rename(storage.old_name(checkpoints / "last.ckpt"))
    validate = ["validate", *arguments[1:], "--ckpt_path", "last"]
    validated = run(validate, ranks, tmp_path / "logs" / "validate")
    assert "val/loss" in validated
    assert [file.name for file in checkpoints.iterdir()] == [".last.ckpt.old"]  # who reads changes nothing
    more = run([*arguments, "--ckpt_path", "last", "--trainer.max_steps", "8"], ranks, tmp_path / "logs" / "second")
    assert "continuing the run" in more
    assert [file.name for file in checkpoints.iterdir()] == ["last.ckpt"]


def _nan_on_rank_1(rank: int) -> None:
    """The fourth step's loss is NaN on rank 1."""
    from moebed.training.step_losses import StepLosses

    original = StepLosses.terms

    def poisoned(self, *batch):
        terms = original(self, *batch)
        if self.decoder.training and self.decoder.routers[0].optimizer_step == 3 and rank == 1:
            z_losses = [terms.z_losses[0], terms.z_losses[1] * float("nan")]
            terms = terms._replace(nats=terms.nats * float("nan"), z_losses=z_losses)
        return terms

    StepLosses.terms = poisoned


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["DDP-2", "FSDP2-2", "EP-2"])
def test_a_nan_on_one_rank_stops_all_of_them(tmp_path, layout):
    arguments, ranks = fit(recipe(tmp_path, 6), tmp_path / "run", layout)
    started = start(arguments, ranks, tmp_path / "logs", before=_nan_on_rank_1)
    assert started.wait(120) == [3, 3], started.said
    assert "the loss is nan, first seen at the router of layer 1 on rank 1, at step 3" in started.said
    assert started.said.count("moebed: error") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_nan_on_one_rank_can_be_skipped(tmp_path):
    arguments, ranks = fit(recipe(tmp_path, 6), tmp_path / "run", "EP-2", "--model.on_nan", "skip")
    started = start(arguments, ranks, tmp_path / "logs", before=_nan_on_rank_1)
    assert started.wait(120) == [0, 0], started.said
    assert "step 3 is skipped: the loss is nan, first seen at the router of layer 1 on rank 1" in started.said
    losses = curves(tmp_path / "run")["train/loss"]
    assert losses[3] != losses[3]
    assert all(losses[step] == losses[step] for step in (0, 1, 2, 4, 5))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["1 process", "EP-2"])
def test_sigterm_saves_and_the_run_continues(tmp_path, layout):
    path = recipe(tmp_path, STEPS)
    options = ["--checkpoint.every_n_train_steps", "1000"]  # nothing but the signal saves
    run(*fit(path, tmp_path / "whole", layout, *options), tmp_path / "logs" / "whole")
    folder = tmp_path / "stopped"
    arguments, ranks = fit(path, folder, layout, *options, "--ckpt_path", "last")
    started = start(arguments, ranks, tmp_path / "logs" / "first")
    while not list(folder.glob("tensorboard/events*")):
        time.sleep(0.05)
    time.sleep(1.0)
    for pid in started.pids[::-1]:  # one after another, wherever each of them is
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.05)
    assert started.wait(60) == [143] + [0] * (ranks - 1), started.said
    assert (folder / "checkpoints" / "last.ckpt").exists()
    run(arguments, ranks, tmp_path / "logs" / "second")
    found, wanted = curves(folder), curves(tmp_path / "whole")
    for tag in EXACT:
        assert found[tag] == wanted[tag], tag


def _look_at_infinite_gradients(rank: int, world_size: int) -> None:
    """What a rank does under a loss scaler, by the losses of both."""
    precision = SimpleNamespace(scaler=object())
    place = {"world_size": world_size, "global_rank": rank, "is_global_zero": rank == 0}
    trainer = SimpleNamespace(**place, precision_plugin=precision, global_step=3)
    nan = float("nan")
    for losses, skips in (((1.0, 1.0), False), ((1.0, nan), True), ((nan, 1.0), True), ((1.0, 1.0), False)):
        not_finite, loss = NotFinite("skip", [0]), torch.tensor(losses[rank])
        not_finite.watch(loss, [loss])
        assert not_finite.skips(trainer, torch.tensor(float("inf"))) is skips, losses


def test_ranks_with_a_loss_scaler_agree_whose_loss_is_not_finite():
    """One rank's loss is, the other's is not: neither may ask for the other's report alone."""
    call(_look_at_infinite_gradients, 2)
