"""What the parser of ``moebed fit`` refuses: one line with the key, the value and what it may be."""

import pytest

from moebed.cli import main

RECIPE = "recipes/tiny_mixtral.yaml"
SOURCE = "name: mine, kind: files, path: x.txt"
PROBES = "class_path: probes.ProbeCallback, init_args:"
REFUSED = [
    ("--model.config.num_experts", "four", "num_experts is 'four'; it must be a whole number or a list"),
    ("--model.config.num_experts", "[4, x]", "it must be a whole number or a list"),
    ("--model.config.num_experts", "[4, 8", "is '[4, 8', which is no YAML"),
    ("--model.config", "{num_experts: x}", "model.config.num_experts is 'x'; it must be a whole number"),
    ("--model.config.norm_topk_prob", "3", "norm_topk_prob is 3; it must be true or false"),
    ("--model.optimizer.name", "adam", "name is 'adam'; choose one of adamw, muon (did you mean"),
    ("--model.optimizer.learning_rate", "fast", "model.optimizer: learning_rate is 'fast'; it must be a number"),
    ("--model.optimizer.lr", "1", "model.optimizer: unknown key 'lr' in the config; choose one of name, learning_"),
    ("--data.sources", "x.txt", "data.sources is 'x.txt'; it must be a list, each entry settings by name (name, kind"),
    ("--data.sources", f"[{{{SOURCE}, weight: heavy}}]", "data.sources: weight is 'heavy'; it must be a number"),
    ("--data.sources", f"[{{{SOURCE}, pth: y}}]", "data.sources: unknown key 'pth' in the config; did you mean 'path'"),
    ("--data.sources", "[{name: mine, kind: file}]", "kind is 'file'; choose one of embedded, files, hub, planted ("),
    ("--data.tokenizer", "bpe", "data.tokenizer is 'bpe'; it must be settings by name (kind, vocab_size, path"),
    ("--trainer.precision", "fp8", "trainer.precision is 'fp8'; choose one of auto, 64, 32, 16"),
    ("--trainer.callbacks", f"[{{{PROBES} {{every: 4}}}}]", "trainer.callbacks: unknown key 'every' in the config"),
    ("--trainer.callbacks", "[{class_path: probes.ProbeCallbak}]", "did you mean 'ProbeCallback'?"),
    ("--trainer.logger", "tensorbord", "it must be the class_path of a Logger"),
    ("--parallel", "5", "parallel is '5'; it must be settings by name (data, expert"),
]  # fmt: skip


def test_each_refusal_names_key_value_and_what_it_may_be(capsys):
    for option, value, words in REFUSED:
        assert main(["fit", "--config", RECIPE, option, value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert not [said for said in ("Subtypes", "<class", "Parser key", "validate") if said in line], line
    assert main(["fit", RECIPE]) == 2
    assert f"a recipe is given as --config {RECIPE}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["probes.ProbeCallback", "[{class_path: probes.ProbeCallback}]"])
def test_one_callback_needs_no_list(value, capsys):
    """Refused for something that comes after the callbacks are put together."""
    assert main(["fit", "--config", RECIPE, "--trainer.callbacks", value, "--trainer.max_steps", "-7"]) == 2
    assert "max_steps" in capsys.readouterr().err.splitlines()[-1]
