"""Every command opens a checkpoint by one door: what the decoder would pass over stops it, or is noted."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.cli import main
from moebed.errors import UserError
from moebed.model.config import ModelConfig
from moebed.training.module import MoEModule

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}  # fmt: skip
PROPORTIONAL = {"rope_type": "proportional", "factor": 4.0}  # no kind of ours
BIAS = "model.layers.1.self_attn.q_proj.bias"


def odd(folder, family="mixtral", settings=None, tensors=None):
    """A tiny checkpoint with settings or tensors of its own."""
    torch.manual_seed(1)
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    config = transformers.AutoConfig.for_model(family, **SIZES, **more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (settings or {})))
    if tensors:
        save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    return folder


def run(capsys, *arguments):
    """The exit code and the error's or the notes' lines."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    return code, "\n".join(line for line in lines if line.startswith(("moebed: error:", "note:", "moebed: note")))


ODD = {
    "rope_scaling": {"settings": {"rope_scaling": PROPORTIONAL}},
    BIAS: {"tensors": {BIAS: torch.ones(32)}},
    "e_score_correction_bias": {"tensors": {"model.layers.0.mlp.gate.e_score_correction_bias": torch.ones(4)}},
    "partial_rotary_factor": {"settings": {"partial_rotary_factor": 0.5}},
}


@pytest.mark.parametrize("name", ODD)
def test_weights_are_probed_with_a_note_and_text_is_refused(tmp_path, capsys, name):
    model, out = odd(tmp_path / "model", **ODD[name]), tmp_path / "out"
    np.save(tmp_path / "ids.npy", np.arange(10))
    code, said = run(capsys, "probe", model, "--out", tmp_path / "text", "--input-ids", tmp_path / "ids.npy")
    assert code == 2
    assert name in said
    code, said = run(capsys, "probe", model, "--out", out, "--probes", "gate_similarity")
    assert code == 0
    notes = json.loads((out / "summary.json").read_text())["notes"]
    assert any(name in note for note in notes)
    assert name in (out / "report.html").read_text()
    assert main(["report", str(out), "--out", str(tmp_path / "again.html")]) == 0
    assert name in (tmp_path / "again.html").read_text()


@pytest.mark.parametrize("name", ["rope_scaling", BIAS])
def test_no_command_writes_or_trains_another_model(tmp_path, capsys, name):
    moe, dense = odd(tmp_path / "moe", **ODD[name]), odd(tmp_path / "dense", "llama", **ODD[name])
    for arguments in (
        ("export", moe, "--out", tmp_path / "exported"),
        ("upcycle", dense, "--method", "copy", "--out", tmp_path / "upcycled"),
        (
            "probe",
            odd(tmp_path / "plain"),
            "--out",
            tmp_path / "probed",
            "--reference-dense",
            dense,
            "--text",
            "paper-short",
        ),
    ):
        code, said = run(capsys, *arguments)
        assert code == 2, arguments
        assert name in said
    for load in (
        lambda: load_decoder(moe),
        MoEModule(ModelConfig(moe_intermediate_size=24), init_from=str(moe)).initial_checkpoint,
    ):
        with pytest.raises(UserError, match=name):
            load()
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "upcycled").exists()


def test_a_stored_head_beside_the_tie_flag_is_the_model_s_everywhere(tmp_path, capsys):
    head = {"lm_head.weight": torch.randn(40, 32)}
    dense = odd(tmp_path / "dense", "llama", {"tie_word_embeddings": True}, head)
    ids = torch.arange(12)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    wanted = theirs(ids).logits
    torch.testing.assert_close(load_decoder(dense)(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    for command, more in (("export", ()), ("upcycle", ("--method", "copy"))):
        out = tmp_path / command
        code, said = run(capsys, command, dense, *more, "--out", out)
        assert code == 0
        assert "lm_head.weight" in said
        written = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(written(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    code, said = run(capsys, "probe", dense, "--out", tmp_path / "probed", "--probes", "gate_similarity")
    assert code == 0
    assert "lm_head.weight" in json.loads((tmp_path / "probed" / "summary.json").read_text())["notes"][0]


def test_probing_in_bfloat16_is_said_with_its_numbers(tmp_path):
    model, out = odd(tmp_path / "model"), tmp_path / "out"
    arguments = ["probe", str(model), "--out", str(out), "--probes", "gate_similarity", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    assert "bfloat16" in json.loads((out / "summary.json").read_text())["notes"][0]
    assert "rounded to bfloat16" in (out / "report.html").read_text()


def test_a_model_in_bfloat16_says_so_of_its_probes():
    module = MoEModule(ModelConfig(hidden_size=32, num_hidden_layers=1, moe_intermediate_size=16))
    assert module.notes == []
    assert "bfloat16" in module.to(torch.bfloat16).notes[0]


def test_export_keeps_the_precision_of_a_router(tmp_path, capsys):
    model = odd(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors = {name: value if ".gate." in name else value.bfloat16() for name, value in tensors.items()}
    save_file(tensors, model / "model.safetensors")
    _, said = run(capsys, "export", model, "--out", tmp_path / "kept")
    assert "stay float32 beside bfloat16" in said
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert all(value.dtype == tensors[name].dtype and torch.equal(value, tensors[name]) for name, value in kept.items())
    _, said = run(capsys, "export", model, "--out", tmp_path / "rounded", "--dtype", "bfloat16")
    assert "rounded from float32 to bfloat16" in said
    assert {value.dtype for value in load_file(tmp_path / "rounded" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_selection_bias_stays_float32(tmp_path):
    config = ModelConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, moe_intermediate_size=16,
                         router="sigmoid_topk")  # fmt: skip
    module = MoEModule(config)
    module.decoder.routers[0].expert_bias.fill_(0.6001)
    content = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    bias = load_decoder(tmp_path / "last.ckpt", torch.bfloat16).routers[0].expert_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, module.decoder.routers[0].expert_bias)
    assert main(["export", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert torch.equal(load_decoder(tmp_path / "out").routers[0].expert_bias, bias)
    assert Checkpoint.open(tmp_path / "out").notes == []


def test_a_shared_expert_of_any_width_is_what_transformers_makes_of_it(tmp_path):
    settings = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 20, "num_experts": 4}
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model("qwen2_moe", **SIZES, **settings, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    decoder, ids = load_decoder(tmp_path / "model").eval(), torch.arange(12)[None]
    torch.testing.assert_close(decoder(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["probe", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--probes", "all"]) == 0
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "again")]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
