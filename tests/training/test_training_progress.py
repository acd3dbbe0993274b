"""Step, loss, tokens a second and time left of a training run, by a clock that the tests set."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from moebed.training import progress
from moebed.training.progress import ProgressLines

TOKENS = 2048
BATCH = {"input_ids": torch.zeros(8, 256, dtype=torch.int64)}


class Log:
    """Lines as :class:`moebed.machine.progress.Lines`, without its thread."""

    def __init__(self, clock, standing):
        self.clock, self.standing, self.lines, self.last = clock, standing, [], clock[0]

    def say(self, text):
        self.lines.append((self.clock[0], text))
        self.last = self.clock[0]

    def is_due(self, ahead=0.0):
        return self.clock[0] + ahead - self.last >= 10

    def close(self):
        """Nothing."""


class Run:
    """Training with steps of given seconds."""

    def __init__(self, monkeypatch, max_steps=500, world_size=1, begun=0):
        self.clock = [1000.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.clock[0])
        monkeypatch.setattr(progress, "Lines", lambda standing, silence: Log(self.clock, standing))
        self.trainer = SimpleNamespace(
            global_step=begun, max_steps=max_steps, world_size=world_size, is_global_zero=True, callback_metrics={}
        )
        self.progress = ProgressLines()
        self.progress.setup(self.trainer, None, "fit")
        self.log = self.progress._lines
        self.progress.on_train_start(self.trainer, None)

    def step(self, seconds, before=0.0, micro_batches=1):
        self.clock[0] += before
        for index in range(micro_batches):
            self.progress.on_train_batch_start(self.trainer, None, BATCH, index)
            self.clock[0] += seconds / micro_batches
            self.trainer.global_step += index == micro_batches - 1
            self.trainer.callback_metrics["train/loss"] = torch.tensor(9.0 - 0.01 * self.trainer.global_step)
            self.progress.on_train_batch_end(self.trainer, None, None, BATCH, index)

    def validate(self, seconds):
        self.progress.on_validation_start(self.trainer, None)
        self.clock[0] += seconds
        self.progress.on_validation_end(self.trainer, None)


def test_the_time_of_the_run_is_foretold_by_the_steps_after_the_first(monkeypatch):
    run = Run(monkeypatch, max_steps=560)
    for seconds in (5.0, 1.0, 1.0, 1.0):
        run.step(seconds)
    assert [text for _, text in run.log.lines] == [
        "first steps: 1.00 s a step, 2,048 tokens/s; the 556 to come take about 9 min 16 s, validation and probes not "
        "counted"
    ]


@pytest.mark.parametrize(("max_steps", "come"), [(3, "; one more takes about 8 s, validation and"), (2, "")])
def test_what_is_foretold_of_a_short_run(monkeypatch, max_steps, come):
    """Nothing, where no step is left."""
    run = Run(monkeypatch, max_steps=max_steps)
    for seconds in (5.0, 8.0):
        run.step(seconds)
    (text,) = [text for _, text in run.log.lines if text.startswith("first steps")]
    assert text.removeprefix("first steps: 8.00 s a step, 256 tokens/s").startswith(come)
    assert ("about" in text) == bool(come)


@pytest.mark.parametrize("seconds", [0.004, 0.3, 1.0, 4.0, 9.0])
def test_a_line_comes_within_ten_seconds_or_with_every_step(monkeypatch, seconds):
    run = Run(monkeypatch, max_steps=100_000)
    for _ in range(round(60 / seconds)):
        run.step(seconds)
    times = [when for when, _ in run.log.lines]
    assert times[0] - 1000.0 <= max(10.0, 2 * seconds)
    assert all(after - before <= 10.0 + 1e-6 for before, after in itertools.pairwise(times))
    assert len(times) <= 60 / min(10, seconds * (10 // seconds)) + 2


def test_rate_and_time_left_count_the_waiting_for_data(monkeypatch):
    run = Run(monkeypatch, max_steps=100, world_size=2)
    for _ in range(40):
        run.step(0.5, before=0.5)
    when, text = run.log.lines[-1]
    done = round(when - 1000.0)  # a step a second, half of it waiting
    assert text == f"step {done} of 100, loss {9 - 0.01 * done:.3f}, 4,096 tokens/s, {_clock(100 - done)} left"


def _clock(seconds):
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"


def test_validation_lengthens_the_time_left_but_not_the_rate(monkeypatch):
    run = Run(monkeypatch, max_steps=100)
    for number in range(50):
        run.step(1.0)
        if number % 10 == 9:
            run.validate(10.0)
    assert run.log.standing() == "work after validation (samples, checkpoint, data) is going on, 0 s so far"
    lines = [text for _, text in run.log.lines if text.startswith("step")]
    assert all("2,048 tokens/s" in text for text in lines)
    step = int(lines[-1].split()[1])
    spent = run.log.lines[-1][0] - 1001.0
    assert lines[-1].endswith(f"{progress.duration(spent / (step - 1) * (100 - step))} left")


def test_a_step_of_many_micro_batches_is_one_and_what_goes_on_is_named(monkeypatch):
    run = Run(monkeypatch, begun=120)
    assert run.log.standing() == "the first reading of data is going on, 0 s so far"
    run.progress.on_train_batch_start(run.trainer, None, BATCH, 0)
    run.clock[0] += 12
    run.progress.on_train_batch_end(run.trainer, None, None, BATCH, 0)
    run.progress.on_train_batch_start(run.trainer, None, BATCH, 1)
    run.clock[0] += 3
    assert run.log.standing() == "step 121 is going on, 15 s so far"
    run.trainer.global_step += 1
    run.progress.on_train_batch_end(run.trainer, None, None, BATCH, 1)
    assert run.log.standing() == "work after step 121 (probes, checkpoint, data) is going on, 0 s so far"
    for _ in range(3):
        run.step(2.0, micro_batches=4)
    assert run.log.lines[0][1].startswith("first steps: 2.00 s a step, 4,096 tokens/s; the 378 to come")


def test_a_run_without_an_end_has_no_time_left(monkeypatch):
    run = Run(monkeypatch, max_steps=-1)
    for _ in range(30):
        run.step(1.0)
    assert run.log.lines[0][1] == "first steps: 1.00 s a step, 2,048 tokens/s"
    assert run.log.lines[-1][1].endswith("2,048 tokens/s")


def test_other_ranks_are_silent(monkeypatch):
    run = Run(monkeypatch)
    run.trainer.is_global_zero = False
    run.progress.setup(run.trainer, None, "fit")
    assert run.progress._lines is None
    for _ in range(30):
        run.step(1.0)
