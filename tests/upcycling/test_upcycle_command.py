"""The command as a person meets it: what lies in the folder, training from it, and errors."""

import json

import numpy as np
import pytest
import torch
import transformers
from dense_sources import logits, tensors, write_dense, write_run

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.cli import main
from moebed.data.tokenizer import BytesTokenizer, train_bpe
from tests.small_run import small_recipe, write_recipe


def upcycle(dense, out, *options):
    return main(["upcycle", str(dense), "--out", str(out), *options])


def dense_run(folder, tokenizer=None, **changes):
    checkpoint = write_run(folder, **{"num_experts": 0, "vocab_size": 300, **changes})
    if tokenizer is not None:
        tokenizer.save(checkpoint.parents[1] / "tokenizer")
    return checkpoint


def test_transformers_loads_what_becomes_of_mistral(tmp_path):
    dense = write_dense(tmp_path)
    assert upcycle(dense, tmp_path / "moe", "--method", "copy", "--num-experts", "4") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", attn_implementation="eager").eval()
    assert type(model).__name__ == "MixtralForCausalLM"
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    wanted = logits(load_decoder(dense))
    torch.testing.assert_close(model(ids).logits.detach(), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_the_dense_model_s_ids_and_tokenizer_come_along(tmp_path):
    dense = write_dense(tmp_path, bos_token_id=7, eos_token_id=9)
    train_bpe(["the cat sat on the mat"], 260).save(dense)
    assert upcycle(dense, tmp_path / "moe", "--method", "copy") == 0
    settings = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (7, 9)
    assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_weights_are_stored_as_asked_or_as_they_were(tmp_path, dtype):
    dense = write_dense(tmp_path, dtype="float32")
    assert upcycle(dense, tmp_path / "moe", "--method", "copy", *(["--dtype", dtype] if dtype else [])) == 0
    assert {entry.dtype for entry in Checkpoint.open(tmp_path / "moe").entries.values()} == {
        getattr(torch, dtype or "float32")
    }


def recipe(folder):
    """A short run's recipe without a model and a tokenizer."""
    content = small_recipe(
        folder, trainer={"default_root_dir": str(folder / "fit"), "max_steps": 2, "limit_val_batches": 1}, model=None
    )
    del content["data"]["tokenizer"]
    return str(write_recipe(folder, content))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_training_starts_from_exactly_these_weights(tmp_path, kind):
    tokenizer = BytesTokenizer() if kind == "bytes" else train_bpe(["the cat sat on the mat"], 280)
    dense = dense_run(tmp_path, tokenizer)
    moe = tmp_path / "moe"
    assert upcycle(dense, moe, "--method", "drop", "--num-experts", "4") == 0
    arguments = ["fit", "--config", recipe(tmp_path), "--config", str(moe / "start.yaml")]
    # A step that changes nothing leaves the weights that training started from.
    frozen = ["--model.optimizer.learning_rate", "0", "--model.optimizer.weight_decay", "0"]
    assert main([*arguments, *frozen]) == 0
    started, wanted = tensors(tmp_path / "fit" / "checkpoints" / "last.ckpt"), tensors(moe)
    assert started.keys() == wanted.keys()
    assert all(torch.equal(started[name], wanted[name]) for name in wanted)


def test_a_continued_run_keeps_its_own_weights(tmp_path):
    moe = tmp_path / "moe"
    assert upcycle(dense_run(tmp_path, BytesTokenizer()), moe, "--method", "copy", "--num-experts", "4") == 0
    arguments = ["fit", "--config", recipe(tmp_path), "--config", str(moe / "start.yaml")]
    assert main(arguments) == 0
    last = tmp_path / "fit" / "checkpoints" / "last.ckpt"
    before = tensors(last)
    assert not torch.equal(before["norm.weight"], tensors(moe)["norm.weight"])
    moe.rename(tmp_path / "gone")  # it is not needed any more
    frozen = ["--model.optimizer.learning_rate", "0", "--trainer.max_steps", "3", "--ckpt_path", "last"]
    assert main(["fit", "--config", str(tmp_path / "fit" / "config.yaml"), *frozen]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 3
    after = tensors(last)
    # The one step more has the schedule's rate of the checkpoint; what matters is where it began.
    assert (after["norm.weight"] - before["norm.weight"]).abs().max() < 1e-2
    gates = "layers.0.mlp.router.weight"
    assert (after[gates] - before[gates]).abs().max() < (before[gates] - tensors(tmp_path / "gone")[gates]).abs().max()


@pytest.mark.parametrize("kind", ["missing", "other sizes"])
def test_a_start_that_does_not_fit_is_one_line(tmp_path, capsys, kind):
    moe = tmp_path / "moe"
    assert upcycle(dense_run(tmp_path, BytesTokenizer()), moe, "--method", "copy", "--num-experts", "4") == 0
    capsys.readouterr()
    change = ["--model.init_from", str(tmp_path / "none")] if kind == "missing" else ["--model.config.num_experts", "5"]
    assert main(["fit", "--config", recipe(tmp_path), "--config", str(moe / "start.yaml"), *change]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("moebed: error: ")] == said[-1:]
    assert ("none" if kind == "missing" else "num_experts 4 but model.config has 5") in said[-1]
    assert not (tmp_path / "fit").exists()


ADAPTERS = ["unchosen", "constant", "free", "shared_equal_flops", "shared_equal_parameters"]


@pytest.mark.parametrize(
    "adapters",
    [
        one if one in ("unchosen", "free", "shared_equal_flops") else pytest.param(one, marks=pytest.mark.slow)
        for one in ADAPTERS
    ],
)
def test_adapters_begin_beside_upcycled_experts_and_silent(tmp_path, capsys, adapters):
    """As HyperMoE's published runs do, which begin with copies of a dense model."""
    dense, moe = dense_run(tmp_path, BytesTokenizer()), tmp_path / "moe"
    per_token = ["--num-experts-per-tok", "1" if adapters == "free" else "2"]
    assert upcycle(dense, moe, "--method", "copy", "--num-experts", "4", *per_token) == 0
    capsys.readouterr()
    arguments = ["fit", "--config", recipe(tmp_path), "--config", str(moe / "start.yaml")]
    frozen = ["--model.optimizer.learning_rate", "0", "--model.optimizer.weight_decay", "0"]
    assert main([*arguments, *frozen, "--model.config.hyper_experts.adapters", adapters]) == 0
    what = "shared experts" if adapters.startswith("shared_") else f"adapters, {adapters}"
    assert f"weights: those of moe; new, silent at first: {what}" in capsys.readouterr().err
    started = load_decoder(tmp_path / "fit" / "checkpoints" / "last.ckpt")
    parameters, kept = dict(started.named_parameters()), tensors(moe)
    assert all(torch.equal(parameters[name], kept[name]) for name in kept)
    new = [parameter for name, parameter in parameters.items() if name not in kept]
    assert any(parameter.count_nonzero() for parameter in new)
    wanted = logits(load_decoder(dense), 300)
    torch.testing.assert_close(logits(started, 300), wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


def test_what_a_checkpoint_has_beside_its_experts_is_not_left_out(tmp_path, capsys):
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "vocab_size": 300}
    checkpoint = write_run(tmp_path, **sizes, hyper_experts={"adapters": "unchosen"})
    config = Checkpoint.open(checkpoint).config.to_dict() | {"hyper_experts": None}
    start = {"model": {"config": config, "init_from": str(checkpoint)}, "data": {"tokenizer": {"kind": "bytes"}}}
    (tmp_path / "start.json").write_text(json.dumps(start))
    assert main(["fit", "--config", recipe(tmp_path), "--config", str(tmp_path / "start.json")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "last.ckpt has hyper_experts {'adapters': 'unchosen'" in said
    assert "but model.config has None" in said


WRONG = {
    "no such method": (["--method", "magic"], "--method is 'magic'"),
    "no method": ([], "--method"),
    "more than there are": (["--method", "copy", "--num-experts-per-tok", "9"], "num-experts-per-tok is 9"),
    "not dividing": (["--method", "split", "--granularity", "5"], "granularity is 5, which does not divide"),
    "groups not dividing": (["--method", "cluster", "--num-experts", "7"], "num-experts is 7, which does not divide"),
    "an option of another method": (["--method", "copy", "--fraction", "0.3"], "it is for noise, drop"),
    "fraction": (
        ["--method", "drop", "--fraction", "1.5"],
        "--fraction is '1.5'; give a number of at least 0 and at most 1",
    ),
    "negative": (["--method", "noise", "--noise-std", "-1"], "--noise-std is '-1'; give a number of at least 0"),
    "not a number": (["--method", "noise", "--noise-std", "nan"], "--noise-std is 'nan'"),
    "no such layer": (["--method", "copy", "--dense-layers", "0,2"], "layers 0 to 1, not 2"),
    "all layers": (["--method", "copy", "--dense-layers", "0,1"], "dense-layers names every layer"),
    "a layer in words": (["--method", "copy", "--dense-layers", "last"], "'last' is no layer"),
    "family": (["--method", "copy", "--family", "olmoe"], "sliding_window is 5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys, name):
    options, said = WRONG[name]
    dense = write_dense(tmp_path)
    capsys.readouterr()  # the bar of transformers
    before = sorted(tmp_path.rglob("*"))
    assert upcycle(dense, tmp_path / "moe", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("moebed: error: ")
    assert said in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_has_experts_already_is_refused(tmp_path, capsys):
    assert upcycle(write_run(tmp_path, moe_intermediate_size=16), tmp_path / "moe", "--method", "copy") == 2
    assert "has experts already" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "notes.txt").write_text("mine")
    assert upcycle(write_dense(tmp_path), tmp_path / "moe", "--method", "copy") == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "moe").iterdir()] == ["notes.txt"]


def test_a_nan_half_way_leaves_no_folder(tmp_path, capsys):
    checkpoint = dense_run(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["decoder.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    torch.save(content, checkpoint)
    assert upcycle(checkpoint, tmp_path / "moe", "--method", "copy") == 2
    assert "layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_disk_without_room_is_known_before_anything_is_written(tmp_path, capsys, monkeypatch):
    dense = write_dense(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("moebed.machine.storage.shutil.disk_usage", lambda folder: usage)
    assert upcycle(dense, tmp_path / "moe", "--method", "copy") == 2
    assert "1 kB free but the checkpoint takes" in capsys.readouterr().err
    assert not list(tmp_path.glob("moe*"))


def test_a_disk_that_fills_up_leaves_no_folder(tmp_path, capsys, monkeypatch):
    dense = write_dense(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moebed.machine.storage.os.fsync", full)
    assert upcycle(dense, tmp_path / "moe", "--method", "copy") == 2
    assert capsys.readouterr().err.endswith("(No space left on device)\n")
    assert not list(tmp_path.glob("moe*"))


@pytest.mark.parametrize(
    ("shards", "dtype", "rounded"), [("3", "bfloat16", 1), ("2", "bfloat16", 0), ("3", "float32", 0)]
)
def test_a_scale_that_is_rounded_is_said(tmp_path, capsys, shards, dtype, rounded):
    options = ["--method", "split", "--granularity", shards, "--dtype", dtype]
    assert upcycle(write_dense(tmp_path), tmp_path / "moe", *options) == 0
    assert capsys.readouterr().err.count("is rounded to bfloat16") == rounded


def test_probe_reads_what_was_written(tmp_path):
    dense = write_dense(tmp_path)
    assert upcycle(dense, tmp_path / "moe", "--method", "copy", "--num-experts", "4") == 0
    arguments = ["probe", str(tmp_path / "moe"), "--out", str(tmp_path / "out"), "--reference-dense", str(dense)]
    assert main([*arguments, "--probes", "matrix_similarity"]) == 0
    found = np.load(tmp_path / "out" / "results" / "matrix_similarity.npz")
    similarity = [found[key] for key in found.files if found[key].ndim >= 2 and found[key].shape[-1] == 5]
    assert similarity  # four experts and the dense model, all alike
    for matrix in similarity:
        np.testing.assert_allclose(matrix, 1, atol=1e-5)


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / "moe.partial").mkdir()
    (tmp_path / "moe.partial" / "model.safetensors").write_text("half")
    assert upcycle(write_dense(tmp_path), tmp_path / "moe", "--method", "copy") == 0
    assert not (tmp_path / "moe.partial").exists()
    assert Checkpoint.open(tmp_path / "moe").config.num_experts == 8
