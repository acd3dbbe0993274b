"""What only a large checkpoint is read in, parts of its tensors, gives what reading them at once gives."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moebed.check.contract import Verdict
from moebed.check.probing import compare, streamed_results
from moebed.checkpoints import Checkpoint, checkpoint, files, stacked, streamed, writer

# Limits of numbers or bytes that are read at a time, and less than the tensors below take.
LIMITS = (
    (checkpoint, "_BAND", 300),
    (stacked, "_AT_A_TIME", 500),
    (streamed, "_HEAD_BAND", 1500),
    (writer, "BAND_BYTES", 700),
)
SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 96, "num_local_experts": 4, "head_dim": 16}  # fmt: skip


def saved(folder, family):
    config = transformers.AutoConfig.for_model(family, **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    """Makes parts small, from when it is called on."""
    return lambda: [monkeypatch.setattr(*limit) for limit in LIMITS]


def read(entry, first, rows):
    out = torch.empty(rows, entry.shape[-1], dtype=entry.dtype)
    entry.read(first, out)
    return out


def test_an_expert_of_a_tensor_of_all(tmp_path, small_parts):
    entries = Checkpoint.open(saved(tmp_path, "gpt_oss")).entries
    entries = {name: entry for name, entry in entries.items() if isinstance(entry, stacked.StackedEntry)}
    places = {
        name: ((0, entry.shape[0]), (5, 11)) if len(entry.shape) > 1 else ((0, 1),) for name, entry in entries.items()
    }
    at_once = {name: [read(entries[name], *place) for place in places[name]] for name in entries}
    assert len(at_once) == 2 * 4 * 2 * 3
    small_parts()
    for name, wanted in at_once.items():
        for place, values in zip(places[name], wanted, strict=True):
            assert torch.equal(read(entries[name], *place), values), name


@pytest.mark.parametrize("row", [None, 0, 39])
def test_two_embeddings_are_equal_in_all_rows_or_differ(tmp_path, small_parts, row):
    small_parts()
    path = saved(tmp_path, "mixtral") / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if row is not None:
        tensors["lm_head.weight"][row, -1] += 1
    save_file(tensors, path, {"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    opened = Checkpoint.open(tmp_path)
    assert opened.config.tie_word_embeddings == (row is None)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_tensor_that_is_copied(tmp_path, small_parts, ending):
    path = saved(tmp_path, "mixtral") / "model.safetensors"
    wanted = load_file(path)["model.embed_tokens.weight"]
    if ending == "bin":
        torch.save(load_file(path), tmp_path / "pytorch_model.bin")
        path.unlink()
    opened = Checkpoint.open(tmp_path)
    part = opened.keys.parameter("embed_tokens.weight")[0].part
    small_parts()
    for first, rows in ((0, 40), (7, 30)):
        some = part._replace(first=part.first + first, rows=rows)
        bands = list(writer.read_bands(opened, some))
        assert len(bands) > 3
        assert torch.equal(torch.cat(bands), wanted[first : first + rows])


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="the system has no preadv")
@pytest.mark.parametrize("is_there", [True, False])
def test_bytes_of_which_some_come_at_a_time(tmp_path, monkeypatch, is_there):
    """A system may give fewer than it is asked for, with ``preadv`` and without."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(50), "b": torch.arange(400.0).view(100, 4)}, path)
    entry, give = files.open_safetensors(path)["b"], os.preadv
    if is_there:
        monkeypatch.setattr(os, "preadv", lambda file, parts, offset: give(file, [parts[0][:100]], offset))
    else:
        monkeypatch.delattr(os, "preadv")
        monkeypatch.setattr(files, "_READ_AT_ONCE", 100)
    assert torch.equal(read(entry, 20, 70), torch.arange(80.0, 360.0).view(70, 4))


def test_a_model_that_is_probed(tmp_path, small_parts):
    names = ["expert_lens"]
    wanted = streamed_results("cpu", names, tmp_path / "model")
    small_parts()
    found = compare(streamed_results("cpu", names, tmp_path / "model"), wanted)
    assert found.verdict == Verdict.WORKS, found.said
