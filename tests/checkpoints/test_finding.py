"""Which files are read where several could be, as transformers chooses; and what is no checkpoint, by what it is."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.errors import UserError

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32, "num_local_experts": 4,
         "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IDS = torch.arange(10)[None]


def saved(folder, seed, **options):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("mixtral", **SIZES))
    model.save_pretrained(folder, **options)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def by_transformers(folder):
    return logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def to_bin(folder, name="pytorch_model.bin"):
    torch.save(load_file(folder / "model.safetensors"), folder / name)


@pytest.mark.parametrize("shards", ["there", "gone"])
def test_a_whole_file_comes_before_an_old_index(tmp_path, shards):
    saved(tmp_path, 1, max_shard_size="20KB")
    saved(tmp_path / "new", 2)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    if shards == "gone":
        for path in tmp_path.glob("model-*"):
            path.unlink()
    torch.testing.assert_close(logits(load_decoder(tmp_path)), by_transformers(tmp_path))
    assert "model.safetensors.index.json beside it left aside" in Checkpoint.open(tmp_path).notes[0]


def test_safetensors_come_before_a_pickle(tmp_path):
    saved(tmp_path, 1)
    saved(tmp_path / "other", 2)
    to_bin(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "pytorch_model.bin", tmp_path)
    torch.testing.assert_close(logits(load_decoder(tmp_path)), by_transformers(tmp_path))
    assert "pytorch_model.bin" in Checkpoint.open(tmp_path).notes[0]


def test_shards_that_are_gone_name_what_else_is_there(tmp_path):
    saved(tmp_path, 1)
    to_bin(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00001.safetensors is missing.*pytorch_model.bin"):
        Checkpoint.open(tmp_path)


def test_an_index_that_lists_part_of_its_shards_is_read_as_transformers_reads_it(tmp_path):
    saved(tmp_path, 1, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    first = {file: next(name for name, where in index["weight_map"].items() if where == file) for file in files}
    path.write_text(json.dumps({"metadata": {}, "weight_map": {name: file for file, name in first.items()}}))
    torch.testing.assert_close(logits(load_decoder(tmp_path)), by_transformers(tmp_path))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    saved(tmp_path, 1, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    tensors, more = load_file(shards[0]), load_file(shards[1])
    name = next(iter(tensors))
    save_file({**more, name: tensors[name] + 1}, shards[1])
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        Checkpoint.open(tmp_path)
    assert shards[0].name in str(caught.value)
    assert shards[1].name in str(caught.value)


def nest(folder):
    torch.save({"model": load_file(folder / "model.safetensors"), "step": 3}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def prefix(text):
    def change(folder):
        path = folder / "model.safetensors"
        save_file({text + name: value for name, value in load_file(path).items()}, path)

    return change


def headless(folder):
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    tensors.pop("lm_head.weight")
    save_file(tensors, path)


def adapter(folder):
    (folder / "model.safetensors").unlink()
    beside_weights(folder)


def beside_weights(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/base"}))


def gguf(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "model-q4.gguf").write_bytes(b"GGUF\x03" + bytes(60))


def original(folder):
    (folder / "config.json").unlink()
    (folder / "params.json").write_text("{}")
    to_bin(folder, "consolidated.00.pth")


def one_deeper(folder):
    (folder / "inner").mkdir()
    (folder / "config.json").rename(folder / "inner" / "config.json")


@pytest.mark.parametrize(
    ("change", "handed_in", "word"),
    [
        (lambda folder: None, "model.safetensors", "give the folder"),
        (lambda folder: None, "config.json", "give the folder"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json", "give the folder"),
        (lambda folder: (folder / "m.ckpt").write_bytes(b"GGUF\x03"), "m.ckpt", "GGUF"),
        (gguf, "", "model-q4.gguf"),
        (adapter, "", "a/base"),
        (beside_weights, "", "adapter_config.json"),
        (nest, "", "'model'"),
        (prefix("_orig_mod."), "", "'_orig_mod.'"),
        (prefix("module."), "", "'module.'"),
        (prefix("base_model.model."), "", "'base_model.model.'"),
        (headless, "", "'model.'"),
        (original, "", "consolidated.00.pth"),
        (one_deeper, "", "inner"),
    ],
)
def test_what_is_no_checkpoint_is_called_by_its_name(tmp_path, change, handed_in, word):
    saved(tmp_path / "model", 1)
    change(tmp_path / "model")
    with pytest.raises(UserError, match=re.escape(word)) as caught:
        Checkpoint.open(tmp_path / "model" / handed_in, runs=False)
    assert str(tmp_path) in str(caught.value) or str(caught.value).startswith("model: ")
    assert "\n" not in str(caught.value)


def codes(suffix, kind=torch.float16):
    """A matrix of whole numbers, and what it is to be multiplied with."""

    def change(tensors, name):
        tensors[name + ".weight"] = (tensors[name + ".weight"] * 1000).round().clamp(-127, 127).to(kind)
        tensors[name + suffix] = torch.ones(1)

    return change


def in_place(*names):
    def change(tensors, name):
        tensors.pop(name + ".weight")
        tensors.update({f"{name}.{one}": torch.ones(4, dtype=torch.int32) for one in names})

    return change


@pytest.mark.parametrize(
    "change",
    [
        codes(".weight_scale"),
        codes(".weight_scale_inv", torch.float8_e5m2),
        codes(".weight_scale", torch.int8),
        codes(".scales", torch.uint8),
        codes(".SCB", torch.int8),
        codes(".weight.absmax", torch.uint8),
        codes(".unheard_of", torch.int8),
        in_place("qweight", "qzeros", "scales", "g_idx"),
        in_place("weight_packed", "weight_scale", "weight_shape"),
    ],
)
def test_quantised_weights_are_called_quantised(tmp_path, change):
    """Codes that are kept as float16 are the worst of them: as numbers they would be no error."""
    saved(tmp_path, 1)
    tensors = load_file(tmp_path / "model.safetensors")
    for expert in range(4):
        change(tensors, f"model.layers.1.block_sparse_moe.experts.{expert}.w1")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="the weights are quantised") as caught:
        Checkpoint.open(tmp_path, runs=False)
    assert "model.layers.1.block_sparse_moe.experts.0.w1" in str(caught.value)
