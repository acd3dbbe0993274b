"""Callbacks that stop a run or watch it save, and what it left; ``conftest.py`` has the runs themselves."""

import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback

from moebed.cli import main

ACCUMULATE = ["--trainer.accumulate_grad_batches", 4]


class Signal(Callback):
    """Sends this process a signal after a micro-batch."""

    def __init__(self, batch: int, number: int = int(signal.SIGTERM)):
        self.batch, self.number = batch, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


class Interrupted(Callback):
    """Ctrl-C, pressed some times, where a hook such as ``on_validation_batch_end`` is first called after a step."""

    def __init__(self, hook: str, times: int = 1, step: int = 0, number: int = int(signal.SIGINT)):
        self.left, self.step, self.number = times, step, number
        setattr(self, hook, self._press)

    def _press(self, trainer, *_, **__):
        while self.left and not trainer.sanity_checking and trainer.global_step >= self.step:
            self.left -= 1
            os.kill(os.getpid(), self.number)


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


def call(recipe, folder, *options, command="fit"):
    place = [] if folder is None else ["--trainer.default_root_dir", str(folder)]
    try:
        return main([command, "--config", str(recipe), *place, *map(str, options)])
    except SystemExit as stop:
        return stop.code
    except KeyboardInterrupt:  # of which `moebed` makes this code
        return 130


def last(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def require_same_model(one, other):
    assert one["global_step"] == other["global_step"]
    for name, value in other["state_dict"].items():
        assert torch.equal(value, one["state_dict"][name]), name
    for number, state in other["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, one["optimizer_states"][0]["state"][number][key]), (number, key)


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def curves(folder):
    """Every scalar that a run logged, with its steps; but for how fast it was, and for Lightning's number of an epoch,
    which counts the times that a run went on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False).Reload()
    tags = set(events.Tags()["scalars"]) - {"train/tokens_per_second", "epoch"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


def callback(kind, **arguments):
    return [{"class_path": f"tests.training.saving_runs.{kind}", "init_args": arguments}]
