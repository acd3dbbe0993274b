"""Signals that a process was started to ignore stay ignored; others are noted or end it in order, and given back."""

import os
import signal

import pytest

from moebed.checkpoints.writer import new_folder
from moebed.machine.termination import asked_to_end, ending_on_sigterm


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    before = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, before)


def test_what_is_ignored_as_in_the_background_stays_so(number):
    """`sh -c 'moebed study X.yaml & ...'`: Ctrl-C is for what runs in front."""
    signal.signal(number, signal.SIG_IGN)
    with asked_to_end() as signals, ending_on_sigterm():
        os.kill(os.getpid(), number)
    assert signals == []
    assert signal.getsignal(number) is signal.SIG_IGN


def test_what_is_not_ignored_is_noted_and_given_back(number):
    signal.signal(number, signal.SIG_DFL)
    with asked_to_end() as signals:
        os.kill(os.getpid(), number)
    assert signals == [number]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_handler_that_c_has_set_is_none_of_pythons_to_give_back(number, monkeypatch):
    """``signal.getsignal`` says None of it, which ``signal.signal`` does not take."""
    signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    with asked_to_end() as signals:
        os.kill(os.getpid(), number)
    monkeypatch.undo()
    assert signals == [number]
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.fixture
def _default():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_default")
def test_sigterm_leaves_nothing_of_a_half_written_checkpoint(tmp_path):
    def write():
        with new_folder(tmp_path / "model") as partial:
            (partial / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    with pytest.raises(SystemExit) as end:
        write()
    assert end.value.code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("_default")
def test_who_handles_sigterm_already_goes_on_to():
    """As a run does, which notes it and ends after its step."""
    with asked_to_end() as signals, ending_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals == [signal.SIGTERM]
