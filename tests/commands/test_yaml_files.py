"""A YAML file in the place of options: what is wrong with it is one line, in every command that takes one."""

import pytest

from moebed.cli import main

COMMANDS = {"study": [], "size": [], "probe": ["--config"]}


@pytest.mark.parametrize("content", [None, b"a: [", "é: ü".encode("latin-1")], ids=["missing", "no YAML", "no UTF-8"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_read_is_one_line(command, content, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    assert main([command, *COMMANDS[command], str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "recipe.yaml cannot be read (" in line
