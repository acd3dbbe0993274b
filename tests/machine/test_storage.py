"""What is written is there whole or not at all, and nothing that was left behind stops the next writer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moebed.errors import UserError
from moebed.machine import storage
from moebed.training.callbacks import AtomicCheckpointIO
from tests.parallel.forked import call

KILLED = """
import os, signal, sys
from pathlib import Path
from moebed.machine import storage

new = storage.new_file if sys.argv[2] == "file" else storage.new_folder
with new(Path(sys.argv[1])) as what:
    (what / "half").write_text("x") if sys.argv[2] == "folder" else what.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def _write(path: Path, kind: str, text: str, sole: bool = False) -> None:
    if kind == "file":
        with storage.new_file(path, sole=sole) as file:
            file.write(text.encode())
    else:
        with storage.new_folder(path, sole=sole) as folder:
            (folder / "text").write_text(text)


def _read(path: Path) -> str:
    return (path / "text" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("left", ["file", "folder"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_goes_whatever_it_is(tmp_path, left, kind):
    path = tmp_path / "last.ckpt"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), left], check=False)
    assert killed.returncode == -9
    assert len(_names(tmp_path)) == 1
    former = tmp_path / "last.ckpt.partial"
    former.mkdir() if left == "folder" else former.write_text("half")
    _write(path, kind, "new")
    assert _names(tmp_path) == ["last.ckpt"]
    assert _read(path) == "new"


def test_what_a_living_or_a_distant_writer_is_at_stays(tmp_path):
    path, partial = tmp_path / "key", storage.partial_name(tmp_path / "key").name
    living = tmp_path / partial.replace(f".{os.getpid()}.", f".{os.getppid()}.")
    distant, old = tmp_path / ".key.elsewhere-1.5.partial", tmp_path / ".key.elsewhere-1.6.partial"
    for folder in (living, distant, old):
        folder.mkdir()
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    _write(path, "folder", "new")
    assert _names(tmp_path) == sorted(["key", living.name, distant.name])
    _write(path, "folder", "newer", sole=True)
    assert _names(tmp_path) == ["key"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "thing"
    _write(path, kind, "old")
    new = storage.new_file if kind == "file" else storage.new_folder
    full = r"thing could not be written \(No space left on device\); make room or choose another folder"
    with pytest.raises(UserError, match=f"{full}; what was there before is whole$"), new(path, sole=True):
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match=r"folder$"), new(tmp_path / "new_thing", sole=True):
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), new(path, sole=True):
        raise ZeroDivisionError
    assert _names(tmp_path) == ["thing"]
    assert _read(path) == "old"


@pytest.mark.parametrize("before", ["file", "folder"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_kind_takes_the_place_of_the_other_only_where_the_name_is_its_own(tmp_path, before, kind):
    path = tmp_path / "thing"
    _write(path, before, "old")
    if (before, kind) != ("file", "file"):
        with pytest.raises(UserError, match="thing could not be written"):
            _write(path, kind, "new")
        assert _read(path) == "old"
    _write(path, kind, "new", sole=True)
    assert _read(path) == "new"
    assert _names(tmp_path) == ["thing"]


def test_a_checkpoint_of_another_layout_stands_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    """A file takes the place of a folder; a kill before the last rename must not lose both."""
    path = tmp_path / "last.ckpt"
    _write(path, "folder", "old")

    def killed(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        return rename(source, target)

    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert _read(storage.standing(path)) == "old"
    storage.recover(tmp_path)
    assert _read(path) == "old"
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path)["step"] == 2
    assert _names(tmp_path) == ["last.ckpt"]


def test_others_wait_for_the_one_that_recovers(tmp_path):
    path = tmp_path / "last.ckpt"
    storage.old_name(path).mkdir()
    before = time.monotonic()
    storage.wait_for_recovery(tmp_path, seconds=0.2)
    assert time.monotonic() - before >= 0.2
    storage.recover(tmp_path)
    storage.wait_for_recovery(tmp_path, seconds=60)
    assert _names(tmp_path) == ["last.ckpt"]


def test_the_same_arrays_give_the_same_bytes(tmp_path, monkeypatch):
    arrays = {"b/0": np.arange(5), "a": np.ones((2, 3), np.float32)}
    first = storage.write_arrays(tmp_path / "x.npz", arrays, note="why").read_bytes()
    monkeypatch.setattr(time, "localtime", lambda *a: time.struct_time((2031, 1, 1, 0, 0, 0, 0, 1, 0)))
    later = storage.write_arrays(tmp_path / "x.npz", dict(arrays), note="why").read_bytes()
    assert first == later
    with np.load(tmp_path / "x.npz") as found:
        assert sorted(found.files) == ["a", "b/0"]
        assert found["b/0"].tolist() == [0, 1, 2, 3, 4]
    assert storage.read_note(tmp_path / "x.npz") == "why"
    assert storage.read_note(tmp_path / "none.npz") == ""


def _first_fails(rank: int, world_size: int) -> None:
    def fail() -> None:
        assert rank == 0
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        storage.on_first_rank(fail)
    assert storage.on_first_rank(lambda: "done") == "done"
    error = ValueError("it broke") if rank == 1 else None
    with pytest.raises(UserError, match="rank 1: it broke"):
        storage.agree(error, lambda rank, said: f"rank {rank}: {said}")
    storage.agree(None)
    dist.barrier()


def test_an_error_of_one_rank_is_raised_on_all(tmp_path):
    call(_first_fails, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a file's size is asked of Linux")
def test_a_checkpoint_that_finds_no_room_says_what_the_system_says(tmp_path):
    """PyTorch makes of it an assertion about positions in a file."""
    import resource

    before, last = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "last.ckpt"

    def save(path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(UserError, match=rf"{path.name} could not be written \(File too large\); ") as raised:
                AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(200_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return str(raised.value)

    assert save(last).endswith("then start again: there is none before it")
    assert _names(tmp_path) == []
    last.write_text("the previous one")
    assert save(last).endswith("then continue with --ckpt_path last; what was there before is whole")
    assert save(tmp_path / "step=4.ckpt").endswith("then continue with --ckpt_path last")
    assert _names(tmp_path) == ["last.ckpt"]
