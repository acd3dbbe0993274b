"""Checkpoints in parts, in one process: what they admit, and how one takes another's place."""

import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from moebed.checkpoints import sharded
from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.whole import load_decoder
from moebed.errors import UserError
from moebed.machine import storage
from moebed.model.decoder import Decoder
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


def _bytes_read() -> int:
    """Bytes that this process has read by now, from files or from the cache in memory."""
    with open("/proc/self/io", encoding="utf-8") as file:
        return int(dict(line.split(": ") for line in file.read().splitlines())["rchar"])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="this system does not count the bytes read")
def test_reading_a_folder_an_expert_at_a_time_reads_it_once(tmp_path, alone):
    decoder, path = Decoder(tiny_config(num_experts=16, moe_intermediate_size=128)), tmp_path / "last.ckpt"
    _write(path, decoder)
    checkpoint = Checkpoint.open(path)
    parts = [
        checkpoint.keys.expert(layer, matrix, expert)
        for layer in range(decoder.config.num_hidden_layers)
        for matrix in ("gate", "up", "down")
        for expert in range(16)
    ]
    before = _bytes_read()
    found = [checkpoint.read(part) for part in parts]
    wanted = sum(checkpoint.num_bytes(part) for part in parts)
    assert wanted <= _bytes_read() - before <= 1.2 * wanted
    experts = decoder.blocks[0].mlp.experts
    for matrix in range(3):
        for expert in (0, 7, 15):
            whole = experts.matrix(("gate", "up", "down")[matrix])[expert]
            assert torch.equal(found[16 * matrix + expert], whole)


@pytest.mark.parametrize("stored", ["transposed", "a vector", "rows of one part", "one number"])
def test_a_part_is_read_however_it_lies(tmp_path, alone, stored):
    value = {
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "a vector": torch.arange(5.0),
        "rows of one part": torch.arange(24.0).reshape(2, 3, 4),
        "one number": torch.tensor(3.0),
    }[stored]
    sharded.write(tmp_path / "last.ckpt", {"model.x": value}, {"optimizer_states": []})
    entry = sharded.entries(tmp_path / "last.ckpt")["x"]
    rows = value.reshape(-1, value.shape[-1] if value.dim() else 1)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    entry.read(0, out)
    assert torch.equal(out, rows)
    if len(rows) > 1:
        entry.read(1, out[:1])
        assert torch.equal(out[0], rows[1])


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
