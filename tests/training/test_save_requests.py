"""Signals that ask a run to end, without a run."""

import os
import signal

import pytest
from lightning.pytorch import Trainer

from moebed.training.save_requests import END, Requests


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
