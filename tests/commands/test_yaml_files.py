"""A YAML file in the place of options: what is wrong with it is one line, in every command that takes one."""

import pytest

from moebed.arguments import parse_yaml
from moebed.cli import main

RECIPE = "model: {config: {num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 2, rope_theta: 1e4}}"
COMMANDS = {"study": [], "size": [], "probe": ["--config"], "fit": ["--config"]}


@pytest.mark.parametrize("content", [None, b"a: [", "é: ü".encode("latin-1")], ids=["missing", "no YAML", "no UTF-8"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_read_is_one_line(command, content, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    assert main([command, *COMMANDS[command], str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "recipe.yaml cannot be read (" in line or (content is None and "File does not exist" in line)


@pytest.mark.parametrize("content", ["", "a sentence of a text", "[1, 2]"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_holds_something_else_is_one_line(command, content, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    assert main([command, *COMMANDS[command], str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "recipe.yaml h" in line
    assert content not in line or not content


def test_a_first_call_without_a_recipe_says_what_to_give(capsys):
    assert main(["fit"]) == 2
    assert "--config recipes/demo.yaml" in capsys.readouterr().err


def test_numbers_without_a_point_are_numbers_and_words_are_not(tmp_path, capsys):
    """YAML 1.1 takes 1e4 for a word; ``moebed fit`` and a reader do not."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    given = ["size", str(path), "moe_intermediate_size=8"]
    assert main([*given, "model.config.router_z_loss_coef=1e-3"]) == 0
    assert [parse_yaml(text) for text in ("1e-5", "2E3", "-.5e1", "1e", "e5", "12")] == [
        1e-5,
        2e3,
        -5.0,
        "1e",
        "e5",
        12,
    ]
    for wrong in ("num_experts=foo", "rms_norm_eps=x", "vocab_size=", "num_experts=[4"):
        capsys.readouterr()
        assert main([*given, wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert wrong.partition("=")[0] in line
