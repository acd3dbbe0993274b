"""Checkpoints in parts, in one process: what they admit, and how one takes another's place."""

import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from moebed import storage
from moebed.checkpoints import sharded
from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.whole import load_decoder
from moebed.decoder import Decoder
from moebed.errors import UserError
from tests.conftest import tiny_config


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _rest(decoder: Decoder) -> dict:
    return {"model_config": decoder.config.to_dict(), "global_step": 3, "optimizer_states": []}


def _write(path, decoder: Decoder) -> None:
    tensors = {f"model.decoder.{name}": value.detach() for name, value in decoder.named_parameters()}
    sharded.write(path, tensors, _rest(decoder))


def test_a_folder_is_read_as_a_file_would_be(tmp_path, alone):
    decoder, path = Decoder(tiny_config(num_shared_experts=1)), tmp_path / "last.ckpt"
    _write(path, decoder)
    assert sharded.is_sharded(path)
    found = sharded.read_whole(path)
    assert found["global_step"] == 3
    for name, value in decoder.named_parameters():
        assert torch.equal(found["state_dict"][f"decoder.{name}"], value)
    probed = dict(load_decoder(Checkpoint.open(path)).named_parameters())
    for name, value in decoder.named_parameters():
        assert torch.equal(probed[name], value)


def test_the_one_before_stays_until_the_new_one_is_whole(tmp_path, alone, monkeypatch):
    first, second = Decoder(tiny_config()), Decoder(tiny_config())
    path = tmp_path / "last.ckpt"
    _write(path, first)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", full)
        with pytest.raises(UserError, match=r"last.ckpt could not be written \(rank 0: .*No space left on device\)"):
            _write(path, second)
    assert not storage.leftovers(path, sole=True)
    assert torch.equal(load_decoder(Checkpoint.open(path)).lm_head.weight, first.lm_head.weight)


@pytest.mark.parametrize("stopped_after", [0, 1])
def test_a_replacement_that_was_stopped_leaves_the_one_before(tmp_path, alone, monkeypatch, stopped_after):
    first, second = Decoder(tiny_config()), Decoder(tiny_config())
    path = tmp_path / "last.ckpt"
    _write(path, first)
    renames, rename = [], os.rename

    def kill_after(source, target):
        if str(target).endswith((".ckpt", ".old")):  # others are within the folder that is written
            if len(renames) == stopped_after:
                raise KeyboardInterrupt
            renames.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill_after)
        with pytest.raises(KeyboardInterrupt):
            _write(path, second)
    assert torch.equal(load_decoder(Checkpoint.open(storage.standing(path))).lm_head.weight, first.lm_head.weight)
    storage.recover(tmp_path)
    assert torch.equal(load_decoder(Checkpoint.open(path)).lm_head.weight, first.lm_head.weight)
    _write(path, second)
    assert torch.equal(load_decoder(Checkpoint.open(path)).lm_head.weight, second.lm_head.weight)
    assert [name for name in os.listdir(tmp_path) if name != "rendezvous"] == ["last.ckpt"]


class _Evil:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_metadata_is_data(tmp_path, alone, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.ckpt"
    _write(path, Decoder(tiny_config()))
    (path / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(UserError, match=r"it names posix\.system, which no checkpoint of ours holds"):
        Checkpoint.open(path)
    with pytest.raises(UserError, match=r"it names posix\.system"):
        sharded.read_whole(path)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.ckpt"])
def test_a_damaged_part_is_one_clear_line(tmp_path, alone, name):
    path = tmp_path / "last.ckpt"
    _write(path, Decoder(tiny_config()))
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        sharded.read_whole(path)
