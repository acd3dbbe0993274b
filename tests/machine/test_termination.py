"""Signals that a process was started to ignore stay ignored; others are noted, and given back."""

import os
import signal

import pytest

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
