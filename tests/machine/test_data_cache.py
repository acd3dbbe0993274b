"""What is in the cache is finished: killed and concurrent builds leave nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moebed.errors import UserError
from moebed.machine.cache import cache_folder, find_or_build, fingerprint

BUILD = """
import sys, time
from pathlib import Path
from moebed.machine.cache import find_or_build

def build(folder):
    (folder / "first").write_text("x")
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "second").write_text("y")

print(find_or_build(Path(sys.argv[1]), "key", build), flush=True)
"""


def _start(cache: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(cache), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _contents(cache: Path) -> dict[str, list[str]]:
    """Folders and what is in them; files are locks."""
    folders = [path for path in cache.iterdir() if path.is_dir()]
    return {folder.name: sorted(path.name for path in folder.iterdir()) for folder in folders}


def test_a_killed_build_is_not_used_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    process = _start(tmp_path, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    [left] = _contents(tmp_path)
    assert left.startswith(".key.")
    output, error = _start(tmp_path, 0).communicate()
    assert error == ""
    assert output.split() == ["building", str(tmp_path / "key")]
    assert _contents(tmp_path) == {"key": ["first", "second"]}


def test_of_two_processes_at_once_one_builds_and_the_other_waits_aloud(tmp_path: Path) -> None:
    first = _start(tmp_path, 1.5)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    said, error = _start(tmp_path, 1.5).communicate()
    assert said.split() == [str(tmp_path / "key")]
    assert error == f"waiting: another process makes key in {tmp_path}\n"
    assert first.communicate() == (f"{tmp_path / 'key'}\n", "")
    assert _contents(tmp_path) == {"key": ["first", "second"]}


def test_two_processes_without_locks_give_one_whole_folder(tmp_path: Path) -> None:
    code = "import filelock\n\ndef no(*a, **o):\n    raise NotImplementedError('no flock')\n\n"
    code += "filelock.FileLock.acquire = no\n" + BUILD
    command = [sys.executable, "-c", code, str(tmp_path), "0.7"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    results = [process.communicate() for process in processes]
    assert [output.split() for output, _ in results] == [["building", str(tmp_path / "key")]] * 2, results
    assert all("has no locks (no flock); key may be made twice" in error for _, error in results)
    assert _contents(tmp_path) == {"key": ["first", "second"]}


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "first").write_text("x")
        raise UserError("no text")

    with pytest.raises(UserError, match="no text"):
        find_or_build(tmp_path, "key", build)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_is_not_built_again(tmp_path: Path) -> None:
    find_or_build(tmp_path, "key", lambda folder: None)
    find_or_build(tmp_path, "key", lambda folder: pytest.fail("built again"))


def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=r"cannot write the cache folder .*file/cache: Not a directory; set MOEBED_CACHE, or for text data",
    ):
        find_or_build(tmp_path / "file" / "cache", "key", lambda folder: None)


def test_cache_folder_and_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBED_CACHE", str(tmp_path / "env"))
    assert cache_folder(None) == tmp_path / "env"
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.delenv("MOEBED_CACHE")
    assert cache_folder(None) == Path.home() / ".cache" / "moebed"
    assert fingerprint({"a": 1, "b": 2}) == fingerprint(json.loads('{"b": 2, "a": 1}')) != fingerprint({"a": 1, "b": 3})
