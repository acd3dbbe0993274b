"""What `moebed export` writes, loaded by transformers; and by us, where no family expresses the model."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from exported_runs import TEXT, write_run

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.cli import main
from moebed.data.tokenizer import load_tokenizer
from moebed.errors import UserError

QWEN2_MOE = {"attention_bias": True, "num_shared_experts": 2, "shared_expert_gate": True}
LOADED = {
    "MixtralForCausalLM": {"sliding_window": 5, "tie_word_embeddings": True},
    "OlmoeForCausalLM": {"qk_norm": "full", "norm_topk_prob": False},
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": {"qk_norm": "head", "num_experts": [0, 4]},
    "LlamaForCausalLM": {"num_experts": 0, "hidden_act": "gelu_tanh"},
    "MistralForCausalLM": {"num_experts": 0, "sliding_window": 4},
    "Qwen2ForCausalLM": {"num_experts": 0, "attention_bias": True},
}
OWN = {
    "ragged": {"num_experts": [3, 5], "moe_intermediate_size": [16, 24]},
    "capped, four norms": {"post_norms": True, "hidden_act": "gelu", "attn_logit_softcapping": 20.0},
    "shared without a gate": {"num_shared_experts": 1, "norm_topk_prob": False},
    "dense, four norms": {"num_experts": 0, "post_norms": True},
}


def export(checkpoint, out, *options):
    assert main(["export", str(checkpoint), "--out", str(out), *options]) == 0
    return out


def ids():
    return torch.randint(290, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def close(found, decoder):
    wanted = decoder(ids()).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found(ids()).logits, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("name", LOADED)
def test_transformers_loads_it_with_equal_logits(tmp_path, name):
    checkpoint, decoder = write_run(tmp_path, **LOADED[name])
    out = export(checkpoint, tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert type(model).__name__ == name
    assert model.dtype == torch.float32
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    close(model.eval(), decoder)
    assert model.config.eos_token_id == 0
    assert model.config.bos_token_id is None


@pytest.mark.parametrize("name", OWN)
def test_what_no_family_expresses_is_in_our_own_layout_and_says_so(tmp_path, capsys, name):
    checkpoint, decoder = write_run(tmp_path, **OWN[name])
    out = export(checkpoint, tmp_path / "out")
    said = capsys.readouterr().err
    assert said.count("no family of transformers expresses this model") == 1
    assert "mixtral: " in said or "llama: " in said
    settings = json.loads((out / "config.json").read_text())
    assert settings["model_type"] == "moebed"
    back = load_decoder(out)
    assert Checkpoint.open(out).config == decoder.config
    mine = dict(decoder.named_parameters())
    assert all(torch.equal(value, mine[key]) for key, value in back.named_parameters())
    close(back.eval(), decoder)
    assert "transformers has no class" in (out / "README.md").read_text()


def test_probe_gives_the_same_numbers_of_the_run_and_of_its_export_in_our_layout(tmp_path):
    checkpoint, _ = write_run(tmp_path, **OWN["ragged"])
    out = export(checkpoint, tmp_path / "out")
    (tmp_path / "text.txt").write_text(TEXT[0][:40])
    found, names = [], ("gate_similarity", "routing")
    for number, path in enumerate((checkpoint, out)):
        folder = tmp_path / f"probes{number}"
        arguments = ["probe", str(path), "--out", str(folder), "--probes", ",".join(names)]
        assert main([*arguments, "--text", str(tmp_path / "text.txt")]) == 0
        found.append(
            {name: dict(np.load(folder / "results" / f"{name}.npz")) for name in ("gate_similarity", "routing")}
        )
    for name, arrays in found[0].items():
        assert arrays
        for key, value in arrays.items():
            np.testing.assert_array_equal(value, found[1][name][key])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda settings: settings.pop("config"), "config is missing"),
        (lambda settings: settings["config"].update(num_expert=3), "did you mean 'num_experts'?"),
        (lambda settings: settings["config"].update(num_experts="many"), "config.json"),
        (lambda settings: settings["config"].update(hidden_size=64), "do not belong together"),
    ],
)
def test_a_damaged_config_of_our_own_layout_is_one_line(tmp_path, change, said):
    checkpoint, _ = write_run(tmp_path, **OWN["ragged"])
    path = export(checkpoint, tmp_path / "out") / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        Checkpoint.open(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_family_that_cannot_express_the_model_is_refused(tmp_path, capsys):
    checkpoint, _ = write_run(tmp_path, qk_norm="full")
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out"), "--family", "mixtral"]) == 2
    assert "qk_norm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_family_without_a_class_is_written_and_said(tmp_path, capsys):
    checkpoint, decoder = write_run(tmp_path, num_shared_experts=1)
    out = export(checkpoint, tmp_path / "out", "--family", "deepseek")
    assert "transformers has no class for deepseek" in capsys.readouterr().err
    close(load_decoder(out).eval(), decoder)


def test_a_checkpoint_folder_can_be_exported_again(tmp_path):
    checkpoint, decoder = write_run(tmp_path, num_experts=0)
    first = export(checkpoint, tmp_path / "first")
    second = export(first, tmp_path / "second", "--family", "mistral", "--dtype", "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(second)
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, decoder.lm_head.weight.bfloat16())
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_the_tokenizer_gives_the_same_ids_in_transformers(tmp_path, kind):
    checkpoint, _ = write_run(tmp_path, tokenizer=kind)
    out = export(checkpoint, tmp_path / "out")
    own = load_tokenizer(checkpoint.parents[1] / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    texts = ["the cat sat.  It saw\n\n\té, 日本 \x00\x7f!", "".join(map(chr, range(256)))]
    for text in texts:
        assert theirs(text)["input_ids"] == own.encode(text)
        assert theirs.decode(own.encode(text)) == text
    assert theirs.eos_token_id == own.eos_id


def test_generation_begins_with_the_run_s_own_sampling(tmp_path):
    checkpoint, _ = write_run(tmp_path)
    out = export(checkpoint, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    settings = model.generation_config
    assert (settings.temperature, settings.top_k, settings.do_sample, settings.eos_token_id) == (0.7, 9, True, 0)
    assert model.generate(ids(), max_new_tokens=3, min_new_tokens=3).shape == (2, 15)
