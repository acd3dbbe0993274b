"""Tiles that were measured: what a launch reads, what does not serve, and how they are chosen, in the interpreter."""

import dataclasses
import json

import pytest

from moebed.machine.cache import cache_folder
from triton_kernels import tuned
from triton_kernels.configs import CANDIDATES, HOPPER, WIDE, Tile

DEVICE = "NVIDIA H100 80GB HBM3"
FOUR = Tile(256, 64, warps=8, stages=4, persistent=True)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table for DEVICE where the launch looks."""
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path))
    monkeypatch.delenv(tuned.SWITCH, raising=False)

    def write(**changes):
        tuned.tuned.cache_clear()
        path = tuned.path_of(DEVICE)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(tuned.content(DEVICE, "3.9.0", HOPPER, {"down": FOUR}, {}))
        path.write_text(json.dumps({**kept, **changes}))
        return path

    yield write
    tuned.tuned.cache_clear()


def test_the_next_launch_reads_what_was_measured(table, monkeypatch):
    assert tuned.tuned(HOPPER, DEVICE, "3.9.0") == HOPPER
    table()
    found = tuned.tuned(HOPPER, DEVICE, "3.9.0")
    assert found == dataclasses.replace(HOPPER, down=FOUR)
    assert tuned.tuned(WIDE, DEVICE, "3.9.0") == WIDE
    assert tuned.tuned(HOPPER, "NVIDIA H200", "3.9.0") == HOPPER
    tuned.tuned.cache_clear()
    monkeypatch.setenv(tuned.SWITCH, tuned.SHIPPED)
    assert tuned.tuned(HOPPER, DEVICE, "3.9.0") == HOPPER


@pytest.mark.parametrize(
    ("changes", "triton", "words"),
    [
        ({}, "3.6.0", "were measured with triton 3.9.0"),
        ({"source": "older"}, "3.9.0", "were measured with source older"),
        ({"tiles": {"down": {"rows": 1}}}, "3.9.0", "cannot be read (TypeError)"),
        ({"tiles": None}, "3.9.0", "cannot be read (AttributeError)"),
    ],
)
def test_what_does_not_serve_is_said_once(table, changes, triton, words):
    table(**changes)
    with pytest.warns(UserWarning, match="the shipped ones serve") as caught:
        found = [tuned.tuned(HOPPER, DEVICE, triton) for _ in range(2)]
    assert found == [HOPPER, HOPPER]
    (warning,) = caught
    assert words in str(warning.message)


def test_a_damaged_table_does_not_serve(table):
    table().write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tuned.tuned(HOPPER, DEVICE, "3.9.0") == HOPPER


def test_the_table_lies_in_the_cache_folder(table):
    assert tuned.path_of(DEVICE).is_relative_to(cache_folder(None))
    assert tuned.path_of("a/../b").parent == tuned.path_of(DEVICE).parent


def test_candidates_leave_the_size_of_every_tensor_as_it_is():
    for ops in CANDIDATES.values():
        assert set(ops) == set(tuned.OPS)
        for tiles in ops.values():
            assert len(set(tiles)) == len(tiles)
