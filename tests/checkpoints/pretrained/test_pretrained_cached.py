"""Cached files are mapped in place of copied, and give the same numbers."""

import os

import pytest
import torch
from safetensors.torch import save_file

from moebed.checkpoints import cached
from moebed.checkpoints.files import open_safetensors

pytestmark = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what is cached")


@pytest.fixture
def entry(tmp_path):
    wanted = torch.randn(1024, 1024).bfloat16()
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), "w": wanted}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").read_bytes()  # into the page cache
    return open_safetensors(tmp_path / "x.safetensors")["w"], wanted


def test_a_cached_part_is_mapped(entry):
    stored, wanted = entry
    found = stored.cached(100, 700, 1024)
    if found is None:
        pytest.skip("this file system does not tell what is cached")
    assert torch.equal(found, wanted[100:800])
    found.zero_()
    assert torch.equal(stored.cached(100, 700, 1024), wanted[100:800])


def test_what_is_not_cached_small_or_cut_short_is_not_mapped(entry, monkeypatch):
    stored, _ = entry
    assert stored.cached(0, 10, 1024) is None
    with stored.path.open("rb") as file:
        assert cached.map_cached(file.fileno(), stored.position, 2 * 1024 * 1024 + 64) is None

    def waits(*args):
        raise BlockingIOError

    monkeypatch.setattr(cached.os, "preadv", waits)
    assert stored.cached(100, 700, 1024) is None
