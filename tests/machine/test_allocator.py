"""Freed memory that stays in the process: what is taken again has its pages already."""

import os
import subprocess
import sys

import pytest

from moebed.machine import allocator

COUNT = """
import resource, sys
import torch
from moebed.machine import allocator
torch.set_num_threads(1)
agreed = getattr(allocator, sys.argv[1])()
numbers = torch.rand(64, 4096)
def faults():
    for _ in range(20):
        numbers.clone().square().sum(dim=0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(agreed, -faults() + faults())
"""


def _faults(setting):
    command = [sys.executable, "-c", COUNT, setting]
    # With one thread glibc's own threshold has not grown by what was freed at the start: without, there are 9600.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=environment)
    agreed, faults = done.stdout.split()
    return agreed == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_blocks_that_are_taken_again_have_their_pages():
    agreed, faults = _faults("keep_freed_blocks")
    if not agreed:
        pytest.skip("another C library than glibc")
    assert faults < 100


def test_other_systems_have_no_such_setting(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "win32")
    assert not allocator.keep_freed_memory()
    assert not allocator.keep_freed_blocks()
