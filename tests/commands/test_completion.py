"""Completion in a shell, and what is said to a person who types the command alone."""

import shutil
import subprocess

import pytest

from moebed.cli import COMMANDS, FIRST_STEPS, main
from moebed.commands.completion import SHELLS, options_of, script


def test_every_command_has_options():
    for command in COMMANDS:
        options = options_of(command)
        assert {"--help", "--plugins"} <= set(options), command
        assert len(options) == len(set(options))
    assert {"--model.config.num_experts", "--trainer.max_steps", "--data.batch_size"} <= set(options_of("fit"))
    assert {"--probes", "--text", "--out"} <= set(options_of("probe"))
    assert {"train", "kernels", "--static"} <= set(options_of("bench"))


@pytest.mark.parametrize(
    ("words", "wanted", "others"),
    [
        (["moebed", "re"], "report", "probe"),
        (["moebed", "probe", "--te"], "--text", "--out"),
        (["moebed", "fit", "--model.config.num_exp"], "--model.config.num_experts", "--config"),
    ],
)
def test_bash_completes(tmp_path, words, wanted, others):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    (tmp_path / "completion").write_text(script("bash"), encoding="utf-8")
    quoted = " ".join(f"'{word}'" for word in words)
    asked = f"source completion; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _moebed; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, cwd=tmp_path, check=True)
    found = done.stdout.split()
    assert wanted in found
    assert others not in found


def test_each_shell_has_a_script(capsys):
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        assert "--memory-budget" in capsys.readouterr().out.replace("-l memory-budget", "--memory-budget")
    assert main(["completion", "tcsh"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bash" in line


def test_the_command_alone_says_five_things_to_do(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said == FIRST_STEPS + "\n"
    named = [line.split()[1] for line in said.splitlines() if line.startswith("  moebed ")]
    assert len(named) == 5
    assert set(named) <= COMMANDS.keys()


def test_a_report_of_nothing_is_one_line(capsys):
    assert main(["report"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`moebed report --help` lists the options" in line
