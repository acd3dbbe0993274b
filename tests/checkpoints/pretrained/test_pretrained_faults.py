"""What is wrong with a checkpoint is said in one line, with exit code 2; nothing in it is run."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from checkpoint_files import to_bin, write
from safetensors.torch import load_file, save_file

from moebed.checkpoints import load_decoder
from moebed.cli import main
from probes.running import store

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.fixture
def checkpoint(tmp_path):
    write(tmp_path / "model")
    return tmp_path / "model"


def fails(capsys, checkpoint, *words, options=()):
    """The error's line; nothing but it is on standard error as an error."""
    out = checkpoint.parent / "out"
    capsys.readouterr()
    names = "matrix_similarity,gate_similarity"
    assert main(["probe", str(checkpoint), "--out", str(out), "--probes", names, *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moebed: error:")]
    assert len(lines) == 1
    for word in words:
        assert str(word) in lines[0]
    return out


def shard_of(checkpoint, tensor=EXPERT):
    index = next(checkpoint.glob("*.index.json"))
    return checkpoint / json.loads(index.read_text())["weight_map"][tensor]


def change(checkpoint, function):
    """Rewrite the shard that holds EXPERT."""
    path = shard_of(checkpoint)
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)
    return path


def test_truncated_shard(checkpoint, capsys):
    path = shard_of(checkpoint)
    path.write_bytes(path.read_bytes()[:-100])
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    assert not fails(capsys, checkpoint, path, last, "cut short").exists()


@pytest.mark.parametrize("size", [0, 5, 200])
def test_truncated_header(checkpoint, capsys, size):
    path = shard_of(checkpoint)
    path.write_bytes(path.read_bytes()[:size])
    fails(capsys, checkpoint, path, "header")


def test_trailing_bytes(checkpoint, capsys):
    path = shard_of(checkpoint)
    path.write_bytes(path.read_bytes() + b"more")
    fails(capsys, checkpoint, path, "its header describes")


def test_truncated_bin(checkpoint, capsys):
    to_bin(checkpoint)
    path = shard_of(checkpoint)
    path.write_bytes(path.read_bytes()[:-1000])
    fails(capsys, checkpoint, path, "model.layers.", "damaged or cut short")


def test_missing_shard(checkpoint, capsys):
    path = shard_of(checkpoint)
    path.unlink()
    fails(capsys, checkpoint, path, "is missing", "model.layers.")


def test_missing_tensor(checkpoint, capsys):
    path = change(checkpoint, lambda tensors: tensors.pop(EXPERT))
    fails(capsys, checkpoint, path, EXPERT, "has no tensor")


def test_tensor_that_the_index_does_not_name(checkpoint):
    """transformers takes all that is in the files which an index names."""
    wanted = load_decoder(checkpoint).state_dict()
    index = next(checkpoint.glob("*.index.json"))
    content = json.loads(index.read_text())
    del content["weight_map"][EXPERT]
    index.write_text(json.dumps(content))
    found = load_decoder(checkpoint).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_wrong_shape(checkpoint, capsys):
    path = change(checkpoint, lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1].contiguous()}))
    fails(capsys, checkpoint, path, EXPERT, "[23, 32]", "[24, 32]")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_unknown_dtype(checkpoint, capsys, dtype):
    path = change(checkpoint, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(dtype)}))
    fails(capsys, checkpoint, path, EXPERT, "bfloat16")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_layer_with_a_bad_number_is_left_out_and_the_others_are_kept(checkpoint, capsys, value):
    def spoil(tensors):
        tensors[EXPERT][5, 7] = value

    path = change(checkpoint, spoil)
    out = fails(capsys, checkpoint, path, EXPERT, "layer 1", "NaN" if value != value else "Inf")
    for name in ("matrix_similarity", "gate_similarity"):
        arrays = store.load_arrays(out, name)
        assert {key.split("/")[1] for key in arrays} == {"0", "2"}
    notes = json.loads((out / "summary.json").read_text())["probes"]["matrix_similarity"]["notes"]
    assert any(EXPERT in note and "layer 1 is missing" in note for note in notes)
    assert EXPERT in (out / "report.html").read_text()
    change(checkpoint, lambda tensors: tensors[EXPERT].fill_(0.5))
    fixed = ["probe", str(checkpoint), "--out", str(out), "--probes", "matrix_similarity,gate_similarity"]
    assert main(fixed) == 0
    assert "gate_cos/1" in store.load_arrays(out, "gate_similarity")


def test_a_bad_number_in_the_router(checkpoint, capsys):
    name = "model.layers.2.block_sparse_moe.gate.weight"
    path = shard_of(checkpoint, name)
    tensors = load_file(path)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    out = fails(capsys, checkpoint, path, name, "layer 2", "NaN")
    assert {key.split("/")[1] for key in store.load_arrays(out, "matrix_similarity")} == {"0", "1"}


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_an_index_that_leads_out_of_the_folder(checkpoint, capsys, tmp_path, kind):
    path = shard_of(checkpoint)
    outside = tmp_path / "outside.safetensors"
    shutil.move(path, outside)
    index = next(checkpoint.glob("*.index.json"))
    name = {"parent": "../outside.safetensors", "absolute": str(outside), "link": path.name}[kind]
    if kind == "link":
        path.symlink_to(outside)
    index.write_text(index.read_text().replace(path.name, name))
    fails(capsys, checkpoint, index, name, "outside", "model.layers.")


def test_links_of_the_hubs_cache_are_followed(checkpoint, tmp_path):
    hub = tmp_path / "models--org--name"
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.move(path, hub / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert main(["probe", str(snapshot), "--out", str(tmp_path / "out"), "--probes", "gate_similarity"]) == 0


class _Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["torch", "plain pickle"])
def test_a_bin_with_code_is_refused_and_not_run(checkpoint, capsys, tmp_path, kind):
    to_bin(checkpoint)
    path, touched = shard_of(checkpoint), tmp_path / "touched"
    tensors = torch.load(path, weights_only=True)
    hostile = {**tensors, "payload": _Payload(touched)}
    if kind == "torch":
        torch.save(hostile, path)
    else:
        path.write_bytes(pickle.dumps({"payload": _Payload(touched)}))
    fails(capsys, checkpoint, path, "model.layers.")
    assert not touched.exists()
    with path.open("rb") as file:  # the payload works where code is run
        if kind == "plain pickle":
            pickle.load(file)
            assert touched.exists()


def test_code_that_the_config_names_is_not_run(checkpoint, capsys, tmp_path):
    touched = tmp_path / "touched"
    (checkpoint / "modeling_evil.py").write_text(f"open({str(touched)!r}, 'w')\n")
    path = checkpoint / "config.json"
    auto = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto}))
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["probe", str(checkpoint), "--out", str(out), "--probes", "gate_similarity"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "auto_map" in line]
    assert len(said) == 1
    assert not touched.exists()


def test_unknown_model_type(checkpoint, capsys):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    assert not fails(capsys, checkpoint, path, "'mamba'", "mixtral", "deepseek", "grok-1", "qwen3_moe").exists()


def test_missing_and_damaged_config(checkpoint, capsys):
    path = checkpoint / "config.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    fails(capsys, checkpoint, path, "cannot be read")
    path.unlink()
    fails(capsys, checkpoint, path, "is missing")


def test_no_weights(checkpoint, capsys):
    for path in checkpoint.glob("*safetensors*"):
        path.unlink()
    fails(capsys, checkpoint, checkpoint, "has no weights")


def test_reference_that_does_not_fit(checkpoint, capsys, tmp_path):
    fails(capsys, checkpoint, "has experts itself", options=["--reference-dense", str(checkpoint)])
    write(tmp_path / "wide", "mistral", num_experts=0, hidden_size=64)
    fails(capsys, checkpoint, "hidden_size 64", "32", options=["--reference-dense", str(tmp_path / "wide")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "0,9"], ["layers 0 to 2, not 9"]),
        (["--layers", "x"], ["'x' is no layer"]),
        (["--memory-budget", "lots"], ["'lots'", "8GiB"]),
        (["--memory-budget", "1kB"], ["two of model.layers.0.block_sparse_moe", "give at least"]),
        (["--probes", "matrix"], ["unknown probe 'matrix'", "matrix_similarity"]),
        (["--probes", "routing"], ["routing needs text"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
def test_options_that_cannot_be(checkpoint, capsys, options, words):
    fails(capsys, checkpoint, *words, options=options)
