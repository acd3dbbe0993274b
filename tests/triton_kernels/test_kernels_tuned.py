"""Tiles that were measured: what a launch reads, what does not serve, and how they are chosen, in the interpreter."""

import dataclasses
import json

import pytest

from moebed.machine.cache import cache_folder
from triton_kernels import tuned
from triton_kernels.configs import CANDIDATES, HOPPER, WIDE, Tile, with_tile

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
        ({"device": "another"}, "3.9.0", "were measured with device another"),
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


def test_a_table_without_what_it_was_made_with_does_not_serve(table):
    table().write_text("{}")
    with pytest.warns(UserWarning, match=r"cannot be read \(KeyError\)"):
        assert tuned.tuned(HOPPER, DEVICE, "3.9.0") == HOPPER


def test_the_environment_may_name_another_file(table, tmp_path, monkeypatch):
    other = table().rename(tmp_path / "mine.json")
    assert tuned.tuned(HOPPER, DEVICE, "3.9.0") == HOPPER
    tuned.tuned.cache_clear()
    monkeypatch.setenv(tuned.SWITCH, str(other))
    assert tuned.tuned(HOPPER, DEVICE, "3.9.0").down == FOUR


def test_what_belongs_to_the_shipped_table_stays(table):
    table(tiles={"down": {"group": 4}, "rows": {"rows": 64}, "name": {}})
    assert tuned.tuned(HOPPER, DEVICE, "3.9.0") == with_tile(HOPPER, "down", dataclasses.replace(HOPPER.down, group=4))


def test_another_tile_leaves_the_other_ops_theirs():
    assert with_tile(HOPPER, "down", FOUR) == dataclasses.replace(HOPPER, down=FOUR) != HOPPER


def test_the_source_stands_for_every_kernels_file_and_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    seen = set()
    (tmp_path / "grouped").mkdir()
    for name, text in (("up.py", "1"), ("up.py", "2"), ("down.py", "2"), ("down.txt", "2")):
        path = tmp_path / "grouped" / name
        path.write_text(text, encoding="utf-8")
        seen.add(tuned.source.__wrapped__())
        path.unlink()
    assert len(seen) == 4  # the last is of no file


def test_the_table_lies_in_the_cache_folder(table):
    assert tuned.path_of(DEVICE).is_relative_to(cache_folder(None))
    assert tuned.path_of("a/../b").parent == tuned.path_of(DEVICE).parent
    assert tuned.path_of("NVIDIA H100") != tuned.path_of("NVIDIA H200")


def test_candidates_leave_the_size_of_every_tensor_as_it_is():
    for ops in CANDIDATES.values():
        assert set(ops) == set(tuned.OPS)
        for tiles in ops.values():
            assert len(set(tiles)) == len(tiles)
