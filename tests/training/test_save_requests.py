"""Signals that ask a run to end, without a run."""

import io
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Trainer

from moebed.training import save_requests
from moebed.training.save_requests import END, NOTHING, Requests
from moebed.training.saving import RunCheckpoint

SECOND_OF_TWO = SimpleNamespace(
    world_size=2,
    global_rank=1,
    is_global_zero=False,
    _accelerator_connector=SimpleNamespace(cluster_environment=LightningEnvironment()),
)


class _Interrupted(io.RawIOBase):
    """A terminal at which Ctrl-C is pressed while a line is written to it."""

    def writable(self):
        return True

    def write(self, given):
        os.kill(os.getpid(), signal.SIGINT)
        return len(given)


def test_ctrl_c_amid_a_print_is_noted_too(monkeypatch):
    """Python refuses to print in the handler then; the print goes on, and so does the step."""
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(_Interrupted()), line_buffering=True))
    requests = Requests()
    requests.take_over(Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False))
    try:
        print("step 2 of 4", file=sys.stderr)
        assert (requests._asked, requests.exit_code) == (END, 130)
    finally:
        requests.give_back()
    monkeypatch.undo()


def test_a_handler_that_c_has_set_does_not_keep_a_run_from_its_end(monkeypatch):
    """As of a library that is told of signals: Python knows nothing of it, and can only give the default back."""
    requests, before = Requests(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    requests.take_over(Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False))
    requests.give_back()
    monkeypatch.undo()
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_of_a_run_that_took_no_step_nothing_is_said_to_be_saved():
    """``trainer.max_steps: 0`` with a signal during its report: it ends as any process."""
    checkpoint, before = RunCheckpoint(save_last=True), signal.getsignal(signal.SIGTERM)
    for step, takes_over in ((0, False), (4, True)):
        checkpoint._last_global_step_saved = step
        with checkpoint.ending_at_once(SimpleNamespace(**vars(SECOND_OF_TWO) | {"world_size": 1, "global_step": step})):
            assert (signal.getsignal(signal.SIGTERM) != before) is takes_over
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_waits_for_nothing(capsys):
    requests, before = Requests(), signal.getsignal(signal.SIGINT)
    requests.take_over(Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert (requests._asked, requests.exit_code) == (END, 130)
        assert "Ctrl-C again ends at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        requests.give_back()
    assert signal.getsignal(signal.SIGINT) is before


def test_slurms_signal_after_the_last_step_requeues_the_job_and_ends_the_run(monkeypatch):
    """Which would else be killed at the time limit, amid its last probing."""
    requests, requeued = Requests(), []
    monkeypatch.setattr("moebed.machine.slurm.requeue", lambda: requeued.append(True))
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, plugins=[SLURMEnvironment()])
    requests.take_over(trainer)
    try:
        requests.last_step_saved(trainer)
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        requests.give_back()
    assert (ended.value.code, requeued) == (143, [True])


def test_a_signal_while_a_rank_joins_those_that_leave_together_waits_for_them_too(monkeypatch):
    """It connects to their store first, which takes a while; a rank that left by itself would leave them waiting."""
    calls = []

    class Joining:
        def __init__(self, *_):
            os.kill(os.getpid(), signal.SIGTERM)

        def wait(self):
            calls.append("wait")
            return signal.SIGTERM

        def stop(self, is_last):
            calls.append("stop")

    monkeypatch.setattr(save_requests, "LeavingTogether", Joining)
    requests = Requests()
    requests.take_over(SECOND_OF_TWO)
    try:
        with pytest.raises(SystemExit):
            requests.last_step_saved(SECOND_OF_TWO)
    finally:
        requests.give_back()
    assert calls == ["wait", "stop"]


def test_a_ctrl_c_that_is_ignored_as_in_the_background_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = Requests()
    requests.take_over(Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests._asked == NOTHING
    finally:
        requests.give_back()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_in_another_thread_than_the_main_one_leaves_signals_alone():
    """As of a server or a notebook's widget: Python lets no other thread ask for them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run():
        requests = Requests()
        requests.take_over(SECOND_OF_TWO)
        requests.last_step_saved(SECOND_OF_TWO)
        requests.give_back()
        return {number: signal.getsignal(number) for number in before}

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() == before
