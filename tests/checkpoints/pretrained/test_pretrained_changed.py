"""A checkpoint that changes while it is read: what was opened is read on, or one line says which file it was."""

import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import write

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.whole import load_decoder
from moebed.cli import main
from moebed.errors import UserError
from probes.running.driver import ProbePass


def negated(path):
    """The bytes of a safetensors file of bfloat16, with every number's sign changed."""
    content = bytearray(path.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    content[data + 1 :: 2] = bytes(byte ^ 0x80 for byte in content[data + 1 :: 2])
    return bytes(content)


def rewrite(path):
    """Other numbers in the same file; its time is another one on any file system."""
    path.write_bytes(negated(path))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def test_a_file_that_took_the_name_of_another_is_not_read_in_its_place(tmp_path):
    write(tmp_path / "model", hidden_size=1024, vocab_size=1024, num_hidden_layers=1, shards=False)
    path, opened = tmp_path / "model" / "model.safetensors", Checkpoint.open(tmp_path / "model")
    embedding = opened.keys.parameter("embed_tokens.weight")[0].part  # large enough to be mapped where it is cached
    wanted = opened.read(embedding)
    (tmp_path / "new").write_bytes(negated(path))
    (tmp_path / "new").replace(path)
    path.read_bytes()
    mapped = opened.cached(embedding)
    assert torch.equal(opened.read(embedding), wanted)
    assert mapped is None or torch.equal(mapped, wanted)
    opened.require_unchanged()


def test_a_file_that_is_written_to_under_another_name_is_still_the_one_that_was_opened(tmp_path):
    write(tmp_path / "model", num_hidden_layers=1, shards=False)
    path, opened = tmp_path / "model" / "model.safetensors", Checkpoint.open(tmp_path / "model")
    content = path.read_bytes()
    path.rename(tmp_path / "old")
    path.write_bytes(content)
    opened.require_unchanged()
    rewrite(tmp_path / "old")
    with pytest.raises(UserError, match=f"{path} has changed since it was opened"):
        opened.require_unchanged()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list what a process has open")
def test_each_file_is_open_once(tmp_path):
    """A process may have 256 open on macOS, and DeepSeek-V3 has 163."""
    write(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    paths = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    opened = [path for path in paths if path.startswith(str(tmp_path.resolve()))]
    assert sorted(opened) == sorted(str(path.resolve()) for path in (tmp_path / "model").glob("*.safetensors"))
    checkpoint.require_unchanged()


def test_a_file_that_is_written_to_ends_a_probing_and_what_was_finished_before_is_whole(tmp_path, monkeypatch, capsys):
    write(tmp_path / "model")
    path, show = sorted((tmp_path / "model").glob("*.safetensors"))[-1], ProbePass.show

    def changed_at_the_second(self, view):
        if view.index == 1:
            rewrite(path)
        return show(self, view)

    command = ["probe", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--probes", "gate_similarity"]
    monkeypatch.setattr(ProbePass, "show", changed_at_the_second)
    assert main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error:")]
    assert len(errors) == 1
    assert f"{path} has changed since it was opened" in errors[0]
    kept = sorted((tmp_path / "out/results/.partial").rglob("layer_*.npz"))
    assert [one.name for one in kept] == ["layer_00.npz"]
    monkeypatch.setattr(ProbePass, "show", show)
    assert main(command) == 0  # of the file as it is now, and of nothing else
    assert "finished already" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [("export",), ("upcycle", "--method", "copy")], ids=lambda words: words[0])
def test_what_is_written_of_a_file_that_changed_is_not_there(command, tmp_path, monkeypatch, capsys):
    dense = {"num_experts": 0} if "upcycle" in command else {}
    write(tmp_path / "model", "llama" if dense else "mixtral", **dense)
    path, read = next((tmp_path / "model").glob("*1-of*")), Checkpoint.read

    def changed(self, part):
        if path.stat().st_mtime_ns % 2 == 0:
            rewrite(path)
        return read(self, part)

    os.utime(path, ns=(0, path.stat().st_mtime_ns // 2 * 2))
    monkeypatch.setattr(Checkpoint, "read", changed)
    assert main([*command, str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert f"{path} has changed since it was opened" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_model_is_not_made_of_two_files(tmp_path, monkeypatch):
    write(tmp_path / "model")
    opened = Checkpoint.open(tmp_path / "model")
    rewrite(next((tmp_path / "model").glob("*1-of*")))
    with pytest.raises(UserError, match="has changed since it was opened"):
        load_decoder(opened)
